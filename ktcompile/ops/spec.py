"""What a packed expert computes between its two matrix products, and how its weights lie in memory."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass

from ktcompile import _native

KINDS = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2", "swigluoai")


@dataclass(frozen=True, slots=True)
class Activation:
    """The activation of an expert.

    Gated: `act(gate) * up`; not gated: `act(up)`. kind "swigluoai" (gpt-oss), gated only, is
    `gate * sigmoid(alpha * gate) * (up + 1)`. limit > 0 first clamps gate to (-inf, limit] and up to
    [-limit, limit].
    """

    kind: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"activation is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not self.gated and (self.kind == "swigluoai" or self.limit):
            raise ValueError(f"{self} is not gated; swigluoai and limit need gate and up")
        if not self.limit >= 0:  # NaN is not
            raise ValueError(f"limit is {self.limit}; it must be 0 (none) or more")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha}; it must be finite")

    @property
    def native(self) -> _native.Activation:
        result: _native.Activation = getattr(_native.Activation, self.kind)
        return result


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """All about a layer's experts but their weights.

    interleaved: gate and up alternate in `gate_up_proj` ([g0, u0, g1, u1, ...]), else all of gate come first.
    transposed: weights are [E, in, out], else [E, out, in]. isa: None is the machine's choice.
    """

    activation: Activation = Activation()
    interleaved: bool = False
    transposed: bool = False
    weight_format: str = "auto"
    isa: str | None = None

    @property
    def weights(self) -> int:
        """How many of a layer's tensors are weights, before its biases."""
        return 2

    def encode(self) -> str:
        """Return the spec as a string for an operator's schema."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def decode(text: str) -> ExpertsSpec:
        """Return the spec that `encode` wrote."""
        values = json.loads(text)
        return ExpertsSpec(**{**values, "activation": Activation(**values["activation"])})


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """All about linear layers with one input, but their weights. weights: how many there are. isa: as above."""

    weights: int = 1
    weight_format: str = "auto"
    isa: str | None = None


@dataclass(frozen=True, slots=True)
class LatentsSpec:
    """All about the weight that expands latents, but the weight. key_size: of what each of the heads makes keys of, the
    rest being values. isa: as above."""

    heads: int
    key_size: int
    weight_format: str = "auto"
    isa: str | None = None

    @property
    def weights(self) -> int:
        """How many of the tensors are weights: all."""
        return 1
