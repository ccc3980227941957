"""Layers of multi-head latent attention (MLA): whether they can keep their latents instead of keys and values.

Such a layer of transformers makes a latent and a rotated part of a token, which all heads share, and has `expand_kv`
make keys and values of these, by `kv_b_proj`. It is known by that method, and believed when it has run: attention over
latents is that of the expanded ones only if keys and values are what `ktcompile.ops.latents` says.

Shape suffixes: T tokens, L size of a latent, R size of the rotated part, H heads, K size of a key without the rotated
part, V size of a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ktcompile.ops.latents  # noqa: F401  (defines kt::into_latents and kt::out_of_latents)

_TOKENS = 3
# Relative errors of products in 16 bits are below this.
_ROUNDING = 0.02
_EXPAND = "expand_kv"


class LatentSizes(NamedTuple):
    """What an attention layer keeps of a token, L and R, and what its H heads make of it, K and V."""

    heads: int
    latent: int
    rotated: int
    key: int
    value: int


class Found(NamedTuple):
    """Layers of MLA, by module. why_not: why a layer cannot keep latents; empty where all can, or there is none."""

    layers: Mapping[Any, LatentSizes]
    why_not: str = ""


def find(model: nn.Module) -> Found:
    """Return the layers of a model that expand latents. Each of them expands a few random ones."""
    layers: dict[Any, LatentSizes] = {}
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "kv_b_proj", None), nn.Module):
            continue
        try:
            layers[module] = _sizes(module)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            return Found({}, f"{name} of {type(module).__name__}: {error}")
    return Found(layers)


@contextmanager
def keeping_latents(layers: Mapping[Any, LatentSizes]) -> Iterator[None]:
    """Have layers give attention what they would expand, for a while."""
    keep_latents(layers)
    try:
        yield
    finally:
        expand_again(layers)


def keep_latents(layers: Mapping[Any, LatentSizes]) -> None:
    """Have layers give attention latents with their rotated parts [1, 1, T, L + R] as keys, and latents as values."""
    for module in layers:
        setattr(module, _EXPAND, _unexpanded)


def expand_again(modules: Iterable[Any]) -> None:
    """Have those of some modules that keep latents expand them."""
    for module in modules:
        if vars(module).get(_EXPAND) is _unexpanded:
            delattr(module, _EXPAND)


def into_latents(module: Any, query_1HTD: Tensor) -> Tensor:
    """Return the queries of a layer that keeps latents, [1, H, T, K + R], as those of latents, [1, H, T, L + R]."""
    query_1THD = query_1HTD.transpose(1, 2)
    size = module.qk_nope_head_dim  # to Dynamo numbers of modules are constant
    plain, rotated = query_1THD[..., :size], query_1THD[..., size:]
    of_latents: Tensor = torch.ops.kt.into_latents.default(plain, module.kv_b_proj.weight)
    return torch.cat((of_latents, rotated), -1).transpose(1, 2)


def out_of_latents(module: Any, latents_1THL: Tensor) -> Tensor:
    """Return the results of attention over latents as those over values, [1, T, H, V]."""
    result: Tensor = torch.ops.kt.out_of_latents.default(latents_1THL, module.kv_b_proj.weight, module.v_head_dim)
    return result


def _unexpanded(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((kv_nope, k_rot), -1), kv_nope


def _sizes(module: Any) -> LatentSizes:
    """Return the sizes of a layer. ValueError, AttributeError and others: it expands latents in another way."""
    projection = module.kv_b_proj
    if type(projection) is not nn.Linear or projection.bias is not None:
        raise ValueError(f"kv_b_proj is {projection}, and must be a linear layer without bias")
    if not hasattr(module, _EXPAND):
        raise ValueError(f"it has no {_EXPAND}; a newer transformers may have")
    weight, key_size, value_size = projection.weight, module.qk_nope_head_dim, module.v_head_dim
    heads = len(weight) // (key_size + value_size)
    sizes = LatentSizes(heads, weight.shape[1], module.qk_rope_head_dim, key_size, value_size)
    generator = torch.Generator().manual_seed(0)
    latent, rotated = (
        torch.randn(1, 1, _TOKENS, n, generator=generator).to(weight.dtype) for n in (sizes.latent, sizes.rotated)
    )
    with torch.no_grad():
        key, value = module.expand_kv(latent, rotated)
        expanded = projection(latent[0, 0]).view(_TOKENS, heads, -1).transpose(0, 1)
    wanted = torch.cat((expanded[..., : sizes.key], rotated[0].expand(len(expanded), -1, -1)), -1)
    _check("keys", key, wanted)
    _check("values", value, expanded[..., sizes.key :])
    return sizes


def _check(what: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != (1, *wanted.shape):
        raise ValueError(f"its {what} are {list(found.shape)}, and not {[1, *wanted.shape]}")
    error = float((found[0] - wanted).float().norm() / wanted.float().norm())
    if not error < _ROUNDING:
        raise ValueError(f"its {what} are not what kv_b_proj makes of latents (relative error {error:.2g})")
