"""The operators of a layer whose experts lie on two sides.

`kt::moe_submit` begins the CPU's part and returns a ticket at once; `kt::moe_resident` computes the device's part;
`kt::moe_wait` adds the CPU's. Each takes what the one before it returned, so that no compiler changes their order, and
the hidden states, so that none overwrites them before the end. The ticket is on the CPU, wherever the other tensors
are. Which experts are where is asked when a layer is submitted and holds for its ticket: it is data, so that no graph
changes when experts move.

Shape suffixes: T tokens, K top_k, H hidden_size.
"""

from __future__ import annotations

import itertools
import threading
from typing import Protocol

import torch

from ktcompile.ops.experts import from_handle
from ktcompile.ops.library import BETWEEN_CUDA_GRAPHS, LIBRARY, register_without_backward

for _schema in (
    "moe_submit(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor experts) -> Tensor",
    "moe_resident(Tensor hidden_states, Tensor topk_weights, Tensor ticket) -> Tensor",
    "moe_wait(Tensor hidden_states, Tensor resident, Tensor ticket) -> Tensor",
):
    LIBRARY.define(_schema, tags=BETWEEN_CUDA_GRAPHS)


class Submitted(Protocol):
    """One call of a split layer, under way."""

    def resident(self, x_TH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Return the device's part."""
        ...

    def finish(self, resident_TH: torch.Tensor) -> torch.Tensor:
        """Return the sum of both parts once the CPU's is there."""
        ...

    def abandon(self) -> None:
        """End the call without a result."""
        ...


class SplitLayer(Protocol):
    """A layer with experts on both sides."""

    def submit(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Submitted: ...

    def fetch(self, expert: int) -> None:
        """Let the CPU have an expert's weights."""
        ...


_under_way: dict[int, Submitted] = {}
_tickets = itertools.count(1)
_latest = threading.local()  # tickets: of this thread, by layer


def _submit(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    experts = from_handle(handle)
    layer = experts.split
    if layer is None:
        raise ValueError(f"{experts} are all the CPU's; they have no device's part")
    tickets: dict[int, int] = _latest.__dict__.setdefault("tickets", {})
    # A thread that submits a layer again has left the call before: what ran between failed.
    left = _under_way.pop(tickets.get(experts.number, 0), None)
    if left is not None:
        left.abandon()
    number = tickets[experts.number] = next(_tickets)
    _under_way[number] = layer.submit(x_TH, ids_TK, weights_TK)
    return torch.tensor([number], dtype=torch.int64)


def _resident(x_TH: torch.Tensor, weights_TK: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    call = _under_way[int(ticket)]
    try:
        return call.resident(x_TH, weights_TK)
    except BaseException:
        _under_way.pop(int(ticket)).abandon()
        raise


def _wait(x_TH: torch.Tensor, resident_TH: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    return _under_way.pop(int(ticket)).finish(resident_TH)


@torch.library.register_fake("kt::moe_submit", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _submit_fake(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return handle.new_empty(1)


@torch.library.register_fake("kt::moe_resident", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _resident_fake(x: torch.Tensor, weights: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("kt::moe_wait", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _wait_fake(x: torch.Tensor, resident: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


for _name, _function in (("moe_submit", _submit), ("moe_resident", _resident), ("moe_wait", _wait)):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _function, _key)
    register_without_backward(_name)
