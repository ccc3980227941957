"""What an engine has to know of a model beside how to run it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ktcompile.engine.generate import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a model's configuration: where it came from.
_NOT_OF_NUMBERS = ("_name_or_path", "transformers_version")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """kind: the class of the model. dtype: of its parameters, as torch writes it. vocab_size: tokens that have an
    embedding. positions: at most, of a sequence; None: it does not say. config: the text of its configuration, but for
    where it came from. end_tokens: that end a sequence. sampling: how its makers would have tokens sampled."""

    kind: str
    dtype: str
    vocab_size: int
    positions: int | None
    config: str
    end_tokens: tuple[int, ...]
    sampling: dict[str, Any]

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> ModelSummary:
        config = model.config.get_text_config().to_dict()
        settings = model.generation_config
        chosen = {} if settings is None else settings.to_diff_dict()
        positions = config.get("max_position_embeddings")
        return cls(
            kind=type(model).__name__,
            dtype=str(model.dtype),
            vocab_size=int(model.get_input_embeddings().get_parameter("weight").shape[0]),
            positions=int(positions) if positions else None,
            config=text({k: v for k, v in config.items() if k not in _NOT_OF_NUMBERS}),
            end_tokens=tuple(sorted(end_tokens(model))),
            sampling={name: chosen[name] for name in _SAMPLING if name in chosen},
        )

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> ModelSummary:
        """Return the facts that JSON has. TypeError: they are not such."""
        return cls(**value | {"end_tokens": tuple(value["end_tokens"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def text(facts: object) -> str:
    """Return facts as text, the same for the same."""
    return json.dumps(facts, sort_keys=True, default=str)
