"""The generation loop against transformers' own, and incremental text against decoding at once."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.compare import relative_error
from helpers.text_model import build_model, byte_fallback_tokenizer, byte_level_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from ktcompile.engine.detokenizer import IncrementalText
from ktcompile.engine.generate import generate
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.models import hf_experts
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.ops.store import expert_store
from ktcompile.quant import FORMATS

PROMPT_IDS = [17, 3, 250, 99, 42, 42, 7]
REPLACEMENT = "\ufffd"

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def stock_tokens(model, count, **settings):
    ids = torch.tensor([PROMPT_IDS])
    return model.generate(ids, max_new_tokens=count, do_sample=False, **settings)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("experts", ["grouped_mm", "kt"])
def test_greedy_tokens_are_those_of_transformers(experts):
    model = build_model()
    expected = stock_tokens(model, 24)
    model.set_experts_implementation(experts)
    assert list(generate(model, PROMPT_IDS, 24)) == expected
    assert len(set(expected)) > 4


def test_ends_before_an_end_token_and_leaves_it_out():
    model = build_model()
    tokens = list(generate(model, PROMPT_IDS, 12))
    for ends in (tokens[5], [tokens[5], 299]):
        model.generation_config.eos_token_id = ends
        assert list(generate(model, PROMPT_IDS, 12)) == tokens[: tokens.index(tokens[5])]


def test_ends_where_positions_end():
    model = build_model(positions=len(PROMPT_IDS) + 3)
    assert len(list(generate(model, PROMPT_IDS, 100))) == 3
    with pytest.raises(ValueError, match="the prompt has 10 tokens; the model has 10 positions"):
        generate(model, [*PROMPT_IDS, 1, 2, 3], 100)


def test_a_call_that_cannot_be_done_is_refused_before_the_first_token():
    model = build_model()
    with pytest.raises(ValueError, match="max_tokens is 0"):
        generate(model, PROMPT_IDS, 0)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        generate(model, [], 1)


def test_gradients_stay_as_they_were_between_tokens():
    tokens = generate(build_model(), PROMPT_IDS, 3)
    next(tokens)
    assert torch.is_grad_enabled()


def test_a_seed_repeats_itself_and_another_differs():
    model = build_model()

    def drawn(seed):
        return list(generate(model, PROMPT_IDS, 16, SamplingParams(temperature=1.0, top_p=0.9, seed=seed)))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_configured_weight_format_is_the_one_that_runs(weight_format):
    model = build_model()
    model.set_experts_implementation("kt")
    modules = hf_experts.configure(model, weight_format)
    assert len(modules) == 2
    for parameters in (modules[0].gate_up_proj, modules[0].down_proj):
        assert parameters.dtype == torch.float32
    rounded = build_model()
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if ".experts." in name:
                parameter.copy_(FORMATS[weight_format].round_trip(parameter))
    rounded.set_experts_implementation("kt")
    ids = torch.tensor([PROMPT_IDS])
    # Dynamic formats round activations, too; with scales, sums are in another order.
    stored = FORMATS[weight_format]
    allowed = 0.05 if stored.dynamic else 0 if stored.codec is None else 1e-5
    with torch.no_grad():
        wanted, got = rounded(ids).logits, model(ids).logits
    assert relative_error(got, wanted) <= allowed

    before = {name: tensor.clone() for name, tensor in rounded.state_dict().items()}
    for module in modules:
        hf_experts.take(module)
        spec = ExpertsSpec(weight_format=weight_format)
        weights = (module.gate_up_proj, module.down_proj, None, None)
        assert expert_store().is_taken(weights, spec)
        assert expert_store().get(weights, spec).format.name == weight_format
    with torch.no_grad():
        assert torch.equal(model(ids).logits, got)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_configure_refuses_an_unknown_format():
    with pytest.raises(ValueError, match="weight_format is 'int3'; it must be one of auto, int4, int4_dyn, fp32"):
        hf_experts.configure(build_model(), "int3")


TOKENIZERS = {"byte_level": byte_level_tokenizer, "byte_fallback": byte_fallback_tokenizer}


@functools.cache
def tokenizer_called(name):
    return TOKENIZERS[name]()


def pieces_of(tokenizer, prompt_ids, new_ids):
    text = IncrementalText(tokenizer, prompt_ids)
    return [*(text.add(token) for token in new_ids), text.end()]


@pytest.mark.parametrize("name", TOKENIZERS)
@example(prompt="a ", text=" b")
@example(prompt="a", text="\u00e9\u00e9\u200d\n")
@example(prompt="z", text="\u4f60\U0001f600 ")
@given(
    prompt=st.text(st.sampled_from("ab z\u4f60"), min_size=1, max_size=8),
    text=st.text(st.sampled_from("ab z\n\u00e9\u4f60\U0001f600\U0001f469\u200d"), max_size=20),
)
def test_pieces_make_up_what_decoding_at_once_gives(name, prompt, text):
    tokenizer = tokenizer_called(name)
    prompt_ids = tokenizer(prompt)["input_ids"]
    new_ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, prompt_ids, new_ids)
    assert tokenizer.decode(prompt_ids) + "".join(pieces) == tokenizer.decode(prompt_ids + new_ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("end", ["\u4f60", "a", "a ", "\U0001f600"])
def test_of_a_long_prompt_the_end_is_enough(name, end):
    """At every place where the prompt may be cut, in the middle of characters too."""
    tokenizer = tokenizer_called(name)
    new_ids = tokenizer(" b\u4f60 a")["input_ids"]
    for begin in range(9):
        prompt_ids = tokenizer("\U0001f600 z" * 30 + "a" * begin + end)["input_ids"]
        assert len(prompt_ids) > 100
        whole = tokenizer.decode(prompt_ids + new_ids)
        assert tokenizer.decode(prompt_ids) + "".join(pieces_of(tokenizer, prompt_ids, new_ids)) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_unfinished_character_is_held_back_and_dropped_at_the_end(name):
    tokenizer = tokenizer_called(name)
    prompt_ids = tokenizer("ab")["input_ids"]
    ids = tokenizer("\U0001f600")["input_ids"]
    ids = ids[-4:]  # one for each byte, without the mark of a space
    assert pieces_of(tokenizer, prompt_ids, ids) == ["", "", "", "\U0001f600", ""]
    assert pieces_of(tokenizer, prompt_ids, ids[:3]) == ["", "", "", ""]


def test_bytes_that_never_become_a_character_do_not_stop_the_text():
    tokenizer = tokenizer_called("byte_level")
    ids = [*tokenizer("\U0001f600")["input_ids"][:2], *tokenizer("ab")["input_ids"]]
    assert "".join(pieces_of(tokenizer, [1], ids)) == REPLACEMENT + "ab"


def test_special_tokens_have_no_text():
    tokenizer = tokenizer_called("byte_level")
    a, b = tokenizer("a")["input_ids"], tokenizer("b")["input_ids"]
    assert "".join(pieces_of(tokenizer, a, [*b, tokenizer.eos_token_id, *b])) == "bb"
