"""Tiny random models, one for every experts class that transformers can dispatch.

`decorated_experts_classes` finds the classes by reading the library's own sources, `moe_case` finds out how
a model that uses the class is built, and `build` and `run` give the model, its inputs and the tensor to
compare. Dimensions are awkward on purpose: the hidden size is no multiple of 16, and where routing has no
groups the number of experts is odd.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

Inputs: TypeAlias = dict[str, Any]
Level: TypeAlias = Literal["causal_lm", "token_classification", "text_model"]

VOCAB_SIZE = 97
BATCH_SIZE = 2
SEQUENCE_LENGTH = 7
WEIGHT_STD = 0.1
ROUTER_STD = 0.3

# What the name of a model class ends with, from the most complete model to the least.
_LEVELS: tuple[tuple[str, Level], ...] = (
    ("ForCausalLM", "causal_lm"),
    ("ForTokenClassification", "token_classification"),
    ("TextModel", "text_model"),
    ("Model", "text_model"),
)

# A value for every configuration field that sets a size, whatever the architecture. Limits and factors of the
# activations are small enough to act on random values, and differ from the defaults.
_FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 56,
    "moe_intermediate_size": 56,
    "shared_expert_intermediate_size": 40,
    "shared_experts_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "dense_intermediate_size": 48,
    "prefix_dense_intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 18,
    "sliding_window": 4,
    "sliding_window_size": 4,
    "num_experts": 5,
    "num_local_experts": 5,
    "n_routed_experts": 5,
    "moe_num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_k": 3,
    "moe_topk": 3,
    "top_k_experts": 3,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "o_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "index_topk": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_kpool": 4,
    "index_block_size": 4,
    "block_size": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "mamba_n_heads": 4,
    "mamba_d_state": 6,
    "mamba_chunk_size": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 36,
    "ssm_state_size": 6,
    "chunk_size": 4,
    "use_mamba_kernels": False,
    "router_hidden_size": 24,
    "moe_hidden_size": 40,
    "hc_sinkhorn_iters": 3,
    "gated_norm_rank": 6,
    "hc_lowrank": 6,
    "d_rel": 6,
    "rel_extent": 8,
    "hidden_size_per_layer_input": 10,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "unpadded_vocab_size": VOCAB_SIZE,
    "swiglu_limit": 0.5,
    "swiglu_alpha": 1.3,
    "mlp_gate_softcap": 0.7,
    "mlp_up_softcap": 0.9,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}

# Six experts in three groups, where routing selects groups first.
_GROUPED_FIELDS = {
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "n_group": 3,
    "topk_group": 2,
}

# Latent attention has as many keys as queries, and `head_dim` means the rotated part of a head.
_LATENT_ATTENTION_FIELDS = {"num_key_value_heads": 4, "head_dim": 8}

# What an architecture needs beyond the table, by folder.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["full_attention", "full_attention"]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "dots3_note": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [56, 40],
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 0,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["indexed_attention", "indexed_attention"],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["full_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    # The experts work in a latent space that is narrower than the model.
    "nemotron_h": {
        "n_groups": 2,
        "moe_latent_size": 40,
        "layer_types": ["linear_attention", "moe", "full_attention", "moe"],
    },
    "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 40},
    "zaya": {"num_experts_per_tok": 1},
}

# Other decorators may stand between this one and the class. To parse all sources takes a second and a half.
_DECORATED_CLASS = re.compile(r"^@use_experts_implementation\b[^\n]*(?:\n[@) ][^\n]*)*\nclass (\w+)", re.MULTILINE)

# Models that take embedded tokens only.
_TAKES_EMBEDDINGS = frozenset({"Qwen3OmniMoeTalkerModel"})

# Classes whose smallest model Dynamo cannot trace as one graph, and why.
_GRAPH_BREAKS: dict[str, str] = {}


class NoCaseError(LookupError):
    """No tiny model could be built around an experts class."""


@dataclass(frozen=True, slots=True)
class MoeCase:
    """A way to build a tiny model around one experts class.

    `level` says how much of a real model it is. `graph_break` says why Dynamo cannot trace its forward as one
    graph with the `grouped_mm` experts, and is None where it can.
    """

    experts_class: type[nn.Module]
    folder: str
    model_class: type[PreTrainedModel]
    level: Level
    graph_break: str | None

    @property
    def fullgraph(self) -> bool:
        return self.graph_break is None

    @property
    def name(self) -> str:
        return self.experts_class.__name__


@functools.cache
def decorated_experts_classes() -> list[tuple[str, str]]:
    """Return (module name, class name) of every class that `use_experts_implementation` decorates, sorted."""
    spec = importlib.util.find_spec("transformers.models")
    assert spec is not None and spec.submodule_search_locations
    return sorted(
        (f"transformers.models.{path.parent.name}.{path.stem}", name)
        for root in spec.submodule_search_locations
        for path in Path(root).glob("*/modeling_*.py")
        for name in _DECORATED_CLASS.findall(path.read_text(encoding="utf-8"))
    )


@functools.cache
def moe_case(module_name: str, class_name: str) -> MoeCase:
    """Return the case of one experts class: the most complete model of its module that can be built.

    Raises `NoCaseError`, with what was tried, if there is none.
    """
    module = importlib.import_module(module_name)
    experts_class = getattr(module, class_name)
    folder = module_name.split(".")[-2]
    tried = []
    for model_class, level in _model_classes(module, class_name):
        try:
            model = _instantiate(model_class, folder, torch.float32, 0)
        except Exception as error:
            tried.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
            continue
        if any(isinstance(part, experts_class) for part in model.modules()):
            return MoeCase(experts_class, folder, model_class, level, _GRAPH_BREAKS.get(class_name))
        tried.append(f"{model_class.__name__}: has no {class_name}")
    reasons = "; ".join(tried) or "no text model in the module"
    raise NoCaseError(f"no tiny model for {module_name}.{class_name}: {reasons}")


def case_of(family: str) -> MoeCase:
    """Return the case of a family, by the name of its folder in transformers."""
    (found,) = (c for c in decorated_experts_classes() if c[0].split(".")[-2] == family)
    return moe_case(*found)


def build(
    case: MoeCase, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any
) -> tuple[PreTrainedModel, Inputs]:
    """Return the case's model in evaluation mode and the keyword arguments of a forward call.

    fields: of the configuration, beside those of the table. The same seed gives the same weights and inputs, in every
    dtype up to rounding. As in a loaded checkpoint, what the architecture keeps in float32 stays so.
    """
    model = _instantiate(case.model_class, case.folder, dtype, seed, fields)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCAB_SIZE, (BATCH_SIZE, SEQUENCE_LENGTH), generator=generator)
    inputs: Inputs = {"input_ids": input_ids}
    if case.model_class.__name__ in _TAKES_EMBEDDINGS:
        inputs = {"inputs_embeds": model.get_input_embeddings()(input_ids).detach()}
    return model.eval(), inputs | {"use_cache": False}


def run(model: nn.Module, kwargs: Inputs) -> Tensor:
    """Return the tensor to compare: the logits, or the last hidden state of a model without a head."""
    output = model(**kwargs)
    return output.logits if "logits" in output else output.last_hidden_state


def experts_modules(model: nn.Module, experts_class: type[nn.Module]) -> dict[str, nn.Module]:
    """Return the experts modules of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, experts_class)}


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every weight anew, so that each part of a tiny model shows in its output.

    Matrices are normal, those of routers wider, so that near-ties are rare. Vectors and selection biases keep
    their initial value as the centre, for norms and state space models give them a scale of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    routers = {id(weight) for weight in _router_weights(model)}
    with torch.no_grad():
        for name, tensor in _named_tensors(model):
            noise = torch.randn(tensor.shape, generator=generator)
            if not tensor.is_floating_point():
                continue
            if isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
                tensor.copy_(noise * (ROUTER_STD if id(tensor) in routers else WEIGHT_STD))
            elif isinstance(tensor, nn.Parameter) or "bias" in name.rsplit(".", 1)[-1]:
                tensor.copy_(tensor.nan_to_num(0.0, 0.0, 0.0) + WEIGHT_STD * noise)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _router_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the matrices with one row for each expert."""
    counts = {part.num_experts for part in model.modules() if hasattr(type(part), "_apply_gate")}
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and weight.shape[0] in counts and "experts." not in name:
            yield weight


def _instantiate(
    model_class: type[PreTrainedModel], folder: str, dtype: torch.dtype, seed: int, fields: Inputs | None = None
) -> Any:
    config_class = model_class.config_class
    assert config_class is not None
    config = config_class(**_config_fields(config_class, folder) | (fields or {}))
    with torch.random.fork_rng(devices=[]), _poisoned_memory():
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=dtype)
    if dtype != torch.float32:
        _keep_in_fp32(model)
    return model


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Widen what loading a checkpoint in half precision leaves in float32."""
    patterns = [re.escape(name).replace(r"\*", ".*") for name in model._keep_in_fp32_modules_strict or ()]
    for name, tensor in _named_tensors(model):
        if tensor.is_floating_point() and any(re.search(pattern, name) for pattern in patterns):
            tensor.data = tensor.data.float()


def _config_fields(config_class: type[PreTrainedConfig], folder: str) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(config_class)}
    fields = dict(_FIELDS)
    if "topk_group" in known:
        fields |= _GROUPED_FIELDS
    if "qk_rope_head_dim" in known:
        fields |= _LATENT_ATTENTION_FIELDS
    fields = {name: value for name, value in fields.items() if name in known}
    return fields | _OVERRIDES.get(folder, {})


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill `torch.empty` with NaN, so that a weight that nothing initialises is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _model_classes(module: Any, experts_class_name: str) -> list[tuple[type[PreTrainedModel], Level]]:
    """Return the text models of a module, best first.

    That is the most complete one, and among equals the one named most like the experts class.
    """
    found = []
    for name, value in vars(module).items():
        if not isinstance(value, type) or not issubclass(value, PreTrainedModel):
            continue
        if value.__module__ != module.__name__ or name.endswith("PreTrainedModel"):
            continue
        if value.config_class is None or value.config_class.sub_configs:
            continue
        for rank, (suffix, level) in enumerate(_LEVELS):
            if name.endswith(suffix):
                found.append((rank, -_common_prefix(name, experts_class_name), value, level))
                break
    return [(value, level) for _, _, value, level in sorted(found, key=lambda entry: entry[:2])]


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
