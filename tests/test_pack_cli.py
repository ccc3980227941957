"""`ktc pack`: what it packs, finds, lists and removes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.text_model import save_model

import ktcompile
from ktcompile import cli
from ktcompile.models import checkpoint, hf_experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pack(tmp_path, capsys):
    """Return what runs `ktc pack --json` on a folder of its own, and gives its status and its models."""

    def run(*arguments):
        capsys.readouterr()
        status = cli.main(["pack", *map(str, arguments), "--output", str(tmp_path / "packed"), "--json"])
        out = capsys.readouterr().out
        return status, json.loads(out)["models"] if out else None

    return run


def test_a_model_is_packed_once_and_then_found(folder, tmp_path, pack, monkeypatch):
    status, (made,) = pack(folder, "--weight-format", "int8")
    assert status == 0 and not made["was_there"] and made["problem"] is None
    assert (made["model"], made["weight_format"]) == (str(folder), "int8")
    assert made["bytes"] == Path(made["path"]).stat().st_size > 4096
    before = Path(made["path"]).stat().st_mtime_ns
    monkeypatch.setattr(checkpoint.Shards, "read_into", lambda *args: pytest.fail("it was packed again"))
    status, (found,) = pack(folder, "--format", "int8")
    assert status == 0 and found["was_there"] and found["key"] == made["key"]
    assert Path(made["path"]).stat().st_mtime_ns == before
    model = ktcompile.load(folder, weight_format="int8", packed_cache=tmp_path / "packed")
    assert all(hf_experts.packed(module).native.mapped for module in hf_experts.experts_modules(model))


def test_generate_takes_what_is_packed(folder, tmp_path, pack, monkeypatch, capsys):
    pack(folder)
    command = ["generate", "--model", str(folder), "--max-tokens", "3", "--json", "--quiet", "def"]
    assert cli.main(command) == 0
    wanted = json.loads(capsys.readouterr().out)["text"]
    monkeypatch.setattr(checkpoint.Shards, "read_into", lambda *args: pytest.fail("the checkpoint was read"))
    monkeypatch.setattr(checkpoint.Shards, "__getitem__", lambda *args: pytest.fail("the checkpoint was read"))
    assert cli.main([*command, "--packed-cache", str(tmp_path / "packed")]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == wanted


def test_packed_models_are_listed_and_removed(folder, pack, monkeypatch):
    assert pack("--list") == (0, [])
    made = {name: pack(folder, "--weight-format", name)[1][0] for name in ("bf16", "int8", "int4")}
    status, listed = pack("--list")
    assert status == 0 and {r["key"] for r in listed} == {r["key"] for r in made.values()}
    assert {r["weight_format"] for r in listed} == {"bf16", "int8", "int4_g32"}
    status, removed = pack("--remove", made["int8"]["key"][:8])
    assert status == 0 and [r["key"] for r in removed] == [made["int8"]["key"]]
    monkeypatch.chdir(folder.parent)
    assert len(pack("--list", folder.name)[1]) == 2
    assert len(pack("--remove", folder)[1]) == 2
    assert pack("--list") == (0, [])


def test_damage_is_found_and_named(folder, pack, tmp_path, capsys):
    _, (made,) = pack(folder)
    assert pack("--verify")[0] == 0
    path = tmp_path / "packed" / f"{made['key']}.ktpacked"
    content = bytearray(path.read_bytes())
    content[4096] ^= 1
    path.write_bytes(content)
    status, (record,) = pack("--verify", folder)
    assert status == 1 and record["problem"].endswith("is damaged")
    assert cli.main(["pack", "--verify", "--output", str(tmp_path / "packed")]) == 1
    assert "DAMAGED: " in capsys.readouterr().out
    path.write_bytes(content[:5000])
    status, (record,) = pack("--list")
    assert status == 0 and record["problem"].startswith("it has 5000 bytes of")
    assert pack("--verify")[0] == 1
    status, (again,) = pack(folder)
    assert status == 0 and not again["was_there"]
    assert pack("--verify")[0] == 0


def test_a_model_of_the_hub_is_known_by_its_id(folder, tmp_path, pack):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder_copy = shutil.copytree(folder, snapshot)
    pack(folder_copy)
    assert len(pack("--list", "owner/name")[1]) == 1
    assert pack("--list", "owner/other") == (2, None)


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["pack", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "ktc pack --list" in out and "--weight-format" in out


def test_text_for_people(folder, tmp_path, capsys):
    output = ["--output", str(tmp_path / "packed")]
    assert cli.main(["pack", str(folder), *output]) == 0
    assert "packed in " in capsys.readouterr().out
    assert cli.main(["pack", str(folder), *output]) == 0
    assert "was packed already" in capsys.readouterr().out
    assert cli.main(["pack", "--list", *output]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out and "1 packed models" in out and " MB" in out


def test_a_model_that_cannot_be_written_is_no_success(folder, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert cli.main(["pack", str(folder), "--quiet", "--output", str(tmp_path / "file" / "packed")]) == 2
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert cli.main(["pack", str(folder), "--quiet", "--output", str(tmp_path / "open")]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a model"),
        (["--remove"], "name what to remove"),
        (["--remove", "abcdef"], "nothing is packed of abcdef"),
        (["/nowhere/at/all"], "there is no directory /nowhere/at/all"),
    ],
)
def test_mistakes_are_named(arguments, words, tmp_path, capsys):
    assert cli.main(["pack", *arguments, "--output", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
