"""Random MoE layers as plain tensors, with awkward sizes.

Shape suffixes: T tokens, K top_k, H hidden_size, I intermediate_size, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ktcompile.ops import Activation, ExpertsSpec, PackedExperts, pack_experts, reference
from ktcompile.quant import resolve_format

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 72, 56, 5, 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer, as for `ktcompile.ops.pack_experts`; no bias is (None, None)."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    spec: ExpertsSpec

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.gate_up, self.down, self.gate_up_bias, self.down_bias

    def pack(self, isa: str | None = None) -> PackedExperts:
        return pack_experts(
            self.gate_up,
            self.down,
            self.spec.weight_format,
            self.spec.activation,
            self.gate_up_bias,
            self.down_bias,
            isa,
            interleaved=self.spec.interleaved,
            transposed=self.spec.transposed,
        )

    def stored(self, weight: Tensor) -> Tensor:
        """Return `gate_up` or `down` as it is after packing, in fp32."""
        round_trip = resolve_format(self.spec.weight_format, weight.dtype).round_trip
        # Formats group the input features, which are the last dimension but of transposed weights.
        return round_trip(weight.mT).mT if self.spec.transposed else round_trip(weight)

    def reference(self, *inputs: Tensor) -> Tensor:
        """Return the right result in fp64 for (x [T, H], ids [T, K], weights [T, K]), with the weights as after
        packing."""
        (result,) = self.references([inputs])
        return result

    def references(self, inputs: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
        """Return the right result for each of several inputs; weights are quantised once."""
        rows = reference.rows_of(resolve_format(self.spec.weight_format, self.gate_up.dtype))
        weights = (self.stored(self.gate_up), self.stored(self.down), self.spec, self.gate_up_bias, self.down_bias)
        return [reference.moe(*x_ids_weights, *weights, rows) for x_ids_weights in inputs]


def random_layer(
    dtype: torch.dtype = torch.float32,
    activation: Activation = Activation("silu"),  # noqa: B008  (frozen)
    weight_format: str = "auto",
    *,
    interleaved: bool = False,
    transposed: bool = False,
    bias: bool = False,
    seed: int = 0,
    sizes: tuple[int, int, int] = (EXPERTS, HIDDEN, INTERMEDIATE),
) -> Layer:
    """Return a layer with weights of `dtype`; sizes are (E, H, I)."""
    generator = torch.Generator().manual_seed(seed)
    experts, hidden, intermediate = sizes
    rows = intermediate * (2 if activation.gated else 1)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    gate_up = normal(experts, rows, hidden, scale=hidden**-0.5)
    down = normal(experts, hidden, intermediate, scale=intermediate**-0.5)
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    biases = (normal(experts, rows, scale=0.5), normal(experts, hidden, scale=0.5)) if bias else (None, None)
    spec = ExpertsSpec(activation, interleaved, transposed, weight_format)
    return Layer(gate_up, down, *biases, spec)


def random_inputs(
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 1,
    sizes: tuple[int, int, int] = (EXPERTS, HIDDEN, INTERMEDIATE),
    top_k: int = TOP_K,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden_states [T, H], topk_ids [T, K], topk_weights [T, K] in fp32)."""
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(tokens, sizes[1], generator=generator).to(dtype)
    ids_TK = torch.rand(tokens, sizes[0], generator=generator).argsort(1)[:, :top_k].contiguous()
    weights_TK = torch.randn(tokens, top_k, generator=generator).softmax(1)
    return x_TH, ids_TK, weights_TK
