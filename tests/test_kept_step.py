"""Steps of engines on disk: the next start has the same bits without a model, or traces one where anything is wrong."""

from __future__ import annotations

import errno
import json
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import SMALL, Answer, prompts, serve
from helpers.processes import run_python
from helpers.text_model import byte_level_tokenizer, save_model
from test_packed_cache import Failing, places_to_flip
from test_streaming import WAYS

import ktcompile
from ktcompile import cli
from ktcompile.engine import kept_step
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.models import checkpoint, packed_model, streaming
from ktcompile.models.packed_cache import PackedCache
from ktcompile.ops.experts import formats, token_counts
from ktcompile.ops.observer import observing
from ktcompile.runtime import stored_graph

pytestmark = pytest.mark.usefixtures("one_torch_thread", "fresh")
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe")
GREEDY = SamplingParams(8, 0.0, ignore_eos=True)


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def cache(tmp_path):
    return PackedCache(tmp_path / "packed")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=1)


def options_of(**options: Any) -> EngineOptions:
    return EngineOptions(**{**SMALL, "max_model_len": 64, **options})


def first_start(folder: Path, cache: PackedCache, **options: Any) -> Engine:
    chosen = options_of(**options)
    model = ktcompile.load(folder, weight_format=chosen.weight_format, packed_cache=cache.folder)
    engine = Engine.of_model(model, byte_level_tokenizer(), chosen, name=str(folder))
    engine.keep(chosen, cache.folder)
    return engine


def next_start(folder: Path, cache: PackedCache, **options: Any) -> Engine | None:
    return Engine.continued(str(folder), byte_level_tokenizer(), options_of(**options), cache.folder)


def asked(engine: Engine) -> list[Answer]:
    """Return answers to prompts of different lengths, some greedy, some drawn, which come together."""
    drawn = SamplingParams(8, 1.5, seed=5, ignore_eos=True)
    return serve(engine, [(prompt, (GREEDY, drawn)[i % 2]) for i, prompt in enumerate(prompts(8, longest=40))])


def steps_in(cache: PackedCache) -> list[Path]:
    return [entry.path for entry in cache.entries() if entry.kind == "step"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_start_has_the_same_bits_without_a_model(family, tmp_path, cache, monkeypatch):
    folder = WAYS[family].write(tmp_path / "model")
    first = first_start(folder, cache)
    assert first.model is not None and len(steps_in(cache)) == 1
    monkeypatch.setattr(checkpoint.Shards, "__getitem__", lambda *args: pytest.fail("the checkpoint was read"))
    monkeypatch.setattr(packed_model, "_without_weights", lambda *args: pytest.fail("a model was built"))
    # Another memory for keys and values, in blocks of another size.
    second = next_start(folder, cache, kv_device_memory=1 << 23, block_size=16)
    assert second is not None and second.model is None
    for engine in (first, second):
        engine._runner.run = noting(engine._runner.run, seen := [])
        engine.logits_seen = seen
    answers = asked(first), asked(second)
    assert answers[0] == answers[1]
    for got, wanted in zip(second.logits_seen, first.logits_seen, strict=True):
        assert torch.equal(got, wanted)
    assert second.summary == first.summary and second.vocab_size == first.vocab_size
    assert formats(second.experts) == formats(first.experts)
    assert sum(map(sum, token_counts(second.experts))) > 0


def noting(run, seen):
    def noted(step):
        result = run(step)
        seen.append(result.values.clone())
        return result

    return noted


@pytest.mark.parametrize(
    "options",
    [
        {"weight_format": "int4", "dense_format": "int8_dyn"},
        {"kv_format": "int8"},
        {"weight_format": "int8", "dense_format": "mxfp4", "kv_format": "fp32"},
        {"head_format": "int4_dyn"},
    ],
    ids=str,
)
def test_formats_have_steps_of_their_own(options, model_folder, cache):
    plain = first_start(model_folder, cache)
    assert next_start(model_folder, cache, **options) is None
    first = first_start(model_folder, cache, **options)
    second = next_start(model_folder, cache, **options)
    assert second is not None and asked(second) == asked(first)
    again = next_start(model_folder, cache)
    assert again is not None and asked(again) == asked(plain)
    assert len(steps_in(cache)) == 2


def test_what_a_graph_does_not_hold_is_not_kept(model_folder, cache):
    for options in ({"eager": True}, {"device": "stand-in", "placement": "uniform"}):
        first_start(model_folder, cache, **options)
        assert not steps_in(cache) and next_start(model_folder, cache, **options) is None
    first_start(model_folder, cache)
    assert next_start(model_folder, cache, eager=True) is None


def test_where_packed_models_are_not_kept_steps_are_not(model_folder, monkeypatch):
    engine = Engine.of_model(
        ktcompile.load(model_folder, packed_cache=None), byte_level_tokenizer(), options_of(), name=str(model_folder)
    )
    engine.keep(options_of(), None)
    assert Engine.continued(str(model_folder), byte_level_tokenizer(), options_of(), None) is None


def test_llm_and_engine_go_on_with_it(model_folder, cache, monkeypatch):
    options = {"max_model_len": 64, "kv_device_memory": 1 << 24}
    prompt = {"prompt_token_ids": [5, 6, 7]}
    first = ktcompile.LLM(model_folder, packed_cache=cache.folder, **options)
    wanted = first.generate(prompt, GREEDY)
    monkeypatch.setattr(packed_model, "_without_weights", lambda *args: pytest.fail("a model was built"))
    second = ktcompile.LLM(model_folder, packed_cache=cache.folder, **options)
    assert first.model is not None and second.model is None
    (got,) = second.generate(prompt, GREEDY)
    assert got.outputs[0].token_ids == wanted[0].outputs[0].token_ids
    with pytest.raises(ValueError, match="no expert of the model was given to a device"):
        second.expert_metrics()
    with pytest.raises(ValueError, match="has 300; the model's tokens are 0 to 299"):
        second.generate({"prompt_token_ids": [300]})
    assert Engine(str(model_folder), EngineOptions(**options), packed_cache=cache.folder).model is None


def test_what_is_recorded_needs_a_model(model_folder, cache, tmp_path):
    ktcompile.LLM(model_folder, packed_cache=cache.folder, max_model_len=64)
    for recorded in ({"record_routing": tmp_path / "trace"}, {"routing_profile": tmp_path / "profile"}):
        llm = ktcompile.LLM(model_folder, packed_cache=cache.folder, max_model_len=64, **recorded)
        assert llm.model is not None
        llm.generate({"prompt_token_ids": [5, 6]}, GREEDY)
        assert next(iter(recorded.values())).exists()
    second = ktcompile.LLM(model_folder, packed_cache=cache.folder, max_model_len=64)
    with observing(lambda *args: None):
        (answer,) = second.generate({"prompt_token_ids": [5, 6]}, GREEDY)
    assert answer.outputs[0].finish_reason == "error"


def test_it_imports_no_compiler_and_no_models(model_folder, cache):
    """Seconds of each start: what traces graphs, and transformers' models."""
    program = f"""
import sys
import torch
from transformers import AutoTokenizer
before = set(sys.modules)  # some versions of torch import its compiler
from ktcompile import LLM, SamplingParams
llm = LLM({str(model_folder)!r}, packed_cache={str(cache.folder)!r}, max_model_len=64)
(answer,) = llm.generate({{"prompt_token_ids": [5, 6, 7]}}, SamplingParams(4, 0.0, ignore_eos=True))
heavy = ("sympy", "torch._dynamo", "torch._inductor", "transformers.modeling_utils", "ktcompile.passes")
print(answer.outputs[0].token_ids, [name for name in heavy if name in sys.modules and name not in before])
"""
    first, second = (run_python(program).splitlines()[-1] for _ in range(2))
    assert first.endswith("'ktcompile.passes']")
    assert second == first[: first.index("]") + 1] + " []"


def test_how_tokens_are_chosen_is_part_of_the_key(tmp_path, cache):
    folder = save_model(tmp_path / "model", layers=1)
    first_start(folder, cache)
    settings = {"eos_token_id": 7, "temperature": 0.25, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert next_start(folder, cache) is None
    first = first_start(folder, cache)
    second = next_start(folder, cache)
    assert second is not None and second.summary == first.summary
    assert second.summary.end_tokens == (7,) and second.summary.sampling == {"temperature": 0.25}
    assert second._runner.summary.end_tokens == first._runner.summary.end_tokens


def test_other_weights_are_traced_anew(tmp_path, cache):
    folder = save_model(tmp_path / "model", layers=1)
    first_start(folder, cache)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2000:] = bytes(2000)
    weights.write_bytes(content)
    assert next_start(folder, cache) is None


def test_what_tiers_keep_is_the_same_start_after_start(model_folder, cache, tmp_path):
    options = options_of(kv_disk_path=tmp_path / "kv")
    first, second = (Engine(str(model_folder), options, packed_cache=cache.folder) for _ in range(2))
    assert first.model is not None and second.model is None
    assert first.namespace == second.namespace
    for engine in (first, second):
        engine.close()


def test_any_byte_that_differs_is_found(model_folder, cache, caplog):
    first_start(model_folder, cache)
    (path,) = steps_in(cache)
    whole = path.read_bytes()
    for at, what in places_to_flip(path):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        caplog.clear()
        assert next_start(model_folder, cache) is None, (at, what)
        assert str(path) in caplog.text, (at, what)
    path.write_bytes(whole)
    (weights,) = (entry.path for entry in cache.entries() if entry.kind == "weights")
    content = bytearray(weights.read_bytes())
    content[-5000] ^= 1
    weights.write_bytes(content)
    assert next_start(model_folder, cache) is None
    weights.unlink()
    assert next_start(model_folder, cache) is None


def test_a_step_that_gives_other_logits_is_traced_anew(model_folder, cache, caplog, monkeypatch):
    first_start(model_folder, cache)
    from ktcompile.engine.runner import ModelRunner

    plain = ModelRunner.example_logits
    monkeypatch.setattr(ModelRunner, "example_logits", lambda *args: plain(*args) * 1.0001)
    assert next_start(model_folder, cache) is None
    assert "gives other logits than it did (relative error 0.0001)" in caplog.text
    # Other kernels may round otherwise, but not compute something else.
    monkeypatch.setattr(kept_step, "machine", lambda: type("Machine", (), {"isa": "another"}))
    assert next_start(model_folder, cache) is not None
    monkeypatch.setattr(ModelRunner, "example_logits", lambda *args: plain(*args) * 2)
    assert next_start(model_folder, cache) is None


def without_last_part(graph):
    return {**graph, "parts": graph["parts"][:-1]}


def with_another_step(graph):
    (part, *rest) = graph["parts"]
    step = part.steps[-1]._replace(op="no_such")
    return {**graph, "parts": [part._replace(steps=[*part.steps[:-1], step]), *rest]}


def with_another_number(graph):
    (part, *rest) = graph["parts"]
    reshapes = [i for i, step in enumerate(part.steps) if step.op == "reshape"]
    steps = list(part.steps)
    steps[reshapes[0]] = steps[reshapes[0]]._replace(whole=[(12345, -1)])
    return {**graph, "parts": [part._replace(steps=steps), *rest]}


@pytest.mark.parametrize("change", [without_last_part, with_another_step, with_another_number])
def test_a_file_that_other_code_wrote_is_replaced(change, model_folder, cache, caplog, monkeypatch):
    plain = kept_step.to_json
    monkeypatch.setattr(kept_step, "to_json", lambda graph: change(plain(graph)))
    first_start(model_folder, cache)
    assert next_start(model_folder, cache) is None
    assert "is not used, and replaced" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whatever_fails_the_engine_starts(number, model_folder, tmp_path, caplog):
    """The n-th call to the system fails, of all that write a step, and of all that read it."""
    cache = PackedCache(tmp_path / "cache")
    engine = first_start(model_folder, cache)
    (path,) = steps_in(cache)
    for work in (lambda: engine.keep(options_of(), cache.folder), lambda: next_start(model_folder, cache)):
        for n in range(1, 200):
            caplog.clear()
            with pytest.MonkeyPatch.context() as patch:
                failing = Failing(patch, cache.folder, n, number)
                work()
            assert not list(cache.folder.glob("*.tmp")) and path.exists()
            if failing.calls < n:
                break
            assert caplog.text, n
        assert 3 < n < 199


def test_pack_lists_checks_and_removes_them(model_folder, cache, capsys):
    first_start(model_folder, cache)
    listed = ["pack", "--output", str(cache.folder)]
    assert cli.main([*listed, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" step of auto " in line for line in lines) == 1 and lines[-1].startswith("2 packed models")
    assert cli.main([*listed, "--verify", "--json"]) == 0
    assert {m["kind"] for m in json.loads(capsys.readouterr().out)["models"]} == {"weights", "step"}
    (path,) = steps_in(cache)
    content = bytearray(path.read_bytes())
    content[4096 + 5] ^= 1
    path.write_bytes(content)
    assert cli.main([*listed, "--verify"]) == 1
    assert "DAMAGED: logits of the example is damaged" in capsys.readouterr().out
    assert cli.main([*listed, "--remove", str(model_folder)]) == 0
    assert not list(cache.folder.iterdir())


@pytest.mark.parametrize(
    "name", ["os:system", "torch:load", "torch.hub:load", "builtins:eval", "ktcompile.cli:main", "torch:", "torch:no"]
)
def test_a_graph_calls_nothing_but_what_computes(name):
    graph = {"parts": [], "nodes": [["call_function", "x", name, ["tuple"], {}]]}
    with pytest.raises(ValueError, match="a graph calls"):
        stored_graph.of_json(graph)


def test_what_cannot_be_written_down_says_so():
    def own(x):
        return x

    for target, argument in ((own, 1), (torch.load, 1), (torch.add, torch.strided), (torch.add, 1j)):
        graph = torch.fx.Graph()
        graph.call_function(target, (graph.placeholder("x"), argument))
        with pytest.raises(stored_graph.NotStorableError):
            stored_graph.to_json(graph)
    graph = torch.fx.Graph()
    graph.get_attr("constant")
    with pytest.raises(stored_graph.NotStorableError, match="constant of a module"):
        stored_graph.to_json(graph)


def test_graphs_of_torch_are_the_same_when_they_are_read(tmp_path):
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    part = graph.call_function(torch.cat, ((x, y),), {"dim": -1})
    part = graph.call_method("to", (part,), {"dtype": torch.float64, "device": torch.device("cpu")})
    part = graph.call_function(torch.ops.aten.cumsum.default, (part, 0))
    part = graph.call_function(operator.getitem, (part, (Ellipsis, slice(1, None, 2), None)))
    graph.output((graph.call_function(torch.nn.functional.silu, (part,)), [y, None, 1.5]))
    plain = torch.fx.GraphModule(torch.nn.Module(), graph)
    read = stored_graph.of_json(json.loads(json.dumps(stored_graph.to_json(graph))))
    given = torch.randn(4, 5), torch.randn(4, 3)
    (got, others), (wanted, _) = read(*given), plain(*given)
    assert torch.equal(got, wanted) and others[0] is given[1] and others[1:] == [None, 1.5]


def test_a_start_packs_anew_what_streaming_does(model_folder, cache):
    """The packed model that a step refers to is that of `ktcompile.load`."""
    first_start(model_folder, cache)
    second = next_start(model_folder, cache)
    assert second is not None
    wanted = streaming.load(model_folder)
    fresh = Engine.of_model(wanted, byte_level_tokenizer(), options_of())
    assert asked(second) == asked(fresh)
