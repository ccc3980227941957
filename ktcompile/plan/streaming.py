"""From how many tokens on cold experts are copied to the device for a call, instead of computed on the CPU."""

from __future__ import annotations

from ktcompile.plan.cost import uniform_layer
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import Hardware

_MOST_TOKENS = 10**6


def streaming_threshold(hardware: Hardware, layer: MoeLayerFacts, resident: int) -> int | None:
    """Return the least tokens of a call from which on it is faster to stream all cold experts through the device than
    to compute them on the CPU beside what the device has; None: it never is, up to a million tokens.

    resident: experts of the layer that are on the device. Tokens are taken to choose experts at random, as in an
    estimate. ValueError: the layer has fewer experts than `resident`.
    """
    if not 0 <= resident <= layer.num_experts:
        raise ValueError(f"resident is {resident}; the layer has {layer.num_experts} experts")

    def faster(tokens: int) -> bool:
        return bool(uniform_layer(hardware, layer, tokens, resident).streamed)

    if not faster(_MOST_TOKENS):
        return None
    # From above, so that what is faster by chance at a few tokens (a layer's overheads) and then slower does not count.
    low, high = 0, _MOST_TOKENS
    while high > 1 and faster(high // 2):
        high //= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high
