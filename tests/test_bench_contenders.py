"""Who takes part, and with how much memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.kernels_reports import contender

from ktcompile.bench import contenders as who
from ktcompile.bench import roofline
from ktcompile.bench.shapes import PRESETS, MoeShape
from ktcompile.machine import machine
from ktcompile.quant import FORMATS

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture(autouse=True)
def known_cache(monkeypatch):
    monkeypatch.setattr(roofline, "cache_bytes", lambda: 32 * MIB)


def test_every_format_on_every_isa():
    found = who.our_contenders(FORMATS, machine().isas, threads=2)
    assert len({c.name for c in found}) == len(FORMATS) * len(machine().isas)
    assert all(c.ours and c.error_limit >= 2 * FORMATS[c.weight_format].error_budget for c in found)
    assert len(who.our_contenders(["bf16", "bf16"], ["scalar", "scalar"], 1)) == 1
    with pytest.raises(ValueError, match="'int3'"):
        who.our_contenders(["int3"], ["scalar"], 1)


def test_int8_rows_are_bounded_by_int8_arithmetic():
    assert roofline.arithmetic_of("int8_dyn", "avx2") == "int8/avx2"
    assert roofline.arithmetic_of("int4_dyn", "avx512") == "int8/avx512"
    assert roofline.arithmetic_of("int8", "avx2") == "float/avx2"
    peers = who.peer_contenders(["kt-kernel-int4", "transformers-eager"], threads=2, kt_threads=[1])
    assert [c.arithmetic.split("/")[0] for c in peers] == ["int8", "float"]
    assert [c.threads for c in peers] == [1, 2]


def test_kt_kernel_runs_with_each_thread_count():
    peers = who.peer_contenders(["kt-kernel-bf16", "transformers-eager"], threads=2, kt_threads=[1, 2, 1])
    assert [(c.name, c.threads) for c in peers] == [
        ("kt-kernel-bf16/1", 1),
        ("kt-kernel-bf16/2", 2),
        ("transformers-eager", 2),
    ]
    assert [len(group) for group in who.processes(peers)] == [1, 1, 1]
    shape = PRESETS["mixtral-8x7b"]
    both, one = (who.needed_bytes(c, shape, 1) for c in (peers[:2], peers[:1]))
    assert both - one > 2 * 8 * shape.expert_weights


def test_peers_are_chosen_by_name(monkeypatch):
    monkeypatch.setattr(who.importlib.util, "find_spec", lambda name: None if name == "kt_kernel" else name)
    assert who.choose_peers(["none"]) == ((), {})
    there, absent = who.choose_peers(["all"])
    assert there == ("transformers-eager", "transformers-grouped_mm")
    assert set(absent.values()) == {"not installed"} and len(absent) == 4
    assert who.choose_peers(["transformers-eager"]) == (("transformers-eager",), {})
    with pytest.raises(ValueError, match="'kt-kernel-int4' is not installed"):
        who.choose_peers(["kt-kernel-int4"])
    with pytest.raises(ValueError, match="'vllm' is unknown; there are all, none, transformers-eager"):
        who.choose_peers(["vllm"])


def test_processes_share_weights_but_not_crashes():
    ours = who.our_contenders(["bf16", "fp32"], ["scalar"], 1)
    peers = who.peer_contenders(who.PEERS, 1, [1])
    groups = [{c.name for c in group} for group in who.processes((*ours, *peers))]
    assert sorted(map(len, groups)) == [1, 1, 1, 1, 2, 2]
    assert {c.name for c in ours} in groups
    assert {"transformers-eager", "transformers-grouped_mm"} in groups


@pytest.mark.parametrize(("preset", "layers"), [("qwen3-30b-a3b", 1), ("odd-small", 6), ("tiny", 16)])
def test_layers_together_are_several_times_the_caches(preset, layers):
    shape = PRESETS[preset]
    (one,) = who.with_layers([contender("a")], shape, 32 * MIB)
    assert one.layers == layers
    cached = layers * shape.num_experts * shape.expert_weights * 2 < 64 * MIB
    assert who.fits_in_cache(one, shape, 32 * MIB) == cached == (preset == "tiny")


def test_memory_counts_shared_weights_once():
    shape = PRESETS["mixtral-8x7b"]
    weights = 8 * shape.expert_weights
    one, bare = (who.needed_bytes(c, shape, 1) for c in ([contender("a", variant="bf16")], []))
    assert 2 * weights < one - bare < 2 * weights + GIB
    other_isa = contender("b", variant="bf16", isa="avx2")
    assert who.needed_bytes([contender("a", variant="bf16"), other_isa], shape, 1) == one
    int8 = contender("c", variant="int8", bytes_per_weight=1)
    assert who.needed_bytes([contender("a", variant="bf16"), int8], shape, 1) == one + weights


def test_experts_are_cut_to_what_is_useful_and_to_what_fits():
    contenders = [contender("a")]

    def experts(preset, free):
        return who.fit_experts(contenders, PRESETS[preset], 512, free).num_experts

    assert experts("qwen3-30b-a3b", 1000 * GIB) == 64
    assert experts("mixtral-8x7b", 1000 * GIB) == 8
    assert experts("deepseek-v3", 1000 * GIB) == 64
    assert experts("deepseek-v3", 4 * GIB) == 32
    assert experts("mixtral-8x7b", 3 * GIB) == 6
    with pytest.raises(
        ValueError, match=r"8 experts of 7168 x 2048 need about .* GiB, .* use fewer --formats or --peers"
    ):
        experts("deepseek-v3", GIB)
    with pytest.raises(ValueError, match=r"use fewer --experts, --formats or --peers"):
        who.check_fit(contenders, replace(PRESETS["deepseek-v3"], num_experts=64), 1, GIB)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="top_k is 5, more than the 4 experts"):
        MoeShape(4, 5, 64, 64)
    with pytest.raises(ValueError, match="hidden_size is 0"):
        MoeShape(4, 2, 0, 64)
