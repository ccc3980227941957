"""The store of packed experts: each set of weights is packed once, and never used after it was written to."""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from helpers.compare import assert_exact, assert_reduction
from helpers.layers import Layer, random_inputs, random_layer
from helpers.processes import run_python
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule
from torch import nn

from ktcompile import ops
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.store import WeightStore, expert_store
from ktcompile.runtime.take import take_weights

SIZES = (3, 10, 6)
NAMES = ("gate_up_proj", "down_proj")
INPUTS = random_inputs(4, sizes=SIZES, top_k=2)


def new_store() -> WeightStore:
    """Return a store of experts that no other test uses."""
    return WeightStore(expert_store()._do_pack)


class Experts(nn.Module):
    """A module that owns a layer's weights, as a model's does."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(layer.gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(layer.down, requires_grad=False)
        self.gate_up_bias = None if layer.gate_up_bias is None else nn.Parameter(layer.gate_up_bias)
        self.down_bias = None if layer.down_bias is None else nn.Parameter(layer.down_bias)

    @property
    def weights(self) -> list[torch.Tensor | None]:
        return [self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias]


@dataclass
class Subject:
    """A module, what its weights ought to be, and how they were last packed."""

    module: Experts
    layer: Layer
    packed: PackedExperts | None = None
    taken: bool = False


def small_layer(seed: int = 0, dtype: torch.dtype = torch.float32, **kinds: bool) -> Layer:
    return random_layer(dtype, seed=seed, sizes=SIZES, **kinds)


def owned(layer: Layer) -> Experts:
    """Return a module with weights of its own."""
    return Experts(copy.deepcopy(layer))


def check_result(packed: PackedExperts, layer: Layer) -> None:
    assert_reduction(ops.moe(*INPUTS, packed), layer.reference(*INPUTS))
    assert_exact(ops.moe(*INPUTS, packed), ops.moe(*INPUTS, layer.pack()))


class StoreMachine(RuleBasedStateMachine):
    """All that a program may do to weights, in any order."""

    subjects = Bundle("subjects")

    @initialize()
    def begin(self) -> None:
        self.store = new_store()

    @rule(
        target=subjects,
        seed=st.integers(0, 9),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        bias=st.booleans(),
        interleaved=st.booleans(),
        transposed=st.booleans(),
    )
    def create(self, seed, dtype, bias, interleaved, transposed):
        layer = small_layer(seed, dtype, bias=bias, interleaved=interleaved, transposed=transposed)
        return Subject(owned(layer), layer)

    @rule(subject=subjects)
    def get(self, subject):
        packed = self.store.get(subject.module.weights, subject.layer.spec)
        if subject.packed is not None:
            assert packed is subject.packed, "packed again without need"
        subject.packed = packed
        check_result(packed, subject.layer)

    @rule(subject=subjects)
    def get_by_other_tensors_of_the_same_storage(self, subject):
        weights = [None if w is None else w.detach() for w in subject.module.weights]
        packed = self.store.get(weights, subject.layer.spec)
        if subject.packed is not None:
            assert packed is subject.packed
        subject.packed = packed
        check_result(packed, subject.layer)

    @rule(subject=subjects, seed=st.integers(10, 99), which=st.sampled_from(["both", "gate_up", "down"]))
    def write(self, subject, seed, which):
        new = small_layer(seed, subject.layer.gate_up.dtype, transposed=subject.layer.spec.transposed)
        with torch.no_grad():
            if which in ("both", "gate_up"):
                subject.module.gate_up_proj.copy_(new.gate_up)
                subject.layer = replace(subject.layer, gate_up=new.gate_up)
            if which in ("both", "down"):
                subject.module.down_proj.copy_(new.down)
                subject.layer = replace(subject.layer, down=new.down)
        subject.packed = None

    @rule(subject=subjects)
    def write_a_bias(self, subject):
        if subject.layer.down_bias is None:
            return
        with torch.no_grad():
            subject.module.down_bias.add_(1)
        subject.layer = replace(subject.layer, down_bias=subject.layer.down_bias + 1)
        subject.packed = None

    @rule(subject=subjects)
    def take(self, subject):
        before = [(w.shape, w.stride(), w.dtype) for w in subject.module.weights[:2]]
        packed = take_weights(self.store, [subject.module] * 2, subject.module.weights, subject.layer.spec)
        if subject.packed is not None:
            assert packed is subject.packed
        subject.packed, subject.taken = packed, True
        assert [(w.shape, w.stride(), w.dtype) for w in subject.module.weights[:2]] == before
        for weight in subject.module.weights[:2]:
            assert weight.isnan().all()
        check_result(packed, subject.layer)

    @rule(subject=subjects)
    def save(self, subject):
        state = subject.module.state_dict()
        assert_exact(state["gate_up_proj"], subject.layer.gate_up)
        assert_exact(state["down_proj"], subject.layer.down)

    @rule(subject=subjects, seed=st.integers(100, 199))
    def load(self, subject, seed):
        new = small_layer(seed, subject.layer.gate_up.dtype, transposed=subject.layer.spec.transposed)
        state = subject.module.state_dict() | {"gate_up_proj": new.gate_up, "down_proj": new.down}
        subject.module.load_state_dict(state)
        subject.layer = replace(subject.layer, gate_up=new.gate_up, down=new.down)
        subject.packed = None

    @rule(subject=consumes(subjects))
    def delete(self, subject):
        packed = None if subject.packed is None else weakref.ref(subject.packed)
        subject.module = subject.packed = None  # no cycle holds them: no collection is needed
        assert packed is None or packed() is None, "the packed form outlives its parameters"


StoreMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStore = StoreMachine.TestCase


def test_specs_are_told_apart():
    store, module, layer = new_store(), owned(small_layer()), small_layer()
    other = replace(layer, spec=replace(layer.spec, weight_format="bf16"))
    check_result(store.get(module.weights, layer.spec), layer)
    check_result(store.get(module.weights, other.spec), other)
    assert store.get(module.weights, layer.spec) is not store.get(module.weights, other.spec)


def test_taken_weights_serve_one_spec_until_they_are_loaded_again():
    store, module, layer = new_store(), owned(small_layer()), small_layer()
    other = replace(layer, spec=replace(layer.spec, weight_format="fp16"))
    take_weights(store, [module] * 2, module.weights, layer.spec)
    for use in (store.get, store.take):
        with pytest.raises(ValueError, match=r"the weights were taken and exist only packed, for .*'auto'"):
            use(module.weights, other.spec)
    check_result(store.get(module.weights, layer.spec), layer)
    module.load_state_dict(module.state_dict())
    check_result(store.get(module.weights, other.spec), other)


def test_parts_of_one_storage_are_told_apart():
    store, layers = new_store(), [small_layer(seed) for seed in (1, 2)]
    gate_up, down = (torch.stack([getattr(layer, n) for layer in layers]) for n in ("gate_up", "down"))
    for n, layer in enumerate(layers):
        check_result(store.get([gate_up[n], down[n], None, None], layer.spec), layer)


def test_layouts_of_one_storage_are_told_apart():
    store, layer = new_store(), random_layer(sizes=(3, 8, 4))
    flat = layer.gate_up.reshape(-1)
    other = replace(layer, gate_up=flat.view(3, 8, 8).mT)  # the same place, other strides
    inputs = random_inputs(4, sizes=(3, 8, 4), top_k=2)
    for each in (layer, other):
        got = ops.moe(*inputs, store.get(each.weights, each.spec))
        assert_reduction(got, each.reference(*inputs))


def test_tensors_that_are_no_parameters():
    store, layer = new_store(), small_layer()
    weights = [t.clone() for t in layer.weights[:2]] + [None, None]
    packed = weakref.ref(store.get(weights, layer.spec))
    assert store.get([None if t is None else t.detach() for t in weights], layer.spec) is packed()
    del weights
    gc.collect()
    assert packed() is None


def test_memory_that_is_used_again_is_not_taken_for_the_old_weights():
    store = new_store()
    for seed in range(50):
        layer = small_layer(seed)
        module = owned(layer)  # most likely where the last one was
        check_result(store.get(module.weights, layer.spec), layer)


def test_many_threads_pack_once():
    store, layer = new_store(), small_layer()
    module = owned(layer)
    start, found = threading.Barrier(4), []

    def get() -> None:
        start.wait()
        found.append(store.get(module.weights, layer.spec))

    callers = [threading.Thread(target=get) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4 and len(set(map(id, found))) == 1


def test_take_frees_the_source():
    store, layer = new_store(), small_layer()
    module = owned(layer)
    storages = [weakref.ref(w.untyped_storage()) for w in module.weights[:2]]
    take_weights(store, [module] * 2, module.weights, layer.spec)
    gc.collect()
    assert all(s() is None for s in storages)


def test_a_write_to_one_taken_weight_keeps_the_other():
    store, layer, new = new_store(), small_layer(), small_layer(5)
    module = owned(layer)
    take_weights(store, [module] * 2, module.weights, layer.spec)
    module.load_state_dict({"down_proj": new.down}, strict=False)
    changed = replace(layer, down=new.down)
    state = module.state_dict()
    assert_exact(state["gate_up_proj"], layer.gate_up)
    assert_exact(state["down_proj"], new.down)
    check_result(store.get(module.weights, layer.spec), changed)


def test_state_dict_after_loading_is_what_was_loaded():
    store, layer, new = new_store(), small_layer(), small_layer(5)
    module = owned(layer)
    take_weights(store, [module] * 2, module.weights, layer.spec)
    module.load_state_dict({"gate_up_proj": new.gate_up, "down_proj": new.down})
    state = module.state_dict()
    assert_exact(state["gate_up_proj"], new.gate_up)
    assert_exact(state["down_proj"], new.down)


def test_state_dict_after_new_data_were_set_is_what_was_set():
    store, layer, new = new_store(), small_layer(), small_layer(5)
    module = owned(layer)
    take_weights(store, [module] * 2, module.weights, layer.spec)
    module.gate_up_proj.data = new.gate_up
    assert_exact(module.state_dict()["gate_up_proj"], new.gate_up)
    assert_exact(module.state_dict()["down_proj"], layer.down)


def test_state_dict_of_a_part_of_a_model_has_its_prefix():
    store, layer = new_store(), small_layer()
    model = nn.Sequential(nn.Linear(2, 2), owned(layer))
    take_weights(store, [model[1]] * 2, model[1].weights, layer.spec)
    assert_exact(model.state_dict()["1.gate_up_proj"], layer.gate_up)
    assert_exact(model[1].down_proj, torch.full_like(layer.down, math.nan))


def test_only_parameters_of_a_module_can_be_taken():
    layer = small_layer()
    with pytest.raises(ValueError, match="weights='take' needs weights that are parameters of Experts"):
        take_weights(new_store(), [owned(layer)] * 2, layer.weights, layer.spec)
    assert layer.gate_up.isfinite().all()


def test_taken_weights_can_be_read_until_the_very_end():
    run_python(
        """
        import atexit, torch
        from torch import nn
        from ktcompile.ops.spec import ExpertsSpec
        from ktcompile.ops.store import expert_store

        @atexit.register
        def last():
            assert parameters[0].isnan().all() and parameters[1].isnan().all()
            print("read")

        parameters = [nn.Parameter(torch.randn(2, 8, 4)), nn.Parameter(torch.randn(2, 4, 4))]
        expert_store().take([*parameters, None, None], ExpertsSpec())
        """
    )
