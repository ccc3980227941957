"""The parameters of a model without their weights, and how a checkpoint calls them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class ModelNames:
    """The parameters of a model, on the meta device, and their names in checkpoints, as transformers knows them."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        """config: of a causal language model. dtype: of what is not kept in another one by the model itself."""
        from transformers import AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype
            )
        self.config, self.dtype = config, dtype
        self.parameters: dict[str, Tensor] = self.model.state_dict()
        transforms: list[Any] = get_model_conversion_mapping(self.model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def find(self, stored: str) -> tuple[str, str | None]:
        """Return the model's name of a stored parameter and, if it is a part of that, the pattern of such parts."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(stored, self._renamings, self._converters, prefix, self.parameters)
        if name not in self.parameters and stored in self.parameters:
            return stored, None
        return name, pattern

    def converter(self, pattern: str) -> Any:
        """Return a converter of the parts that match `pattern` and others into a parameter."""
        return copy.deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
