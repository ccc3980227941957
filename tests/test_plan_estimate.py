"""Estimates: bytes add up, speeds follow the hardware, and what does not fit is said with what would."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktcompile.plan.advice import warnings
from ktcompile.plan.architecture import Architecture, LayerCache, RoutedExperts
from ktcompile.plan.cost import uniform_layer
from ktcompile.plan.estimate import (
    DEVICE_RESERVE,
    LOADING,
    RAM_RESERVE,
    Plan,
    Workload,
    estimate,
    predict,
)
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import PRESETS, Hardware

GB = 10**9
EXPERTS = RoutedExperts(layer=0, num_experts=64, top_k=8, hidden_size=2048, intermediate_size=1024)
BF16 = 2 * 3 * 2048 * 1024
MODEL = Architecture(
    name="model",
    model_type="test",
    num_layers=25,
    hidden_size=2048,
    vocab_size=50_000,
    dtype_bytes=2,
    parameters=24 * EXPERTS.parameters + 10**9,
    dense_bytes=2 * GB,
    dense_read_bytes=GB,
    dense_flops_per_token=GB,
    attention_flops=24 * 4 * 4096,
    experts=(EXPERTS,) * 24,
    cache=(LayerCache(1000),) * 12 + (LayerCache(1000, 128),) * 12 + (LayerCache(0, None, 5000),),
    stored_format="bf16",
    stored_bytes=2 * (24 * EXPERTS.parameters + 10**9),
)


def plan(hardware="4090-ddr5", bits=16, model=MODEL, **others):
    machine = PRESETS[hardware] if isinstance(hardware, str) else hardware
    return Plan(model, model.facts(lambda e: BF16 * bits // 16), machine, **others)


def with_memory(hardware, device=None, ram=None):
    if device == 0:
        hardware = replace(hardware, device=None, link=None)
    elif device is not None:
        hardware = replace(hardware, device=replace(hardware.device, memory_bytes=device))
    return hardware if ram is None else replace(hardware, cpu=replace(hardware.cpu, memory_bytes=ram))


def speed(found, kind="decode", tokens=1):
    return next(p.tokens_per_second for p in found.predictions if (p.kind, p.tokens) == (kind, tokens))


def test_bytes_are_where_they_were_put():
    found = estimate(plan(workload=Workload(1000, 2), fraction=0.25))
    cache = 2 * (12 * 1000 * 1000 + 12 * 128 * 1000 + 5000)
    experts = 24 * 64 * BF16
    assert found.resident == (16,) * 24
    assert (found.device.dense, found.device.experts, found.device.cache) == (2 * GB, experts // 4, cache)
    assert (found.ram.dense, found.ram.experts, found.ram.cache) == (0, experts * 3 // 4, 0)
    assert (found.device.reserve, found.ram.reserve) == (DEVICE_RESERVE, RAM_RESERVE)
    assert found.disk.used == MODEL.stored_bytes


def test_without_a_device_all_is_in_ram():
    found = estimate(plan(with_memory(PRESETS["laptop"], device=0, ram=16 * GB), bits=4))
    assert found.device is None and found.fits
    assert found.ram.dense == 2 * GB and found.ram.experts == 24 * 64 * BF16 // 4


def test_decoding_on_the_cpu_takes_as_long_as_its_bytes_take_to_be_read():
    hardware = with_memory(PRESETS["h100-xeon-amx"], device=0)
    cpu = hardware.cpu
    read = GB + MODEL.cache_bytes(4096) + 24 * 8 * BF16
    wanted = read / cpu.bandwidth + 25 * cpu.overhead + 24 * cpu.overhead
    assert 1 / speed(estimate(plan(hardware))) == pytest.approx(wanted)


def test_cold_experts_are_streamed_for_long_prompts_alone():
    layer = MoeLayerFacts(64, 8, 2048, 1024, BF16)
    hardware = PRESETS["4090-ddr5"]
    assert not uniform_layer(hardware, layer, 1, 16).streamed
    assert uniform_layer(hardware, layer, 4096, 16).streamed
    assert uniform_layer(hardware, layer, 4096, 64).copy == 0


def test_the_cache_that_fits_is_the_longest():
    found = estimate(plan(fraction=0.0))
    room = found.device.capacity - found.device.used + found.device.cache
    assert MODEL.cache_bytes(found.cache_tokens) <= room < MODEL.cache_bytes(found.cache_tokens + 1)


def test_a_cache_that_does_not_grow_has_no_limit():
    constant = replace(MODEL, cache=(LayerCache(0, None, 5000), LayerCache(100, 10)))
    assert constant.cache_tokens(GB, 1) is None
    assert constant.cache_tokens(5999, 1) == 0
    assert constant.cache_bytes(10**6) == 6000


MEMORY = st.integers(0, 200).map(lambda n: n * GB)


@given(
    st.sampled_from(sorted(PRESETS)),
    MEMORY,
    MEMORY.map(lambda n: n + 1),
    st.sampled_from([4, 8, 16]),
    st.integers(1, 100_000),
    st.integers(1, 16),
    st.none() | st.floats(0, 1),
)
def test_bytes_add_up_and_are_never_negative(name, device, ram, bits, context, batch, fraction):
    hardware = with_memory(PRESETS[name], device, ram)
    fraction = None if device == 0 else fraction
    wanted = plan(hardware, bits, workload=Workload(context, batch), fraction=fraction)
    found = estimate(wanted)
    tiers = [found.ram, found.disk, *([found.device] if found.device else [])]
    for tier in tiers:
        parts = (tier.dense, tier.experts, tier.cache, tier.workspace, tier.reserve)
        assert min(parts) >= 0 and sum(parts) == tier.used
        assert tier.capacity is None or tier.free == tier.capacity - tier.used
    memory = [t for t in tiers if t is not found.disk]
    assert sum(t.experts for t in memory) == wanted.facts.expert_bytes
    assert sum(t.dense for t in memory) == MODEL.dense_bytes
    assert sum(t.cache for t in memory) == batch * MODEL.cache_bytes(context)
    assert all(0 <= n <= 64 for n in found.resident)
    assert bool(found.predictions) == found.runs == all(t.fits for t in memory)
    for p in found.predictions:
        times = (p.dense_seconds, p.cpu_seconds, p.device_seconds, p.copy_seconds)
        assert min(times) >= 0 and math.isfinite(p.seconds) and max(times) <= p.seconds * (1 + 1e-9)
    assert found.load_peak >= found.ram.used - found.ram.reserve
    if found.runs:
        assert found.cache_tokens is None or found.cache_tokens >= context


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PRESETS)), MEMORY, MEMORY, MEMORY, MEMORY, st.sampled_from([4, 16]), st.integers(1, 8))
def test_more_memory_never_decodes_slower(name, device, more_device, ram, more_ram, bits, batch):
    wanted = Workload(4096, batch)
    less = estimate(plan(with_memory(PRESETS[name], device, ram + 1), bits, workload=wanted))
    machine = with_memory(PRESETS[name], device + more_device, ram + 1 + more_ram)
    more = estimate(plan(machine, bits, workload=wanted))
    if less.runs:
        assert more.runs
        assert speed(more, tokens=batch) >= speed(less, tokens=batch) * (1 - 1e-9)


@given(st.sampled_from(sorted(PRESETS)), st.floats(0, 1), st.integers(1, 4096))
def test_more_tokens_take_longer(name, fraction, tokens):
    wanted = plan(name, 4, fraction=fraction)
    placed = estimate(wanted)
    for kind in ("decode", "prefill"):
        one, two = (predict(wanted, placed, kind, n).seconds for n in (tokens, tokens + 1))
        assert two >= one * (1 - 1e-9)


def test_what_does_not_fit_is_said_with_what_would():
    machine = with_memory(PRESETS["laptop"], ram=13 * GB)
    formats = {name: MODEL.facts(lambda e, b=bits: BF16 * b // 16) for name, bits in (("int8", 8), ("int4", 4))}
    wanted = plan(machine)
    (text,) = warnings(wanted, estimate(wanted), formats)
    assert "more of RAM" in text and "int8 fits (9.7 GB of experts)" in text
    tight = plan(with_memory(machine, ram=6 * GB))
    assert "int4 fits" in warnings(tight, estimate(tight), formats)[0]
    none = plan(with_memory(machine, device=0, ram=3 * GB))
    assert "a smaller model" in warnings(none, estimate(none), formats)[0]


def test_a_fraction_and_a_context_that_are_too_large():
    wanted = plan("4090-ddr5", fraction=1.0, workload=Workload(64))
    fitting = plan("4090-ddr5", 8, fraction=1.0, workload=Workload(4096))
    assert estimate(fitting).device.experts == fitting.facts.expert_bytes
    text = warnings(plan("laptop", fraction=1.0), estimate(plan("laptop", fraction=1.0)), {})[0]
    assert "more of the device" in text and "device-expert-fraction of 0.2" in text
    assert estimate(wanted).runs
    long = plan("4090-ddr5", 4, workload=Workload(10**8))
    assert "a context of" in warnings(long, estimate(long), {})[0]


def test_loading_and_disk_are_checked():
    wanted = plan(with_memory(PRESETS["laptop"], ram=12 * GB), 8, disk_bytes=GB)
    found = estimate(wanted)
    loading, disk = warnings(wanted, found, {})
    assert found.runs and not found.loads and not found.fits
    assert "loading takes" in loading and "packed in RAM before a device gets its part" in loading
    assert "the disk only 1.0 GB" in disk


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_loading_takes_what_is_packed_and_what_is_being_read(bits):
    wanted = plan("4090-ddr5", bits, fraction=0.5)
    kept = wanted.facts.expert_bytes + MODEL.dense_bytes
    assert estimate(wanted).load_peak == kept + LOADING
    assert estimate(replace(wanted, quantized=True)).load_peak == kept + 64 * BF16 // 2
    small = replace(MODEL, experts=(replace(EXPERTS, num_experts=8),) * 24)
    found = plan("4090-ddr5", bits, model=small, fraction=0.5)
    assert estimate(found).load_peak == found.facts.expert_bytes + MODEL.dense_bytes + 8 * BF16 * 3 // 2


def test_where_nothing_fits_the_device_is_filled_first():
    found = estimate(plan(with_memory(PRESETS["laptop"], ram=4 * GB)))
    assert found.device.fits and not found.ram.fits
    assert found.device.free < 24 * BF16
    assert found.predictions == ()


def test_a_device_without_room_is_not_used():
    wanted = plan(with_memory(PRESETS["h100-xeon-amx"], device=2 * GB))
    found = estimate(wanted)
    assert found.device is None and found.fits
    assert "without any experts it needs 3." in warnings(wanted, found, {})[0]


def test_what_cannot_be_is_refused():
    alone = Hardware("alone", PRESETS["laptop"].cpu)
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        plan(fraction=1.5)
    with pytest.raises(ValueError, match="alone has no device"):
        plan(alone, fraction=0.5)
    with pytest.raises(ValueError, match="batch is 0"):
        Workload(1, 0)
    with pytest.raises(ValueError, match="negative"):
        LayerCache(-1)


def test_a_model_without_experts_is_estimated():
    dense = replace(MODEL, experts=())
    found = estimate(plan(model=dense))
    assert found.device is not None and found.ram.experts == 0 and found.resident == ()
    assert speed(found) > 0
