"""`ktcompile.LLM`: answers, where they end, files that are written meanwhile, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from helpers.text_model import byte_level_tokenizer, save_model

import ktcompile
from ktcompile.engine import llm as engine
from ktcompile.engine.generate import generate
from ktcompile.engine.runner import ModelRunner
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.trace import Trace

PROMPT = "def fibonacci(n):"
GREEDY = ktcompile.SamplingParams(max_tokens=12, temperature=0.0)
HALF = {"device": "stand-in", "placement": "uniform", "stream_from": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder):
    return ktcompile.LLM(folder)


@pytest.fixture(scope="module")
def stock(folder):
    """The same model, which is called as it is."""
    return ktcompile.load(folder)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_an_answer_is_what_the_model_generates(llm, stock):
    ids = byte_level_tokenizer()(PROMPT)["input_ids"]
    expected = list(generate(stock, ids, 12))
    (request,) = llm.generate(PROMPT, GREEDY)
    assert (request.prompt, request.prompt_token_ids, request.finished) == (PROMPT, ids, True)
    (answer,) = request.outputs
    assert (answer.index, answer.token_ids, answer.finish_reason) == (0, expected, "length")
    whole = byte_level_tokenizer().decode(ids + expected)[len(PROMPT) :]
    assert answer.text and answer.text == whole.rstrip("\ufffd")  # an unfinished character is left out


def test_a_model_that_the_engine_refuses_answers_with_its_own_weights(folder, monkeypatch):
    """It mixes tokens, which is found by running it: nothing of it was taken or changed by then."""

    def mixing(*args, **options):
        model = ktcompile.load(*args, **options)
        model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out + out.mean(1, keepdim=True))
        return model

    monkeypatch.setattr(engine, "load", mixing)
    llm = ktcompile.LLM(folder)
    stock = mixing(folder)
    assert llm._engine is None and llm.model.config._attn_implementation == stock.config._attn_implementation
    ids = byte_level_tokenizer()(PROMPT)["input_ids"]
    expected = list(generate(stock, ids, 12))
    (request,) = llm.generate(PROMPT, GREEDY)
    assert request.outputs[0].token_ids == expected


def test_prompts_are_texts_or_tokens_one_or_several(llm):
    ids = byte_level_tokenizer()(PROMPT)["input_ids"]
    several = llm.generate([PROMPT, {"prompt_token_ids": ids}, {"prompt": PROMPT}], GREEDY)
    assert [request.prompt for request in several] == [PROMPT, None, PROMPT]
    (alone,) = llm.generate({"prompt_token_ids": ids}, GREEDY)
    assert {str(request.outputs) for request in (*several, alone)} == {str(alone.outputs)}
    numbers = [int(request.request_id) for request in (*several, alone)]
    assert numbers == list(range(numbers[0], numbers[0] + 4))
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_settings(llm):
    params = [ktcompile.SamplingParams(max_tokens=n, temperature=0) for n in (1, 3)]
    assert [len(r.outputs[0].token_ids) for r in llm.generate([PROMPT] * 2, params)] == [1, 3]
    with pytest.raises(ValueError, match="there are 2 sampling_params for 1 prompts"):
        llm.generate(PROMPT, params)


def test_an_answer_ends_at_an_end_token(llm, monkeypatch):
    full = llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    monkeypatch.setattr(llm.model.generation_config, "eos_token_id", full[4])
    answer = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    end = full.index(full[4])
    assert (answer.token_ids, answer.finish_reason) == (full[: end + 1], "stop")
    assert answer.text == llm.generate(PROMPT, ktcompile.SamplingParams(end, 0.0))[0].outputs[0].text


def test_an_answer_ends_before_a_text(llm):
    full = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    stop = full.text[len(full.text) // 2 :][:2]
    for stops in (stop, [stop, "never there"]):
        params = ktcompile.SamplingParams(12, 0.0, stop=stops)
        answer = llm.generate(PROMPT, params)[0].outputs[0]
        assert answer.finish_reason == "stop"
        assert answer.text == full.text[: full.text.index(stop)]
        assert answer.token_ids == full.token_ids[: len(answer.token_ids)]


def test_an_answer_ends_where_positions_do(llm):
    ids = [1] * 62
    for params in (GREEDY, ktcompile.SamplingParams(max_tokens=None, temperature=0.0)):
        answer = llm.generate({"prompt_token_ids": ids}, params)[0].outputs[0]
        assert (len(answer.token_ids), answer.finish_reason) == (2, "length")
    with pytest.raises(ValueError, match="the prompt has 64 tokens; the model has 64 positions"):
        llm.generate({"prompt_token_ids": [1] * 64}, GREEDY)


def test_a_seed_repeats_itself(llm):
    def drawn(seed):
        return llm.generate(PROMPT, ktcompile.SamplingParams(8, 1.5, 0.95, seed))[0].outputs[0].token_ids

    assert drawn(1) == drawn(1) != drawn(2)


def test_several_answers_to_one_prompt(llm):
    params = ktcompile.SamplingParams(8, 1.5, seed=1, n=3)
    (request,) = llm.generate(PROMPT, params)
    assert [answer.index for answer in request.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in request.outputs}) == 3
    first = llm.generate(PROMPT, ktcompile.SamplingParams(8, 1.5, seed=1))[0].outputs
    assert first == request.outputs[:1]
    assert llm.generate([PROMPT] * 2, params)[1].outputs == request.outputs


def test_an_end_token_is_ignored_where_it_is_asked(llm, monkeypatch):
    full = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    monkeypatch.setattr(llm.model.generation_config, "eos_token_id", full.token_ids[4])
    ignoring = ktcompile.SamplingParams(12, 0.0, ignore_eos=True)
    assert llm.generate(PROMPT, ignoring)[0].outputs[0] == full
    later = llm.generate(PROMPT, ktcompile.SamplingParams(12, 0.0, min_tokens=6))[0].outputs[0]
    assert full.token_ids[4] not in later.token_ids[:6] and len(later.token_ids) > 6


def test_logprobs_are_those_of_the_model(llm, stock):
    params = ktcompile.SamplingParams(4, 0.0, logprobs=2, prompt_logprobs=0)
    (request,) = llm.generate(PROMPT, params)
    (answer,) = request.outputs
    assert answer.token_ids == llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids[:4]
    ids = request.prompt_token_ids + answer.token_ids
    with torch.no_grad():
        expected = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert request.prompt_logprobs[0] is None and len(request.prompt_logprobs) == len(request.prompt_token_ids)
    given = [*request.prompt_logprobs[1:], *answer.logprobs]
    for row, token, found in zip(expected, ids[1:], given, strict=False):
        assert found[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert found[token].decoded_token == llm.tokenizer.decode([token])
    for row, found in zip(expected[len(request.prompt_token_ids) - 1 :], answer.logprobs, strict=False):
        assert sorted(found) == sorted(row.topk(2).indices.tolist())
    assert answer.cumulative_logprob == pytest.approx(
        sum(p[t].logprob for p, t in zip(answer.logprobs, answer.token_ids, strict=True))
    )


def test_a_bias_is_of_a_token_of_the_model(llm):
    with pytest.raises(ValueError, match="logit_bias has token 300; the model's tokens are 0 to 299"):
        llm.generate(PROMPT, ktcompile.SamplingParams(logit_bias={300: 1.0}))
    always = ktcompile.SamplingParams(3, 0.0, logit_bias={42: 100.0})
    assert llm.generate(PROMPT, always)[0].outputs[0].token_ids == [42] * 3


def test_two_sides_answer_as_one_does(folder, llm):
    two = ktcompile.LLM(folder, **HALF)
    before = [layer.activity.calls for layer in two.expert_metrics().layers]
    assert two.generate(PROMPT, GREEDY)[0].outputs == llm.generate(PROMPT, GREEDY)[0].outputs
    layers = two.expert_metrics().layers
    assert all(layer.resident and layer.activity.calls == b + 12 for layer, b in zip(layers, before, strict=True))
    with pytest.raises(ValueError, match="no experts on a device"):
        llm.expert_metrics()


def test_a_profile_is_added_to_and_a_trace_is_written(folder, tmp_path):
    profile, trace = tmp_path / "profile.npz", tmp_path / "trace.npz"
    params = ktcompile.SamplingParams(5, 0.0)
    for run in (1, 2):
        model = ktcompile.LLM(folder, **HALF, routing_profile=profile, record_routing=trace)
        prompt = len(model.generate(PROMPT, params)[0].prompt_token_ids)
        assert RoutingProfile.load(profile).tokens(Phase.DECODE) == pytest.approx((prompt + 4) * run, rel=1e-3)
        assert Trace.load(trace).tokens.tolist() == [prompt, 1, 1, 1, 1]


def test_what_was_recorded_is_kept_when_it_is_interrupted(folder, tmp_path, monkeypatch):
    trace = tmp_path / "trace.npz"
    model = ktcompile.LLM(folder, record_routing=trace)
    steps, run = [], ModelRunner.run

    def interrupted(runner, step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return run(runner, step)

    monkeypatch.setattr(ModelRunner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT)
    assert Trace.load(trace).num_steps == 2
    monkeypatch.undo()
    assert model.generate(PROMPT, GREEDY)[0].finished, "the interrupted step is in the way"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"text": "x"}, "{'text': 'x'} is no prompt; give a text or"),
        ({"prompt_token_ids": []}, "the prompt has no tokens"),
        ({"prompt_token_ids": [300]}, "prompt_token_ids has 300; the model's tokens are 0 to 299"),
    ],
)
def test_what_is_no_prompt_is_refused(llm, prompt, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        llm.generate(prompt)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"stop": ["a", ""]}, "stop is ['a', '']"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ktcompile.SamplingParams(**settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wait_format": "bf16"}, "option 'wait_format' of ktcompile.LLM is unknown"),
        ({"record_routing": "/nowhere/trace.npz"}, "/nowhere/trace.npz cannot be written"),
        ({"routing_profile": "/nowhere/profile.npz"}, "/nowhere/profile.npz cannot be written"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(options, words, monkeypatch):
    monkeypatch.setattr(engine, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=words):
        ktcompile.LLM(**options)


def test_a_profile_of_another_model_is_refused(folder, tmp_path):
    RoutingProfile(3, 5).save(tmp_path / "profile.npz")
    with pytest.raises(ValueError, match=r"of \(3, 5\) layers and experts; the model has \(2, 5\)"):
        ktcompile.LLM(folder, routing_profile=tmp_path / "profile.npz")


@pytest.mark.slow
def test_the_package_names_what_it_has_and_loads_it_when_asked():
    program = (
        "import sys, ktcompile; before = set(sys.modules)\n"
        "assert 'ktcompile.engine.llm' not in before and 'ktcompile.models.load' not in before\n"
        "assert all(getattr(ktcompile, name) for name in ktcompile.__all__)\n"
        "assert set(ktcompile.__all__) <= set(dir(ktcompile))\n"
        "assert 'ktcompile.engine.llm' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
    with pytest.raises(AttributeError, match="module 'ktcompile' has no attribute 'lode'"):
        ktcompile.lode  # noqa: B018
