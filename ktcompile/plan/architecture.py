"""What a model is made of, before it is decided how its experts are stored: counts and sizes, no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ktcompile.plan.facts import ModelFacts, MoeLayerFacts


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The routed experts of one layer. layer: its index in the model, -1 where the name of the module has none.
    gated, biased: as for `ktcompile.quant.packed_size.ExpertShape`."""

    layer: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    biased: bool = False

    @property
    def parameters(self) -> int:
        """Parameters of all experts of the layer."""
        return self.num_experts * self._parameters_of_one

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        return self.top_k * self._parameters_of_one

    @property
    def _parameters_of_one(self) -> int:
        width = self.intermediate_size * (2 if self.gated else 1)
        biases = width + self.hidden_size if self.biased else 0
        return (width + self.intermediate_size) * self.hidden_size + biases


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What attention keeps of a sequence in one layer.

    bytes_per_token: keys and values. window: tokens of which they are kept at most; None: all. state_bytes: of the
    state of linear attention and the like, which does not grow.
    """

    bytes_per_token: int = 0
    window: int | None = None
    state_bytes: int = 0

    def __post_init__(self) -> None:
        if self.bytes_per_token < 0 or self.state_bytes < 0 or (self.window is not None and self.window < 0):
            raise ValueError(f"{self} has negative sizes")

    def bytes(self, context: int) -> int:
        """Return the bytes of a sequence of `context` tokens."""
        kept = context if self.window is None else min(context, self.window)
        return self.state_bytes + kept * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model.

    dtype_bytes: of an element that is not quantised. parameters: of the model, experts included. dense_bytes: all
    parameters and buffers that are not of routed experts, as they are held. dense_read_bytes, dense_flops_per_token:
    of the products with them (tables of embeddings are not read through; a head that shares one is).
    attention_flops: of a query with one key and value, over the layers that keep all tokens.
    stored_format: weight format of the experts in the checkpoint. stored_bytes: of the checkpoint, read off its
    files, or computed. notes: what the reader of the figures should know.
    """

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype_bytes: int
    parameters: int
    dense_bytes: int
    dense_read_bytes: int
    dense_flops_per_token: int
    attention_flops: int
    experts: tuple[RoutedExperts, ...]
    cache: tuple[LayerCache, ...]
    stored_format: str
    stored_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def expert_parameters(self) -> int:
        return sum(layer.parameters for layer in self.experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that take part in one token's products, and the tables of embeddings."""
        return self.parameters - self.expert_parameters + sum(layer.active_parameters for layer in self.experts)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one more token takes while it is within all windows."""
        return sum(layer.bytes_per_token for layer in self.cache)

    def cache_bytes(self, context: int) -> int:
        """Return the bytes of the cache of one sequence."""
        return sum(layer.bytes(context) for layer in self.cache)

    def cache_tokens(self, available: int, sequences: int) -> int | None:
        """Return the context for which `sequences` caches fit into `available` bytes; None: it has no limit."""
        if sum(layer.bytes_per_token for layer in self.cache if layer.window is None) == 0:
            return None if self.cache_bytes(1 << 30) * sequences <= available else 0
        low, high = 0, 1
        while self.cache_bytes(high) * sequences <= available:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.cache_bytes(middle) * sequences <= available
            low, high = (middle, high) if fits else (low, middle)
        return low

    def facts(self, expert_bytes: Callable[[RoutedExperts], int]) -> ModelFacts:
        """Return what placement knows of the model. expert_bytes: of one expert of a layer as it is packed."""
        layers = tuple(
            MoeLayerFacts(e.num_experts, e.top_k, e.hidden_size, e.intermediate_size, expert_bytes(e), e.gated)
            for e in self.experts
        )
        return ModelFacts(layers, self.dense_bytes, self.dense_flops_per_token, self.kv_bytes_per_token)
