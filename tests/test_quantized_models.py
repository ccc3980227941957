"""Checkpoints that are quantised: models of them against stock models that hold the dequantised weights."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch
from helpers.compare import assert_exact, relative_error
from helpers.quantized_models import KINDS, QWEN, TOKENS, write_checkpoint
from helpers.text_model import byte_level_tokenizer
from safetensors.torch import load_file, save_file

import ktcompile
from ktcompile import cli
from ktcompile.engine.generate import generate
from ktcompile.graph.report import clear_compile_reports
from ktcompile.models import hf_experts, streaming
from ktcompile.models.stored_model import reader_of
from ktcompile.ops.experts import from_handle

# With these everything else is computed as without a compiler.
EXPERTS_ONLY = {"inner": "eager", "disable_passes": ["fuse_norm", "fuse_attention", "pack_linear"]}
SECOND = "model-00002-of-00002.safetensors"
PLAIN_LINEAR = "model.layers.0.self_attn.k_proj.weight"

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def packed_modules(model):
    return [module for module in model.modules() if hf_experts.is_packed(module)]


def packed(module):
    return from_handle(module.packed_experts)


def rewrite(folder, change, shard=SECOND):
    """Pass the tensors of a file, a dict, to `change`, and write them again."""
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_eager_and_compiled_agree_with_stock(kind, tmp_path):
    stock = kind.write(tmp_path)
    model = streaming.load(tmp_path)
    modules = packed_modules(model)
    assert len(modules) == sum(hasattr(m, "has_gate") for m in stock.modules()) > 0
    assert {packed(m).format.name for m in modules} == {kind.weight_format}
    wanted, got = logits(stock), logits(model)
    assert relative_error(got, wanted) < 5e-6
    assert logits(model, TOKENS[:, :1]).isfinite().all()

    clear_compile_reports()
    compiled = torch.compile(model, backend="kt", options=EXPERTS_ONLY, fullgraph=True)
    assert_exact(logits(compiled), got)
    (report,) = ktcompile.compile_reports()
    assert (report.moe_found, report.moe_fused, report.fallbacks) == (len(modules), len(modules), [])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="kt", options={"inner": "eager"}, fullgraph=True)
    assert relative_error(logits(compiled), wanted) < 5e-6


def test_in_bfloat16(tmp_path):
    stock = KINDS["fp8 of all layers"].write(tmp_path, dtype=torch.bfloat16)
    model = streaming.load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert relative_error(logits(model).float(), logits(stock).float()) < 0.03


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path):
    stock = KINDS["mxfp4"].write(tmp_path)
    model = streaming.load(tmp_path)
    assert relative_error(logits(torch.compile(model, backend="kt")), logits(stock)) < 5e-6


def test_compiled_code_follows_the_module(tmp_path):
    """The graph holds no weights: other experts are used as soon as the module has them."""
    KINDS["gptq"].write(tmp_path)
    model = streaming.load(tmp_path)
    first, second = packed_modules(model)
    compiled = torch.compile(model, backend="kt", options=EXPERTS_ONLY, fullgraph=True)
    before = logits(compiled)
    graphs = len(ktcompile.compile_reports())
    first.packed_experts, second.packed_experts = second.packed_experts, first.packed_experts
    after = logits(compiled)
    assert_exact(after, logits(model))
    assert relative_error(after, before) > 0.01
    assert len(ktcompile.compile_reports()) == graphs


@pytest.mark.parametrize("name", ("fp8", "mxfp4", "gptq of all layers"))
def test_state_dict_holds_the_dequantised_weights(name, tmp_path):
    stock = KINDS[name].write(tmp_path)
    model = streaming.load(tmp_path)
    state, wanted = model.state_dict(), stock.state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in state.items():
        assert_exact(tensor, wanted[key], key)
    model.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain", experts_implementation="kt")
    assert_exact(logits(again), logits(stock_with_kt(stock)))


def stock_with_kt(stock):
    stock.set_experts_implementation("kt")
    return stock


def test_parameters_of_packed_experts_are_not_silently_used(tmp_path):
    KINDS["fp8"].write(tmp_path)
    model = streaming.load(tmp_path)
    wanted, state = logits(model), model.state_dict()
    for module in packed_modules(model):
        for parameter in (module.gate_up_proj, module.down_proj):
            assert parameter.isnan().all() and parameter.untyped_storage().nbytes() == 4
    with pytest.raises(RuntimeError, match=r"experts.gate_up_proj and .* exist only packed; use load_state_dict with"):
        model.load_state_dict(state)
    model.set_experts_implementation("eager")
    assert logits(model).isnan().any()
    model.set_experts_implementation("kt")
    model.load_state_dict({k: v * 2 if "experts.down" in k else v for k, v in state.items()}, assign=True)
    assert not packed_modules(model)
    assert relative_error(logits(model), wanted) > 0.01
    model.load_state_dict(state, assign=True)
    assert relative_error(logits(model), wanted) < 1e-5


def test_conversion_leaves_the_packed_experts(tmp_path):
    KINDS["fp8"].write(tmp_path)
    model = streaming.load(tmp_path)
    wanted = logits(model)
    assert_exact(logits(model.to("cpu")), wanted)
    model.to(torch.bfloat16)
    assert relative_error(logits(model), wanted) < 0.05
    for module in packed_modules(model):
        assert module.down_proj.dtype == torch.bfloat16 and module.down_proj.untyped_storage().nbytes() == 2
    assert len(packed_modules(model)) == 2
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}


def test_packed_experts_go_with_the_model(tmp_path):
    KINDS["fp8"].write(tmp_path)
    model = streaming.load(tmp_path)
    experts = weakref.ref(packed(packed_modules(model)[0]))
    del model
    gc.collect()
    assert experts() is None


def test_gradients_have_no_way_back(tmp_path):
    KINDS["fp8"].write(tmp_path)
    model = streaming.load(tmp_path)
    with pytest.raises(NotImplementedError, match="no backward"):
        model(TOKENS).logits.sum().backward()


def test_layers_that_were_left_out_are_packed_as_they_are(tmp_path):
    kind = KINDS["compressed int4"]
    stock = kind.write(tmp_path)
    state = stock.state_dict()
    for shard in tmp_path.glob("*.safetensors"):
        tensors = {n: t for n, t in load_file(shard).items() if ".layers.1.mlp.experts" not in n}
        if shard.name == SECOND:
            for e, (gate_up, down) in enumerate(
                zip(*(state[f"model.layers.1.mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj")), strict=True)
            ):
                for part, weight in zip(("gate", "up", "down"), (*gate_up.chunk(2), down), strict=True):
                    tensors[f"model.layers.1.mlp.experts.{e}.{part}_proj.weight"] = weight.contiguous()
        save_file(tensors, shard)
    model = streaming.load(tmp_path)
    assert [packed(m).format.name for m in packed_modules(model)] == ["int4_g32", "fp32"]
    assert relative_error(logits(model), logits(stock)) < 5e-6


def test_tensors_that_the_model_lacks_are_not_read(tmp_path):
    """As those of DeepSeek's layer for several tokens at once, and of scales of a cache."""
    KINDS["fp8 of all layers"].write(tmp_path)
    wanted = logits(streaming.load(tmp_path))

    def add(tensors):
        names = [n for n in tensors if n.startswith("model.layers.2.")]
        tensors.update({n.replace(".2.", ".3.", 1): torch.zeros(3, dtype=tensors[n].dtype) for n in names})
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)

    rewrite(tmp_path, add)
    assert_exact(logits(streaming.load(tmp_path)), wanted)


def test_a_truncated_shard(tmp_path):
    KINDS["awq"].write(tmp_path)
    file = tmp_path / SECOND
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is damaged or was not fully copied"):
        streaming.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(file))} is missing"):
        streaming.load(tmp_path)


EXPERT = "model.layers.1.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("kind", "missing", "words"),
    [
        ("fp8", f"{EXPERT}.weight", f"lacks {EXPERT}.weight; other experts of the layer are quantised"),
        ("fp8", f"{EXPERT}.weight_scale_inv", f"{EXPERT} is not stored as quantised; it must have {EXPERT}.weight,"),
        ("gptq", f"{EXPERT}.qweight", f"lacks {EXPERT}.weight; other experts"),
        ("gptq", f"{EXPERT}.scales", f"it must have {EXPERT}.qweight, {EXPERT}.qzeros, {EXPERT}.scales"),
        ("awq", f"{EXPERT}.qzeros", f"it must have {EXPERT}.qweight, {EXPERT}.qzeros"),
        ("compressed int4", f"{EXPERT}.weight_scale", f"lacks {EXPERT}.weight; other experts"),
        ("mxfp4", "model.layers.1.mlp.experts.down_proj_scales", "experts.down_proj_blocks, model.layers.1.mlp"),
        ("mxfp4", "model.layers.1.mlp.experts.down_proj_blocks", "lacks model.layers.1.mlp.experts.down_proj, quant"),
        ("mxfp4", "model.layers.1.mlp.experts.down_proj_bias", "lacks model.layers.1.mlp.experts.down_proj_bias"),
        ("awq", "model.layers.0.input_layernorm.weight", "lacks model.layers.0.input_layernorm.weight"),
        ("fp8 of all layers", "model.layers.0.mlp.up_proj.weight", "lacks model.layers.0.mlp.up_proj.weight"),
        (
            "fp8 of all layers",
            "model.layers.0.mlp.up_proj.weight_scale_inv",
            "model.layers.0.mlp.up_proj is not stored as quantised; it must have",
        ),
        ("gptq of all layers", "model.layers.0.self_attn.q_proj.scales", "q_proj is not stored as quantised"),
    ],
)
def test_a_missing_tensor(kind, missing, words, tmp_path):
    KINDS[kind].write(tmp_path, shards=1)
    rewrite(tmp_path, lambda tensors: tensors.pop(missing), "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        streaming.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "change", "words"),
    [
        ("fp8", f"{EXPERT}.weight", lambda t: t[:-8], rf"{EXPERT}.weight is \[88, 160\] in fp8; that of other"),
        ("fp8", f"{EXPERT}.weight", lambda t: t[:, :-40], f"{EXPERT} is \\[96, 120\\] with scales"),
        ("fp8", f"{EXPERT}.weight", lambda t: t[:, :-20], rf"{EXPERT}.weight is \[96, 140\] in fp8; that of other"),
        ("fp8", f"{EXPERT}.weight", lambda t: t.view(torch.uint8).fill_(127).view(t.dtype), f"{EXPERT} has NaN codes"),
        ("gptq", f"{EXPERT}.qweight", lambda t: t[:-4], f"{EXPERT}: scales is"),
        ("awq", f"{EXPERT}.scales", lambda t: t.double() * 1.0001, "scales of int4_g32_zp must be exact in bf16"),
        (
            "mxfp4",
            "model.layers.0.mlp.experts.down_proj_blocks",
            lambda t: t[:, :-1],
            r"experts.down_proj has blocks \[5, 159, 3, 16\]",
        ),
        (
            "fp8 of all layers",
            "model.layers.0.mlp.up_proj.weight",
            lambda t: t[:-72],
            r"model.layers.0.mlp.up_proj is \[128, 160\] with scales \[2, 2\]",
        ),
        (
            "fp8 of all layers",
            "model.layers.0.mlp.up_proj.weight",
            lambda t: t[:-8],
            r"up_proj.weight gives model.layers.0.mlp.up_proj.weight \[192, 160\]; it must be \[200, 160\]",
        ),
        (
            "awq",
            PLAIN_LINEAR,
            lambda t: t[:-1],
            rf"{PLAIN_LINEAR} gives {PLAIN_LINEAR} \[23, 160\]; it must be \[24, 160\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit(kind, name, change, words, tmp_path):
    KINDS[kind].write(tmp_path, shards=1)
    shard = "model-00001-of-00001.safetensors"
    rewrite(tmp_path, lambda t: t.update({name: change(t[name]).contiguous()}), shard)
    with pytest.raises(ValueError, match=words) as caught:
        streaming.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_what_cannot_be_loaded_is_named(tmp_path):
    KINDS["fp8"].write(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: .*quant_method is 'bitsandbytes'"):
        streaming.load(tmp_path)
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    assert reader_of(tmp_path) is None
    assert reader_of("owner/name") is None
    with pytest.raises(ValueError, match=r"experts.0.gate_proj.weight is torch.float8_e4m3fn without scales"):
        streaming.load(tmp_path)


def test_experts_of_two_formats(tmp_path):
    kind = KINDS["fp8"]
    kind.write(tmp_path)
    name, scale = (f"model.layers.0.mlp.experts.2.down_proj.{part}" for part in ("weight", "weight_scale_inv"))
    four_bits = {name: torch.zeros(160, 48, dtype=torch.int8), scale: torch.full((160, 3), 127, dtype=torch.uint8)}
    for shard in tmp_path.glob("*.safetensors"):
        rewrite(tmp_path, lambda t: t.update({n: four_bits[n] for n in (name, scale) if n in t}), shard)
    with pytest.raises(
        ValueError, match=r"experts.2.down_proj.weight is \[160, 96\] in mxfp4; that of other .* in fp8"
    ):
        streaming.load(tmp_path)


def test_weight_format_must_be_that_of_the_checkpoint(tmp_path):
    KINDS["gptq"].write(tmp_path)
    wanted = logits(streaming.load(tmp_path))
    for same in ("int4", "int4_g32"):
        assert_exact(logits(streaming.load(tmp_path, same)), wanted)
    for other in ("bf16", "int4_g64", "fp8"):
        with pytest.raises(
            ValueError, match=f"weight_format is '{other}', but the experts of .* quantised as int4_g32"
        ):
            streaming.load(tmp_path, other)
    with pytest.raises(ValueError, match="weight_format is 'int3'; it must be one of"):
        streaming.load(tmp_path, "int3")


def test_layers_are_tracked(tmp_path):
    KINDS["fp8 of all layers"].write(tmp_path)
    seen = []

    def track(layers):
        for layer in layers:
            seen.append(layer.path)
            yield layer

    streaming.load(tmp_path, track=track)
    assert seen == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]


def run_generate(folder, *others):
    return cli.main(
        ["generate", "ab", "--model", str(folder), "--max-tokens", "4", "--threads", "1", "--quiet", "--json", *others]
    )


@pytest.mark.parametrize("others", ([], ["--weight-format", "int4_g32"]))
def test_ktc_generate(others, tmp_path, capsys):
    KINDS["gptq"].write(tmp_path)
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("ab")["input_ids"]
    if max(ids) >= QWEN.vocab_size:
        pytest.fail("the prompt must be in the vocabulary of the model")
    wanted = tokenizer.decode(list(generate(streaming.load(tmp_path), ids, 4)))
    assert run_generate(tmp_path, *others) == 0
    assert json.loads(capsys.readouterr().out)["text"] == wanted
    assert run_generate(tmp_path, "--weight-format", "bf16") == 2
    assert "weight_format is 'bf16', but the experts of" in capsys.readouterr().err


# In a process of its own: what others freed would be counted.
MEMORY = """
import sys, threading, torch
from ktcompile.models import hf_experts, streaming
torch.set_num_threads(1)

def now():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

import transformers.models.qwen3_moe.modeling_qwen3_moe
peak, done = [before := now()], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], now())
thread = threading.Thread(target=watch, daemon=True)
thread.start()
model = streaming.load(sys.argv[1])
done.set()
thread.join()
from ktcompile.ops.experts import from_handle
packed = sum(from_handle(m.packed_experts).nbytes for m in model.modules() if hf_experts.is_packed(m))
print(packed, now() - before, peak[0] - before)
"""


@pytest.mark.slow
def test_memory_holds_the_packed_experts_and_the_codes_of_one_layer(tmp_path):
    layers, experts, hidden, inner = 6, 32, 512, 640
    sizes = {"num_hidden_layers": layers, "num_experts": experts, "num_local_experts": experts, "hidden_size": hidden}
    config = type(QWEN)(**{**QWEN.to_dict(), **sizes, "moe_intermediate_size": inner, "dtype": "bfloat16"})
    stored = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in plain_shapes(config)}
    for layer in range(layers):
        for e in range(experts):
            for part, (n, k) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
                name = f"model.layers.{layer}.mlp.experts.{e}.{part}_proj"
                stored[f"{name}.weight"] = torch.full((n, k), 1.5).to(torch.float8_e4m3fn)
                stored[f"{name}.weight_scale_inv"] = torch.ones(n // 128, k // 128)
    write_checkpoint(tmp_path, config, stored, KINDS["fp8"].quantization, 3)
    del stored
    # Or malloc keeps what is freed, as it does not of tensors of the sizes of real models.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    kept, after, peak = (int(x) for x in result.stdout.split())
    codes = experts * 3 * hidden * inner
    assert 170e6 < layers * codes <= kept < 1.2 * layers * codes
    slack = 30e6  # of Python's and torch's own
    assert after < kept + slack
    assert peak < kept + 1.5 * codes + slack


def plain_shapes(config):
    with torch.device("meta"):
        model = transformers_model(config)
    return [(name, p.shape) for name, p in model.named_parameters() if ".experts." not in name]


def transformers_model(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)
