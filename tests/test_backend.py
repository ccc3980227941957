"""The torch.compile backend on an unmodified model of transformers."""

from __future__ import annotations

import gc
import inspect
import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import ktcompile
from ktcompile.graph import report
from ktcompile.models.hf_experts import configure
from ktcompile.ops.store import expert_store
from ktcompile.quant import FORMATS

EAGER = {"inner": "eager"}
ALL_PASSES = (
    "fuse_moe",
    "fuse_norm",
    "fuse_add_norm",
    "fuse_rotary",
    "fuse_attention",
    "pack_moe",
    "pack_linear",
    "pack_latents",
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code and no reports from other tests."""
    torch._dynamo.reset()
    report.clear_compile_reports()
    yield
    torch._dynamo.reset()


def make_model(seed: int = 0, **changes: Any) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 72,
            "moe_intermediate_size": 56,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 18,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "max_position_embeddings": 128,
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    return model


def make_block(seed: int = 0) -> Any:
    """Return a block of experts with its router alone: Dynamo traces it in a quarter of a model's time."""
    return make_model(seed).model.layers[0].mlp.requires_grad_(False)


def hidden(length: int) -> torch.Tensor:
    return torch.randn(1, length, 72, generator=torch.Generator().manual_seed(length))


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("inner", ["program", "eager", "inductor"])
def test_logits_equal_the_stock_model(inner: str) -> None:
    model = make_model(num_hidden_layers=2)
    compiled = torch.compile(model, backend="kt", fullgraph=True, options={"inner": inner})
    assert relative_error(logits(compiled, ids(10)), logits(model, ids(10))) < 1e-5
    (only,) = ktcompile.compile_reports()
    assert (only.moe_found, only.moe_fused, only.fallbacks, only.inner) == (2, 2, [], inner)
    assert [(p.name, p.matches) for p in only.passes] == [
        ("fuse_moe", 2),
        ("fuse_norm", 9),
        ("fuse_add_norm", 4),
        ("fuse_rotary", 4),
        ("fuse_attention", 2),
        ("pack_moe", 2),
        ("pack_linear", 11),
        ("pack_latents", 0),
    ]
    assert all(p.seconds > 0 for p in only.passes)


def test_no_import_by_the_user(tmp_path: Path) -> None:
    make_model(num_hidden_layers=2).save_pretrained(tmp_path)
    script = f"""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
        with torch.no_grad():
            tokens = torch.arange(8)[None]
            got = torch.compile(model, backend="kt", options={{"inner": "eager"}})(tokens).logits
            assert (got - model(tokens).logits).abs().max() < 1e-4
        import sys
        print(sys.modules["ktcompile"].compile_reports()[0].moe_fused)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "2"


def test_one_graph_serves_every_length() -> None:
    model = make_model()
    compiled = torch.compile(model, backend="kt", fullgraph=True, options=EAGER)
    for length in (10, 11, 1):  # static, then dynamic, then the graph of a single token
        logits(compiled, ids(length))
    graphs = len(ktcompile.compile_reports())
    assert graphs <= 3
    for length in (2, 5, 12, 64, 100):
        assert relative_error(logits(compiled, ids(length)), logits(model, ids(length))) < 1e-5
    assert len(ktcompile.compile_reports()) == graphs


def test_generate_gives_the_stock_tokens() -> None:
    model = make_model(num_hidden_layers=2)
    wanted = model.generate(ids(5), max_new_tokens=12, do_sample=False)
    model.forward = torch.compile(model.forward, backend="kt", options=EAGER)
    got = model.generate(ids(5), max_new_tokens=12, do_sample=False)
    assert torch.equal(got, wanted)
    assert sum(r.moe_fused for r in ktcompile.compile_reports()) > 0


def test_gradients_fall_back_to_the_stock_experts(caplog: pytest.LogCaptureFixture) -> None:
    model, twin = make_model(), make_model()
    compiled = torch.compile(model, backend="kt", options=EAGER)
    with caplog.at_level(logging.WARNING, "ktcompile"):
        compiled(ids(6), labels=ids(6), use_cache=False).loss.backward()
    twin(ids(6), labels=ids(6), use_cache=False).loss.backward()
    for (name, got), (_, wanted) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert relative_error(got.grad, wanted.grad) < 1e-4, name
    reports = ktcompile.compile_reports()
    assert sum(r.moe_fused for r in reports) == 0
    assert all("gradients" in reason for r in reports for reason in r.fallbacks) and reports[0].fallbacks


@pytest.mark.parametrize("backend", [None, "kt", "aot_eager", "inductor"])
def test_experts_implementation(backend: str | None) -> None:
    model = make_model()
    wanted = logits(model, ids(9))
    model.set_experts_implementation("kt")
    options = EAGER if backend == "kt" else None
    used = torch.compile(model, backend=backend, fullgraph=True, options=options) if backend else model
    assert relative_error(logits(used, ids(9)), wanted) < 1e-5
    if backend == "kt":
        assert ktcompile.compile_reports()[0].moe_fused == 1


def test_experts_implementation_trains_on_the_stock_experts() -> None:
    model, twin = make_model(), make_model()
    model.set_experts_implementation("kt")
    for m in (model, twin):
        m(ids(6), labels=ids(6), use_cache=False).loss.backward()
    got, wanted = (m.model.layers[0].mlp.experts.down_proj.grad for m in (model, twin))
    assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("implementation", ["grouped_mm", "kt"])
def test_layers_that_share_a_graph_keep_their_own_experts(implementation: str) -> None:
    model = make_model(num_hidden_layers=4)
    wanted = logits(model, ids(9))
    model.set_experts_implementation(implementation)
    for layer in model.model.layers:
        layer.compile(backend="kt", options=EAGER)
    assert relative_error(logits(model, ids(9)), wanted) < 1e-5
    assert len(ktcompile.compile_reports()) < 4, "the layers were expected to share a graph"


def test_models_that_share_a_graph_keep_their_own_experts() -> None:
    models = [make_model(seed) for seed in (0, 1, 2)]
    wanted = [logits(model, ids(9)) for model in models]

    @torch.compile(backend="kt", fullgraph=True, options=EAGER)
    def run(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, use_cache=False).logits

    with torch.no_grad():
        for n in (0, 1, 2, 0, 1):
            assert relative_error(run(models[n], ids(9)), wanted[n]) < 1e-5
    assert len(ktcompile.compile_reports()) < 3, "the models were expected to share a graph"


def test_models_with_experts_in_other_formats_share_no_graph() -> None:
    models = [make_model(seed) for seed in (0, 1)]
    for model, weight_format in zip(models, ("bf16", "int4"), strict=True):
        model.set_experts_implementation("kt")
        assert len(configure(model, weight_format)) == 1
    wanted = [logits(model, ids(9)) for model in models]

    @torch.compile(backend="aot_eager", fullgraph=True)  # "kt" has an option of its own
    def run(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, use_cache=False).logits

    with torch.no_grad():
        for n in (0, 1, 0):
            assert relative_error(run(models[n], ids(9)), wanted[n]) < 1e-5


def test_layers_that_share_their_experts() -> None:
    model = make_model(num_hidden_layers=2)
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    compiled = torch.compile(model, backend="kt", options=EAGER)
    assert relative_error(logits(compiled, ids(9)), logits(model, ids(9))) < 1e-5


def test_gradients_after_a_call_without() -> None:
    model, twin = make_model(), make_model()
    compiled = torch.compile(model, backend="kt", options=EAGER)
    before = logits(compiled, ids(6))
    for m in (compiled, twin):
        m(ids(6), labels=ids(6), use_cache=False).loss.backward()
    got, wanted = (m.model.layers[0].mlp.experts.down_proj.grad for m in (model, twin))
    assert relative_error(got, wanted) < 1e-5
    assert torch.equal(logits(compiled, ids(6)), before)
    assert [r.moe_fused for r in ktcompile.compile_reports()] == [1, 0]


def test_nothing_to_train_is_fused_with_gradients_enabled() -> None:
    model = make_model().requires_grad_(False)
    compiled = torch.compile(model, backend="kt", options=EAGER)
    assert relative_error(compiled(ids(9), use_cache=False).logits, logits(model, ids(9))) < 1e-5
    assert ktcompile.compile_reports()[0].moe_fused == 1
    with torch.inference_mode():
        assert relative_error(compiled(ids(9), use_cache=False).logits, logits(model, ids(9))) < 1e-5


def test_inputs_that_need_gradients_keep_the_stock_experts() -> None:
    model = make_model().requires_grad_(False)
    compiled = torch.compile(model, backend="kt", options=EAGER)
    embedded = [model.get_input_embeddings()(ids(6)).clone().requires_grad_() for _ in range(2)]
    for m, x in zip((compiled, model), embedded, strict=True):
        m(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
    assert relative_error(embedded[0].grad, embedded[1].grad) < 1e-5


def test_a_write_to_the_weights_is_seen() -> None:
    block = make_block()
    compiled = torch.compile(block, backend="kt", options=EAGER)
    before = compiled(hidden(9))
    block.load_state_dict(make_block(seed=1).state_dict())
    after = compiled(hidden(9))
    assert relative_error(after, before) > 0.1
    assert relative_error(after, block(hidden(9))) < 1e-5


def test_taken_weights_exist_once() -> None:
    block, twin = make_block(), make_block()
    state = {k: v.clone() for k, v in block.state_dict().items()}
    compiled = torch.compile(block, backend="kt", options={**EAGER, "weights": "take"})
    assert relative_error(compiled(hidden(9)), twin(hidden(9))) < 1e-5
    assert block.experts.gate_up_proj.isnan().all() and block.experts.down_proj.isnan().all()
    assert all(torch.equal(v, state[k]) for k, v in block.state_dict().items())
    assert relative_error(compiled(hidden(12)), twin(hidden(12))) < 1e-5
    other = make_block(seed=1)
    block.load_state_dict(other.state_dict())
    assert relative_error(compiled(hidden(9)), other(hidden(9))) < 1e-5
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in block.state_dict().items())


def test_taken_weights_are_saved(tmp_path: Path) -> None:
    model = make_model()
    wanted = logits(model, ids(9))
    logits(torch.compile(model, backend="kt", options={**EAGER, "weights": "take"}), ids(9))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(Qwen3MoeForCausalLM.from_pretrained(tmp_path).eval(), ids(9)), wanted)


def test_taken_experts_are_found_by_the_experts_implementation() -> None:
    model = make_model()
    wanted = logits(model, ids(9))
    options = {**EAGER, "weights": "take", "disable_passes": ["pack_linear"]}
    logits(torch.compile(model, backend="kt", options=options), ids(9))
    model.set_experts_implementation("kt")
    assert relative_error(logits(model, ids(9)), wanted) < 1e-5


def test_taken_weights_are_not_packed_for_another_format() -> None:
    block = make_block()
    torch.compile(block, backend="kt", options={**EAGER, "weights": "take"})(hidden(9))
    torch._dynamo.reset()
    other = torch.compile(block, backend="kt", options={**EAGER, "weight_format": "bf16"})
    with pytest.raises(Exception, match="the weights were taken and exist only packed"):
        other(hidden(9))


def test_taking_frees_memory_and_a_process_that_compiled_ends_cleanly() -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_backend import ids, logits, make_model
        import ktcompile, psutil, torch
        ktcompile.set_num_threads(4)
        model = make_model(hidden_size=512, moe_intermediate_size=1024, num_experts=32)
        weights = sum(p.nbytes for n, p in model.named_parameters() if "experts" in n)
        rss = psutil.Process().memory_info().rss
        compiled = torch.compile(model, backend="kt", options={{"weights": "take"}})
        finite = logits(compiled, ids(9)).isfinite().all().item()
        print(finite, (psutil.Process().memory_info().rss - rss) / weights)
    """
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    finite, share = result.stdout.split()[-2:]
    assert finite == "True" and float(share) < 0.6  # a second copy would make it 1
    assert not any(word in result.stderr for word in ("Traceback", "Fatal", "leaked", "terminate"))


def test_packed_weights_go_with_the_model() -> None:
    gc.collect()  # what other tests packed
    model = make_model(num_hidden_layers=2)
    logits(torch.compile(model, backend="kt", options=EAGER), ids(9))
    held = len(expert_store()._entries)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert len(expert_store()._entries) <= held - 2


def test_a_model_that_the_garbage_collector_has_frozen_is_compiled() -> None:
    model = make_model(num_hidden_layers=2)
    gc.collect()
    gc.freeze()
    try:
        logits(torch.compile(model, backend="kt", options={"weights": "take"}), ids(4))
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
    (only,) = ktcompile.compile_reports()
    assert only.moe_fused == 2


def test_graphs_are_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTCOMPILE_DUMP_GRAPHS", str(tmp_path / "graphs"))
    logits(torch.compile(make_model(), backend="kt", options=EAGER), ids(9))
    texts = {p.stem.split("_", 2)[2]: p.read_text() for p in (tmp_path / "graphs").iterdir()}
    assert set(texts) == {"input", *ALL_PASSES}
    assert "torch.ops.kt.experts" in texts["fuse_moe"] and "torch.ops.kt.moe" in texts["pack_moe"]
    assert "torch.ops.kt" not in texts["input"]


def test_disabled_passes_do_not_run() -> None:
    model = make_model()
    compiled = torch.compile(model, backend="kt", options={**EAGER, "disable_passes": ["fuse_moe"]})
    assert relative_error(logits(compiled, ids(9)), logits(model, ids(9))) < 1e-6
    assert ktcompile.compile_reports()[0].moe_fused == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_fromat": "bf16"}, "did you mean 'weight_format'"),
        ({"weight_format": "fp7"}, "fp7"),
        ({"weights": "steal"}, "steal"),
        ({"inner": "none"}, "inner"),
        ({"isa": "sse9"}, "sse9"),
        ({"disable_passes": ["fuse"]}, "'fuse', which is no pass"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=r"must be|unknown|no pass") as caught:
        torch.compile(torch.nn.Linear(2, 2), backend="kt", options=options)(torch.ones(1, 2))
    assert words in str(caught.value)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_weight_format_option(weight_format: str) -> None:
    block, rounded, name, x = make_block(), make_block(), weight_format, hidden(9)
    plain = block(x)
    for weight in (rounded.experts.gate_up_proj, rounded.experts.down_proj):
        weight.data = FORMATS[name].round_trip(weight.data)
    state = {k: v.clone() for k, v in rounded.state_dict().items()}
    compiled = torch.compile(block, backend="kt", options={**EAGER, "weight_format": name, "weights": "take"})
    got = compiled(x)
    error = relative_error(got, rounded(x))
    assert error < (0.05 if FORMATS[name].dynamic else 1e-5)
    assert relative_error(got, plain) < 2 * FORMATS[name].error_budget or name == "fp32"
    assert all(torch.equal(v, state[k]) for k, v in block.state_dict().items()), "weights were taken, and come back"
    assert ktcompile.compile_reports()[0].moe_fused == 1


def test_int4_is_a_name_of_a_format() -> None:
    results = []
    for name in ("int4", "int4_g32"):
        torch._dynamo.reset()
        results.append(torch.compile(make_block(), backend="kt", options={**EAGER, "weight_format": name})(hidden(9)))
    assert torch.equal(*results)


def test_an_unknown_gate_falls_back_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(num_hidden_layers=2)
    experts = type(model.model.layers[0].mlp.experts)
    odd = type("OddExperts", (experts,), {"_apply_gate": lambda self, x: torch.sin(x.chunk(2, -1)[0])})
    model.model.layers[0].mlp.experts.__class__ = odd
    wanted = logits(model, ids(9))
    with caplog.at_level(logging.WARNING, "ktcompile"):
        compiled = torch.compile(model, backend="kt", options=EAGER)
        assert relative_error(logits(compiled, ids(9)), wanted) < 1e-5
        logits(compiled, ids(10))
    first = ktcompile.compile_reports()[0]
    assert (first.moe_found, first.moe_fused) == (2, 1)
    assert "OddExperts" in first.fallbacks[0] and "activation" in first.fallbacks[0]
    assert len([r for r in caplog.records if "OddExperts" in r.message]) == 1


def test_mode_is_handed_to_inductor() -> None:
    model = make_model()
    compiled = torch.compile(model, backend="kt", mode="max-autotune-no-cudagraphs")
    assert relative_error(logits(compiled, ids(9)), logits(model, ids(9))) < 1e-5


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="this torch compiles all alike"
)
def test_models_of_one_class_keep_apart_where_guards_on_modules_are_left_out() -> None:
    """As README.md says it is done; and weights that are written to are seen, since guards have no part in it."""
    for layers in (1, 2):
        model = make_model(num_hidden_layers=layers)
        compiled = torch.compile(
            model,
            backend="kt",
            isolate_recompiles=True,
            options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
        )
        with torch.no_grad():
            for length in (6, 1, 4):
                wanted = model(ids(length)).logits
                assert relative_error(compiled(ids(length)).logits, wanted) < 1e-5
            model.model.layers[0].self_attn.q_proj.weight.mul_(2)
            wanted = model(ids(4)).logits
            assert relative_error(compiled(ids(4)).logits, wanted) < 1e-5
