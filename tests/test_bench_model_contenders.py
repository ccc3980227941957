"""Who runs a whole model, what each must read, and who is in memory with whom."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from helpers.model_reports import MODEL, OURS, PEER, THIRD, contender

from ktcompile.bench.model.contenders import ALL, DEFAULT, choose, groups
from ktcompile.bench.model.demand import Work, demand
from ktcompile.bench.model.formats import formats_of
from ktcompile.machine import machine

GIB = 1 << 30


@pytest.fixture
def python(tmp_path):
    """Return a function that writes a program which has these packages, or which is no Python."""

    def make(*packages, status=3):
        program = tmp_path / f"python-{'-'.join(packages)}-{status}"
        cases = "".join(f"{package}) exit 0;; " for package in packages)
        program.write_text(f'#!/bin/sh\ncase "$3" in {cases} *) exit {status};; esac\n')
        program.chmod(0o755)
        return str(program)

    return make


def test_names_say_kind_and_variant(python):
    peer = python("llama_cpp", "vllm")
    names = ["kt", "kt:int4", "kt-eager:fp8", "transformers", "transformers:eager", "llama.cpp", "llama.cpp:q4_k_m"]
    chosen, absent = choose(names, {"llama.cpp": peer}, MODEL, 1)
    assert [(c.name, c.variant) for c in chosen] == [
        *(("kt", ""), ("kt:int4", "int4_g32"), ("kt-eager:fp8", chosen[2].variant)),
        *(("transformers", "grouped_mm"), ("transformers:eager", "eager")),
        *(("llama.cpp:bf16", "bf16"), ("llama.cpp:q4_k_m", "q4_k_m")),
    ]
    assert [c.ours for c in chosen] == [True] * 3 + [False] * 4 and absent == {}
    assert [c.python for c in chosen] == [sys.executable] * 5 + [peer] * 2
    assert chosen[0].expert_bytes == 2 > chosen[2].expert_bytes > chosen[1].expert_bytes > 0.5
    assert chosen[1].arithmetic == f"float/{machine().isa}" and chosen[6].arithmetic.startswith("int8/")


def test_linear_layers_may_have_a_format_of_their_own():
    (contender,), _ = choose(["kt:int4_dyn+int8"], {}, MODEL, 1)
    assert (contender.name, contender.variant) == ("kt:int4_dyn+int8", "int4_g32_dyn+int8")
    assert (contender.expert_bytes, contender.dense_bytes) == (0.5625, 1)
    assert contender.arithmetic == f"int8/{machine().isa}"


def test_so_may_the_head():
    (both, head), _ = choose(["kt:int4_dyn+int8", "kt-engine:int4_dyn+int8+int4"], {}, MODEL, 1)
    assert head.variant == "int4_g32_dyn+int8+int4_g32"
    share = MODEL.hidden_size * MODEL.vocab_size * MODEL.dtype_bytes / MODEL.dense_read_bytes
    assert 0 < share < 1 and head.dense_bytes == pytest.approx(1 - share + 0.5625 * share)
    assert formats_of(head.variant) == {
        "weight_format": "int4_g32_dyn",
        "dense_format": "int8",
        "head_format": "int4_g32",
    }
    assert formats_of(both.variant) == {"weight_format": "int4_g32_dyn", "dense_format": "int8"}
    assert formats_of("") == {"weight_format": "auto"}


def test_the_format_of_the_checkpoint_is_that_of_who_names_none():
    chosen, _ = choose(DEFAULT, {}, replace(MODEL, stored_format="fp8"), 1)
    assert len({c.expert_bytes for c in chosen}) == 1 and 1 <= chosen[0].expert_bytes < 1.1


def test_all_are_those_that_are_installed(python):
    here = python("transformers", "ktcompile")
    pythons = dict.fromkeys(("zentorch", "llama.cpp"), here) | {"vllm": python("vllm")}
    chosen, absent = choose(["all"], pythons, MODEL, 1)
    assert {c.name for c in chosen} == set(ALL) - absent.keys()
    assert absent.keys() == {"zentorch", *(name for name in ALL if name.startswith("llama.cpp"))}
    assert absent["zentorch"] == f"not installed in {here}"


@pytest.mark.parametrize(
    ("names", "pythons", "message"),
    [
        (["onnx"], {}, "contender 'onnx' is unknown; there are all, kt, kt:FORMAT"),
        (["kt:int3"], {}, "int3"),
        (["kt:int4+int3"], {}, "int3"),
        (["kt:int4+int8+int4+int4"], {}, "4 formats; they are of experts, linear layers, head"),
        (["kt-eager:int4+int8"], {}, "which need a compiler: kt:int4\\+int8"),
        (["llama.cpp:q2_k"], {}, "of llama.cpp there are bf16, q8_0, q4_k_m"),
        (["inductor:eager"], {}, "of inductor there are no variants"),
        (["kt"], {"lama": "python"}, "--peer-python names 'lama'"),
        (["vllm"], {"vllm": "/nowhere/python"}, "/nowhere/python cannot be run"),
    ],
)
def test_what_cannot_be_is_refused(names, pythons, message):
    with pytest.raises(ValueError, match=message):
        choose(names, pythons, MODEL, 1)


def test_a_peer_that_is_not_there_is_refused_by_name(python):
    with pytest.raises(ValueError, match=r"contender 'vllm' is not installed in .*; --peer-python names another"):
        choose(["vllm"], {"vllm": python()}, MODEL, 1)
    with pytest.raises(ValueError, match="is no Python: it returned 1"):
        choose(["vllm"], {"vllm": python(status=1)}, MODEL, 1)


def test_groups_fit_into_memory_and_each_has_the_first():
    others = [contender(f"transformers:{n}") for n in range(3)]
    everyone = (OURS, *others)
    one = 1.001 * GIB  # a process; the weights are small
    assert groups(everyone, MODEL, int(5 * one)) == ((everyone,), {})
    assert groups(everyone, MODEL, int(3 * one)) == (((OURS, *others[:2]), (OURS, others[2])), {})
    # vLLM has its blocks too.
    made, skipped = groups((OURS, THIRD, PEER), MODEL, int(3 * one))
    assert made == ((OURS, PEER),)
    assert skipped == {"vllm": "it needs about 3.0 GiB beside 1.0 of others; 3.0 may be used"}
    assert groups((OURS,), MODEL, 0) == (((OURS,),), {})


def test_weights_are_those_of_the_formats():
    experts, dense = 2 * 8 * 6144, 6400 + 6400 + 10_000
    assert OURS.weights(MODEL) == 2 * (experts + dense) == 2 * MODEL.parameters
    assert contender("llama.cpp:q8_0", expert_bytes=1, dense_bytes=1.5).weights(MODEL) == experts + 1.5 * dense


def test_a_step_of_decode_reads_each_weight_once():
    # One token: two experts of each layer, all dense weights but the table, 64 + 2.5 tokens of the cache.
    one = demand(MODEL, Work("decode", 1), 2, 2, 4)
    assert one.bytes == 2 * (2 * 2 * 6144 + 6400 + 10_000) + 2 * 256 * round(66.5)
    assert one.flops == pytest.approx(2 * (2 * 2 * 6144 + 6400 + 10_000) + 66.5 * 512)
    four = demand(MODEL, Work("decode", 4), 0.5, 1, 4)
    touched = 8 * (1 - (1 - 2 / 8) ** 4)
    assert four.bytes == pytest.approx(0.5 * 2 * touched * 6144 + 6400 + 10_000 + 4 * 512 * round(66.5))
    assert four.flops == pytest.approx(4 * one.flops)


def test_a_prompt_has_the_logits_of_one_token_and_half_a_square_of_attention():
    prompt = demand(MODEL, Work("prefill", 32), 2, 2, 4)
    assert prompt.flops == 2 * (32 * (2 * 2 * 6144 + 10_000) + 6400) + 512 * 32 * 33 / 2
    assert prompt.bytes == pytest.approx(2 * (2 * 8 * 6144 + 6400 + 10_000), rel=1e-3)
    assert prompt.seconds(1e9, 1e6) == prompt.flops / 1e6 and prompt.seconds(1e3, 1e15) == prompt.bytes / 1e3
