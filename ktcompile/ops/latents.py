"""Attention over latents (MLA): the products that expanding them takes, applied to queries and to results instead.

The keys of a head are `latents @ key_weight.mT` with a rotated part beside them, its values are
`latents @ value_weight.mT`. So its scores are those of `query @ key_weight` with the latents themselves, and its result
is that of the latents as values, times `value_weight.mT`. A layer keeps one row of latents for all heads.

Shape suffixes: H heads, K size of a key without its rotated part, V size of a value, L size of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ktcompile.ops.library import LIBRARY, register_without_backward
from ktcompile.ops.linear import PackedLinear
from ktcompile.ops.spec import LatentsSpec

LIBRARY.define("into_latents(Tensor query, Tensor weight) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(
    "out_of_latents(Tensor latents, Tensor weight, SymInt value_size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


class PackedLatents:
    """The weight that expands latents, packed for both of its uses. keys: of queries, of heads [L, K] each. values: of
    results, of heads [V, L] each."""

    def __init__(self, weight: Tensor, spec: LatentsSpec) -> None:
        weight_HNL = of_heads(weight, spec.heads)
        key_HKL, value_HVL = weight_HNL[:, : spec.key_size], weight_HNL[:, spec.key_size :]
        self.keys = PackedLinear(key_HKL.mT, None, spec.weight_format, spec.isa)
        self.values = PackedLinear(value_HVL, None, spec.weight_format, spec.isa)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def unpack_into(self, *weights: Tensor) -> None:
        """Write the weight, dequantised, into a tensor [H * (K + V), L]."""
        (weight,) = weights
        heads, size = self.keys.heads, self.keys.in_features
        weight_HNL = of_heads(weight, heads)
        weight_HNL[:, :size].copy_(self.keys.unpack().view(heads, -1, size).mT)
        weight_HNL[:, size:].copy_(self.values.unpack().view(heads, self.values.out_features, -1))


def of_heads(weight: Tensor, heads: int) -> Tensor:
    """Return the weight that expands latents, [H * (K + V), L], as [H, K + V, L]."""
    return weight.view(heads, -1, weight.shape[1])


@torch.library.impl(LIBRARY, "into_latents", "CompositeExplicitAutograd")
def _into_latents(query: Tensor, weight: Tensor) -> Tensor:
    """Return queries [..., H, K] as those of latents, [..., H, L]. weight: [H * (K + V), L]."""
    weight_HNL = of_heads(weight, query.shape[-2])
    return torch.einsum("...hk,hkl->...hl", query, weight_HNL[:, : query.shape[-1]])


@torch.library.impl(LIBRARY, "out_of_latents", "CompositeExplicitAutograd")
def _out_of_latents(latents: Tensor, weight: Tensor, value_size: int) -> Tensor:
    """Return results of latents [..., H, L] as those of values, [..., H, V]. weight: [H * (K + V), L]."""
    weight_HNL = of_heads(weight, latents.shape[-2])
    return torch.einsum("...hl,hvl->...hv", latents, weight_HNL[:, -value_size:])


@torch.library.register_fake("kt::into_latents", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _into_latents_fake(query: Tensor, weight: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], weight.shape[1])


@torch.library.register_fake("kt::out_of_latents", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _out_of_latents_fake(latents: Tensor, weight: Tensor, value_size: int) -> Tensor:
    return latents.new_empty(*latents.shape[:-1], value_size)


for _name in ("into_latents", "out_of_latents"):
    register_without_backward(_name)
