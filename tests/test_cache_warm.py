"""`ktc cache warm`: what it computes and keeps, what it is given, and when it refuses."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import engine_of
from helpers.processes import ktc_serve
from helpers.text_model import build_model, byte_level_tokenizer

from ktcompile import cli
from ktcompile.cli import prompt_files
from ktcompile.engine.engine import Engine
from ktcompile.engine.warm import Warmed, warm
from ktcompile.scheduler import behind
from ktcompile.server.prompts import Prompts

PROMPT = [3 + i % 90 for i in range(83)]  # ten blocks of 8, and three tokens
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def engine(threads: Callable[[int], None], tmp_path: Path) -> Iterator[Engine]:
    torch.set_num_threads(1)
    result = engine_of(build_model(positions=256), eager=True, kv_host_memory=0, kv_disk_path=tmp_path / "kv")
    yield result
    result.close()


def records(tmp_path: Path) -> int:
    return len(list((tmp_path / "kv").glob("*.ktkv")))


def test_whole_blocks_are_computed_once_and_are_on_disk(engine: Engine, tmp_path: Path) -> None:
    told: list[int] = []
    assert warm(engine, PROMPT, progress=told.append) == Warmed(83, 0, 80, 80)
    assert sum(told) == 80 and records(tmp_path) == 10
    assert warm(engine, PROMPT) == Warmed(83, 80, 0, 0)
    assert warm(engine, [*PROMPT, *range(3, 20)]) == Warmed(100, 80, 16, 16)
    assert warm(engine, PROMPT[:7]) == Warmed(7, 0, 0, 0)
    assert warm(engine, PROMPT, "a tenant's") == Warmed(83, 0, 80, 80)
    assert records(tmp_path) == 22 and not engine.has_requests
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_no_more_is_computed_than_is_copied_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt with more blocks than may wait to be copied all are kept."""
    monkeypatch.setattr(behind, "MOST_KEPT", 4)
    monkeypatch.setattr("ktcompile.engine.warm._PIECE", 3)
    assert warm(engine, PROMPT) == Warmed(83, 0, 80, 80)


def test_what_finds_no_room_ends_it(threads: Callable[[int], None], tmp_path: Path) -> None:
    one = engine_of(build_model(positions=256), eager=True, kv_host_memory=0, kv_disk_path=tmp_path / "one")
    warm(one, PROMPT[:8])
    size = sum(file.stat().st_size for file in (tmp_path / "one").glob("*.ktkv"))
    one.close()
    options: dict[str, Any] = {"kv_host_memory": 0, "kv_disk_path": tmp_path / "kv", "kv_disk_size": 4 * size + 100}
    few = engine_of(build_model(positions=256), eager=True, **options)
    found = warm(few, PROMPT)
    assert 0 < found.stored < 80 and few.kept_tokens(PROMPT) == found.stored == 8 * records(tmp_path)
    few.close()
    none = engine_of(build_model(positions=256), eager=True)
    assert none.kept_tokens(PROMPT) == 0
    none.close()


def read(path: Path, text: str, form: str | None = None) -> list[prompt_files.Given]:
    path.write_text(text)
    return prompt_files.read([str(path)], form)


def ids_of(given: prompt_files.Given, role: str | None = None) -> list[tuple[str, str]]:
    """Return the text of each prompt, and its salt."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = Prompts(tokenizer)
    try:
        found = asyncio.run(prompt_files.tokenized(prompts, given, role))
        return [(tokenizer.decode(prompt.ids), prompt.cache_salt) for prompt in found]
    finally:
        prompts.close()


def test_lines_are_texts_messages_or_bodies_through_the_models_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[Any] = [
        "a text\u2028of one line",
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        {"messages": [{"role": "user", "content": "u"}], "cache_salt": "t", "temperature": 0.5, "model": "any"},
        {"prompt": ["one", "two"], "max_tokens": 3},
        {"prompt": [72, 73]},
    ]
    given = read(tmp_path / "a.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    assert [each.name.rpartition(":")[2] for each in given] == ["1", "2", "3", "4", "5"]
    texts = [ids_of(each) for each in given[:4]]
    assert texts[0] == [("a text\u2028of one line", "")]
    assert texts[1:3] == [[("<system>s<user>u<a>", "")], [("<user>u<a>", "t")]]
    assert texts[3] == [("one", ""), ("two", "")]
    assert ids_of(given[0], "system")[0][0] == "<system>a text\u2028of one line<a>"
    (whole,) = read(tmp_path / "a.txt", "two\nlines")
    assert whole.value == "two\nlines"
    assert [each.value for each in read(tmp_path / "b.txt", '"x"\n"y"', "jsonl")] == ["x", "y"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from elsewhere"))
    assert prompt_files.read(["-"], None) == [prompt_files.Given("stdin", "from elsewhere")]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", r"a.jsonl:1 is no JSON"),
        ("3", r"a.jsonl:1: 3 is no prompt"),
        ("[]", r"a.jsonl:1: messages"),
        ('{"messages": [{"role": "nobody", "content": "x"}]}', r"a.jsonl:1: messages.0.role"),
        ('{"prompt": "x", "unknown": 1}', r"a.jsonl:1: Unsupported parameter: 'unknown'"),
        ('{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": 1}}', "a.jsonl:1: chat_t"),
        ("", r"there is no prompt in .*a.jsonl"),
    ],
)
def test_what_is_no_prompt_is_named(line: str, wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=wrong):
        [ids_of(each) for each in read(tmp_path / "a.jsonl", line)]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a is no text in UTF-8"):
        prompt_files.read([str(tmp_path / "a")], None)
    with pytest.raises(FileNotFoundError):
        prompt_files.read([str(tmp_path / "b")], None)
    with pytest.raises(ValueError, match="cannot be read"):
        prompt_files.read([str(tmp_path)], None)


def ktc(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["cache", "warm", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_a_server_that_starts_afterwards_finds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In another process. While it runs the folder is its own."""
    text = Path(cli.__file__).read_text()
    (tmp_path / "prompt.txt").write_text(text)
    (tmp_path / "server.toml").write_text(f'kv_disk_path = "{tmp_path / "kv"}"\nport = 1\nserved_model_name = "tiny"\n')
    flags = ("--eager", "--config", tmp_path / "server.toml")
    status, out, _ = ktc(capsys, *flags, "--json", tmp_path / "prompt.txt")
    found = json.loads(out)
    tokens = found["tokens"]
    whole = tokens // 64 * 64
    assert status == 0 and whole > 256
    assert (found["there"], found["computed"], found["stored"]) == (0, whole, whole)
    assert (found["kept"], found["missing"], found["prompts"][0]["kept"]) == (whole, 0, whole)
    with ktc_serve("--config", str(tmp_path / "server.toml")) as (_, port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"model": "tiny", "prompt": text, "max_tokens": 1})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        usage = json.loads(connection.getresponse().read())["usage"]
        assert usage["prompt_tokens"] == tokens
        assert usage["prompt_tokens_details"]["cached_tokens"] == (tokens - 1) // 64 * 64
        status, _, err = ktc(capsys, *flags, tmp_path / "prompt.txt")
        assert status == 2 and "another process writes to the cache" in err
    (tmp_path / "more.jsonl").write_text(json.dumps(text + "\n" + text))
    status, out, err = ktc(capsys, *flags, "--kv-disk-size", "100K", tmp_path / "more.jsonl")
    assert status == 1 and "tokens in whole blocks are not kept" in err
    assert out.splitlines()[-1].startswith("1 prompts: ")


def test_what_would_not_be_kept_or_answered_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("import os\n" * 400)
    status, _, err = ktc(capsys, prompt)
    assert status == 2 and "without --kv-disk-path" in err
    status, _, err = ktc(capsys, "--kv-disk-path", tmp_path / "kv", "--no-enable-prefix-caching", prompt)
    assert status == 2 and "keeps nothing" in err
    status, _, err = ktc(capsys, "--kv-disk-path", tmp_path / "kv", "--eager", "--max-model-len", "100", prompt)
    assert status == 2 and "prompt.txt has" in err and "the model has 100 positions" in err
    assert ktc(capsys, "--kv-disk-path", tmp_path / "kv", tmp_path / "none.txt")[0] == 2


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["cache", "warm", "--help"])
    out = capsys.readouterr().out
    assert "ktc cache warm --kv-disk-path" in out and "--kv-disk-size" in out
