"""Where answers end: stop texts against a plain search, tokens that end an answer, and what is told of it."""

from __future__ import annotations

import functools

import pytest
from helpers.text_model import byte_fallback_tokenizer, byte_level_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from ktcompile.engine.completion import Completion
from ktcompile.engine.outputs import Logprob
from ktcompile.engine.sampler import Sampled
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.engine.stop_texts import StopTexts

PROMPT_IDS = [70, 71]
END = 0


def search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return a text up to the stop text that is complete first, the longest of several, and that stop text."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def may_become(text: str, stops: list[str]) -> int:
    """Return how many of the last characters are the beginning of a stop text."""
    lengths = range(max((len(stop) for stop in stops), default=0))
    return max((n for n in lengths if any(len(s) > n and text.endswith(s[:n]) for s in stops)), default=0)


@example(pieces=["a", "ab"], stops=["aab", "b"])
@example(pieces=["xab", "zq"], stops=["ab", "xabz"])
@example(pieces=["aaab"], stops=["aab"])
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
def test_stop_texts_across_pieces(pieces, stops):
    found, passed, stop = StopTexts(stops), "", None
    for count, piece in enumerate(pieces, 1):
        sure, stop = found.add(piece)
        passed += sure
        if stop is not None:
            assert (passed, stop) == search("".join(pieces[:count]), stops)
            break
        text = "".join(pieces[:count])
        assert search(text, stops)[1] is None
        # No more is held back than what may become a stop text.
        assert passed == text[: len(text) - may_become(text, stops)]
    else:
        assert passed + found.end() == "".join(pieces)
        assert found.end() == ""


TOKENIZERS = {"byte_level": byte_level_tokenizer, "byte_fallback": byte_fallback_tokenizer}


@functools.cache
def tokenizer_called(name="byte_level"):
    return TOKENIZERS[name]()


def ids_of(text, name="byte_level"):
    return tokenizer_called(name)(text)["input_ids"]


def run(token_ids, name="byte_level", limit=None, ends=(END,), **params):
    """Return the pieces of an answer and its output; tokens behind its end are not given to it."""
    settings = SamplingParams(max_tokens=None, **params)
    limit = limit or len(token_ids) + 1
    completion = Completion(settings, tokenizer_called(name), PROMPT_IDS, ends, limit)
    pieces = []
    for token in token_ids:
        pieces.append(completion.add(Sampled(token)))
        if completion.finish_reason:
            break
    return pieces, completion


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.text(st.sampled_from("ab \u00e9\U0001f600"), max_size=12),
    stops=st.lists(st.text(st.sampled_from("ab \u00e9\U0001f600"), min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_an_answer_ends_at_a_stop_text_wherever_tokens_are_cut(name, text, stops, include):
    tokenizer = tokenizer_called(name)
    token_ids = ids_of(text, name)
    whole = tokenizer.decode(PROMPT_IDS + token_ids)[len(tokenizer.decode(PROMPT_IDS)) :]
    pieces, completion = run(token_ids, name, stop=stops, include_stop_str_in_output=include)
    pieces.append(completion.end("abort"))
    output = completion.output()
    before, stop = search(whole, stops)
    assert output.text == "".join(pieces) == before + (stop if stop and include else "")
    assert (output.finish_reason, output.stop_reason) == (("stop", stop) if stop else ("abort", None))
    assert output.token_ids == token_ids[: len(output.token_ids)]
    if stop and len(output.token_ids) > 1:
        short = tokenizer.decode(PROMPT_IDS + output.token_ids[:-1])[len(tokenizer.decode(PROMPT_IDS)) :]
        assert search(short.rstrip("\ufffd"), stops)[1] is None, "it could have ended earlier"


def test_an_end_token_has_no_text_and_no_stop_reason():
    pieces, completion = run([*ids_of("ab"), END, *ids_of("c")])
    output = completion.output()
    assert output.token_ids == [*ids_of("ab"), END]
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", None)
    assert "".join(pieces) == "ab"


def test_an_end_token_gives_out_what_was_held_back():
    output = run([*ids_of("ab"), END], stop="abc")[1].output()
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", None)


def test_a_token_of_the_request_ends_an_answer():
    (token,) = ids_of("b")
    for include, text in ((False, "a"), (True, "ab")):
        output = run([*ids_of("a"), token], stop_token_ids=[token], include_stop_str_in_output=include)[1].output()
        assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", token)
        assert output.token_ids == [*ids_of("a"), token]


def test_end_tokens_may_be_ignored():
    output = run([*ids_of("a"), END, *ids_of("b")], ignore_eos=True, skip_special_tokens=False)[1].output()
    assert (output.text, output.finish_reason) == ("a<|end|>b", None)
    assert run([*ids_of("a"), END, *ids_of("b")], ignore_eos=True)[1].output().text == "ab"
    # Asked for by the request it ends all the same, and says so.
    asked = run([END], ignore_eos=True, stop_token_ids=[END])[1].output()
    assert (asked.finish_reason, asked.stop_reason) == ("stop", END)


def test_nothing_ends_an_answer_before_min_tokens():
    a, b = ids_of("a")[0], ids_of("b")[0]
    pieces, completion = run([a, b, a, b, a], stop="b", min_tokens=2)
    # The first two tokens are no part of a stop text.
    assert (completion.output().text, completion.output().token_ids) == ("aba", [a, b, a, b])
    assert pieces == ["a", "b", "a", ""]
    assert run([a, b, a, b], stop="bab", min_tokens=2)[1].finish_reason is None


def test_an_answer_ends_at_its_limit():
    a, b = ids_of("a")[0], ids_of("b")[0]
    pieces, completion = run([a, b], limit=2, stop="bc")
    assert pieces == ["a", "b"], "what could have become a stop text is given out"
    assert (completion.output().finish_reason, completion.output().stop_reason) == ("length", None)
    assert run([a, b], limit=2, stop="b")[1].output().finish_reason == "stop"
    half = ids_of("\U0001f600")[:2]
    assert run([a, *half], limit=3)[1].output().text == "a"


@pytest.mark.parametrize("reason", ["abort", "timeout", "error"])
def test_an_answer_that_is_ended_keeps_its_text(reason):
    pieces, completion = run(ids_of("ab"), stop="bc")
    assert "".join(pieces) == "a"
    assert completion.end(reason) == "b"
    assert (completion.output().text, completion.output().finish_reason) == ("ab", reason)
    assert completion.end("abort") == "" and completion.finish_reason == reason
    with pytest.raises(AssertionError, match="has ended"):
        completion.add(Sampled(1))


def test_logprobs_are_kept_with_texts():
    a, b = ids_of("a")[0], ids_of("b")[0]
    completion = Completion(SamplingParams(logprobs=1), tokenizer_called(), PROMPT_IDS, (END,), 2, index=3)
    completion.add(Sampled(a, {a: Logprob(-0.5, 1)}))
    completion.add(Sampled(b, {b: Logprob(-2.0, 7), END: Logprob(-0.25, 1)}))
    output = completion.output()
    assert output.index == completion.state.stream == 3
    assert output.cumulative_logprob == -2.5
    assert output.logprobs == [
        {a: Logprob(-0.5, 1, "a")},
        {b: Logprob(-2.0, 7, "b"), END: Logprob(-0.25, 1, "<|end|>")},
    ]
    assert run(ids_of("a"))[1].output().logprobs is None
    assert completion.state.num_tokens == 2


def test_an_output_does_not_change_later():
    completion = Completion(SamplingParams(), tokenizer_called(), PROMPT_IDS, (), 5)
    completion.add(Sampled(ids_of("a")[0]))
    before = completion.output()
    completion.add(Sampled(ids_of("b")[0]))
    assert (before.token_ids, before.text) == (ids_of("a"), "a")
