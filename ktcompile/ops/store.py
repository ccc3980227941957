"""Packed layers by the tensors that they were packed from: each set of weights is packed once."""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ktcompile import _native
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.latents import PackedLatents
from ktcompile.ops.linear import PackedLinear
from ktcompile.ops.spec import ExpertsSpec, LatentsSpec, LinearSpec
from ktcompile.quant import native_dtype

Key = tuple[object, ...]
Weights = Sequence[torch.Tensor | None]


class Spec(Protocol):
    """All about a layer but its tensors; hashable. Its first `weights` tensors are weights, the others biases."""

    @property
    def weights(self) -> int: ...


class Packed(Protocol):
    """A packed layer."""

    def unpack_into(self, *weights: torch.Tensor) -> None:
        """Write the weights into tensors of the shapes that they were packed from."""
        ...


S = TypeVar("S", bound=Spec)
P = TypeVar("P", bound=Packed)


@dataclass(slots=True)
class _Entry(Generic[P]):
    packed: P
    versions: tuple[int, ...]
    storages: tuple[StorageWeakRef, ...]
    taken: bool = False

    def stale(self) -> bool:
        """Return whether a tensor is gone, so that others may stand where it was."""
        return any(s.expired() for s in self.storages)  # type: ignore[no-untyped-call]


class WeightStore(Generic[S, P]):
    """Finds the packed form of weights, packing them when they are new or were written to since.

    A tensor is known by its storage and by where in it the tensor lies, so that a detached tensor or the tensor
    that a compiled graph receives is the same as the module's parameter.
    """

    def __init__(self, pack: Callable[[Weights, S], P]) -> None:
        self._do_pack = pack
        self._entries: dict[Key, _Entry[P]] = {}
        self._lock = threading.RLock()

    def get(self, weights: Weights, spec: S) -> P:
        """Return the packed form of weights, and biases that may be None. ValueError: they were taken for another
        spec."""
        key = _key(weights, spec)
        packed = self._find(key, weights)
        if packed is not None:
            return packed
        with self._lock:  # another thread may have packed them meanwhile
            return self._find(key, weights) or self._pack(key, weights, spec).packed

    def take(self, weights: Weights, spec: S) -> P:
        """Pack the weights and free their storage. The tensors then read as NaN, of the same shape and strides;
        writing to them, as load_state_dict does, is allowed and makes the next `get` pack what was written."""
        with self._lock:
            packed = self.get(weights, spec)
            if self.is_taken(weights, spec):
                return packed
            del self._entries[_key(weights, spec)]
            for weight in weights[: spec.weights]:
                assert weight is not None
                weight.data = _nan_like(weight)
            entry = _Entry(packed, versions_of(weights), storages_of(weights), taken=True)
            self._entries[_key(weights, spec)] = entry
            self._forget_with(weights[0], _key(weights, spec))
            return packed

    def find_all(self, weights: Weights) -> list[P]:
        """Return the packed forms that there are of the weights as they are now, whatever their specs."""
        places, versions = places_of(weights), versions_of(weights)
        found = [e for k, e in list(self._entries.items()) if k[:-1] == places]
        return [e.packed for e in found if e.versions == versions and not e.stale()]

    def is_taken(self, weights: Weights, spec: S) -> bool:
        """Return whether the weights exist only packed."""
        entry = self._entries.get(_key(weights, spec))
        return entry is not None and entry.taken and entry.versions == versions_of(weights)

    def _find(self, key: Key, weights: Weights) -> P | None:
        entry = self._entries.get(key)
        if entry is not None and entry.versions == versions_of(weights) and not entry.stale():
            return entry.packed
        return None

    def _pack(self, key: Key, weights: Weights, spec: S) -> _Entry[P]:
        for stale in [k for k, e in list(self._entries.items()) if e.stale()]:
            self._entries.pop(stale, None)
        self._check_not_taken(key, weights)
        known = self._entries.get(key)
        if known is not None and known.taken:
            _restore(known, weights, spec.weights)
        entry = _Entry(self._do_pack(weights, spec), versions_of(weights), storages_of(weights))
        self._entries[key] = entry
        if known is None:
            assert weights[0] is not None
            self._forget_with(weights[0].untyped_storage(), key)
        return entry

    def _check_not_taken(self, key: Key, weights: Weights) -> None:
        for other, entry in list(self._entries.items()):
            if entry.taken and other[:-1] == key[:-1] and other != key and entry.versions == versions_of(weights):
                raise ValueError(
                    f"the weights were taken and exist only packed, for {other[-1]}; to use them for {key[-1]}, load"
                    " the model's state_dict() into it first"
                )

    def _forget_with(self, source: object, key: Key) -> None:
        """Drop the packed form once what it came from is gone."""
        weakref.finalize(source, self._entries.pop, key, None)


def _restore(taken: _Entry[P], weights: Weights, count: int) -> None:
    """Put back the taken weights that were not written to: one of the others was, or a bias."""
    sources = [w for w in weights[:count] if w is not None]
    unpacked = [torch.empty_like(w) for w in sources]
    taken.packed.unpack_into(*unpacked)
    for weight, version, values in zip(sources, taken.versions, unpacked, strict=False):
        if weight._version == version:
            weight.data.copy_(values)


def _nan_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of NaN with the shape and strides of `tensor`, which takes no memory."""
    length = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = length * tensor.element_size()
    address = _native.map_nan(size, native_dtype(tensor.dtype, "the weight"))
    memory = (ctypes.c_char * size).from_address(address)
    unmap = weakref.finalize(memory, _native.unmap_nan, address, size)
    unmap.atexit = False  # whoever still holds the tensor then may read it
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _key(weights: Weights, spec: Spec) -> Key:
    return (*places_of(weights), spec)


def places_of(weights: Weights) -> Key:
    """Return where tensors lie, which tensors that a compiled graph receives in their place share."""
    return tuple(
        (w.untyped_storage()._cdata, w.storage_offset(), w.shape, w.stride()) for w in weights if w is not None
    )


def versions_of(weights: Weights) -> tuple[int, ...]:
    """Return numbers that change when a tensor is written to."""
    return tuple(0 if w.is_inference() else w._version for w in weights if w is not None)


def storages_of(weights: Weights) -> tuple[StorageWeakRef, ...]:
    """Return weak references to the memory of tensors, in whose place others may lie once it is gone."""
    return tuple(StorageWeakRef(w.untyped_storage()) for w in weights if w is not None)  # type: ignore[no-untyped-call]


def watch_of(args: Sequence[Any], positions: Sequence[int]) -> tuple[_native.Watch, tuple[StorageWeakRef, ...]]:
    """Return what sees whether some arguments of a call are those of another, and what must be kept for it: weak
    references to their storages, so that no other has the address of one."""
    watch, storages = _native.Watch(), storages_of([args[i] for i in positions])
    for i, storage in zip(positions, storages, strict=True):
        watch.add(i, args[i], storage.cdata)
    return watch, storages


@functools.cache
def expert_store() -> WeightStore[ExpertsSpec, PackedExperts]:
    """Return the store of this process, of (gate_up_proj, down_proj, gate_up_bias, down_bias)."""
    return WeightStore(_pack_experts)


@functools.cache
def linear_store() -> WeightStore[LinearSpec, PackedLinear]:
    """Return the store of this process, of the weights of linear layers with one input, then their biases."""
    return WeightStore(_pack_linear)


@functools.cache
def latents_store() -> WeightStore[LatentsSpec, PackedLatents]:
    """Return the store of this process, of the weights that expand latents."""
    return WeightStore(_pack_latents)


def _pack_experts(weights: Weights, spec: ExpertsSpec) -> PackedExperts:
    gate_up, down, gate_up_bias, down_bias = weights
    assert gate_up is not None and down is not None
    return PackedExperts(gate_up, down, gate_up_bias, down_bias, spec)


def _pack_linear(weights: Weights, spec: LinearSpec) -> PackedLinear:
    parts = [w for w in weights[: spec.weights] if w is not None]
    biases = weights[spec.weights :]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([p.new_zeros(len(p)) if b is None else b for p, b in zip(parts, biases, strict=True)])
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    return PackedLinear(weight.detach(), bias, spec.weight_format, spec.isa)


def _pack_latents(weights: Weights, spec: LatentsSpec) -> PackedLatents:
    (weight,) = weights
    assert weight is not None
    return PackedLatents(weight.detach(), spec)
