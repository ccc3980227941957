"""transformers' own `FP8Experts`, as its quantizer puts it into models, on the kernels."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.compare import assert_exact, relative_error
from helpers.quantized_models import QWEN
from torch import nn

import ktcompile
from ktcompile.models import hf_experts
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.reference import moe as reference_moe
from ktcompile.ops.spec import Activation, ExpertsSpec
from ktcompile.quant.checkpoints import Fp8Reader

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def build(block=(128, 128), fp4=False, **others):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from transformers.integrations.moe import use_experts_implementation

    # The decorator changes the class that it is given.
    own = type("FP8Experts", (fp8.FP8Experts,), {})
    decorated = use_experts_implementation(own, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS)
    config = type(QWEN)(**{**QWEN.to_dict(), **others})
    config._experts_implementation = "kt"
    more = {"expert_dtype": "fp4", "scale_fmt": "ue8m0"} if fp4 else {}
    module = decorated(config, block_size=block, **more)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        shape = parameter.shape
        if parameter.dtype == torch.float8_e4m3fn:
            new = (torch.randn(shape, generator=generator) * 50).to(parameter.dtype)
        elif parameter.dtype == torch.int8:
            new = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        elif parameter.dtype == torch.float8_e8m0fnu:
            new = torch.randint(120, 125, shape, generator=generator).byte().view(parameter.dtype)
        else:
            new = (torch.rand(shape, generator=generator) + 0.5) / 500
        parameter.data = new
    return module


def inputs_of(dtype=torch.float32, tokens=9):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, QWEN.hidden_size, generator=generator).to(dtype)
    ids = torch.rand(tokens, QWEN.num_experts, generator=generator).argsort(1)[:, :3].contiguous()
    return x, ids, torch.randn(tokens, 3, generator=generator).softmax(1).to(dtype)


def wanted_of(module, inputs, activation=Activation("silu")):  # noqa: B008  (frozen)
    reader = Fp8Reader(module.block_size)
    tensors = dict(module.named_parameters())
    weights = [reader.read(tensors, name).dequantize() for name in ("gate_up_proj", "down_proj")]
    return reference_moe(*inputs, *weights, ExpertsSpec(activation))


@pytest.mark.parametrize("block", ((128, 128), (64, 128), None))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_runs_on_the_kernels(block, dtype):
    module, inputs = build(block), inputs_of(dtype)
    with torch.no_grad():
        got = module(*inputs)
        assert got.dtype == dtype
        assert relative_error(got, wanted_of(module, inputs)) < (8e-3 if dtype == torch.bfloat16 else 2e-6)
        compiled = torch.compile(module, backend="kt", options={"inner": "program"}, fullgraph=True)
        assert_exact(compiled(*inputs), got)
    report = ktcompile.compile_reports()[-1]
    assert (report.moe_fused, report.fallbacks) == (1, [])


def test_pairs_of_four_bits():
    module, inputs = build(fp4=True), inputs_of()
    with torch.no_grad():
        assert relative_error(module(*inputs), wanted_of(module, inputs)) < 2e-6


def test_a_clamped_activation():
    module, inputs = build(swiglu_alpha=1.3, swiglu_limit=0.5), inputs_of()
    activation = Activation("swigluoai", alpha=1.3, limit=0.5)
    with torch.no_grad():
        assert relative_error(module(*inputs), wanted_of(module, inputs, activation)) < 2e-6


def test_is_packed_once_and_again_after_a_change(monkeypatch):
    module, inputs = build(), inputs_of()
    made = []
    pack = PackedExperts.__init__
    monkeypatch.setattr(PackedExperts, "__init__", lambda self, *args: (made.append(self), pack(self, *args))[1])
    with torch.no_grad():
        first = module(*inputs)
        assert_exact(module(*inputs), first)
        assert len(made) == 1 and made[0].format.name == "fp8"
        module.down_proj_scale_inv.mul_(2)
        assert_exact(module(*inputs), 2 * first)
        assert len(made) == 2
    last = weakref.ref(made[1])
    made.clear()
    assert last() is not None
    del module
    gc.collect()
    assert last() is None


def test_one_compiled_graph_serves_other_weights():
    module, inputs = build(), inputs_of()
    with torch.no_grad():
        compiled = torch.compile(module, backend="kt", options={"inner": "program"}, fullgraph=True)
        compiled(*inputs)
        graphs = len(ktcompile.compile_reports())
        module.gate_up_proj.data = module.gate_up_proj.data.flip(0).contiguous()
        assert relative_error(compiled(*inputs), wanted_of(module, inputs)) < 2e-6
        assert len(ktcompile.compile_reports()) == graphs


def test_an_unknown_activation_is_left_to_the_stock_code(monkeypatch):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    called = []
    monkeypatch.setitem(
        fp8.FP8ExpertsInterface._global_mapping, "grouped_mm", lambda *args: called.append(args) or args[1]
    )
    module = build()
    module.act_fn = nn.Tanh()
    x, ids, weights = inputs_of()
    assert module(x, ids, weights) is x
    assert called[0][0] is module


def test_configure_leaves_it():
    assert hf_experts.configure(nn.Sequential(build()), "bf16") == []
