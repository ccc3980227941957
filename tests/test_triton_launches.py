"""What a call of experts on a GPU asks of the CPU: launches of kernels, and operators of torch, which launch too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from ktcompile.ops import Activation
from ktcompile.ops.triton import device_experts, moe
from ktcompile.ops.triton.launch import Launch
from ktcompile.ops.triton.routing import CHUNK
from ktcompile.runtime.cuda import CudaProducts
from ktcompile.runtime.streams import CpuStreams

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 32, 16, 2
PRODUCTS = ["first_product_kernel", "second_product_kernel"]
# These allocate or ask; nothing is launched for them.
WITHOUT_A_LAUNCH = {"aten.empty.memory_format", "aten.new_empty.default", "aten.promote_types.default"}


class Operators(TorchDispatchMode):
    """Counts operators of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(operator)] += 1
        return operator(*args, **kwargs or {})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched, of which none runs."""
    names: list[str] = []
    monkeypatch.setattr(Launch, "run", lambda launch: names.append(launch.kernel.__name__))
    return names


def arguments(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    shapes = ((EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, HIDDEN, INTERMEDIATE))
    experts = device_experts(*(torch.zeros(s) for s in shapes), Activation("silu"), device=torch.device("cpu"))
    ids = torch.zeros(tokens, TOP_K, dtype=torch.int64)
    return torch.zeros(tokens, HIDDEN), ids, torch.zeros(tokens, TOP_K, dtype=dtype), experts


def operators(call: Callable[[], Any]) -> Counter[str]:
    with Operators() as seen:
        call()
    return seen.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "routing"), [(1, ["route_kernel"]), (CHUNK, ["count_kernel", "route_kernel"])])
def test_a_call(launched: list[str], tokens: int, routing: list[str], dtype: torch.dtype) -> None:
    places, given = torch.arange(EXPERTS, dtype=torch.int32), arguments(tokens, dtype)
    counts = operators(lambda: moe(*given, places))
    assert launched == [*routing, *PRODUCTS, "weighted_sum_kernel"]
    assert set(counts) <= WITHOUT_A_LAUNCH
    assert counts.total() <= 5 + len(routing)


@pytest.mark.parametrize("selections", [1, 3])
def test_a_call_of_the_device(launched: list[str], selections: int) -> None:
    places, (x, ids, weights, experts) = torch.arange(EXPERTS, dtype=torch.int32), arguments(1)

    def call() -> None:
        products = CudaProducts(experts, CpuStreams(), x, ids, weights)
        for _ in range(selections):
            products.add(places)
        products.result()

    counts = operators(call)
    assert launched == ["route_kernel", *PRODUCTS] * selections + ["weighted_sum_kernel"]
    assert set(counts) <= WITHOUT_A_LAUNCH
    assert counts.total() <= 4 + 3 * selections
