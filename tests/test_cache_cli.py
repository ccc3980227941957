"""`ktc cache`: what it says of a folder, what it changes, and when it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cache_blocks import blocks, disk_store, put, read

from ktcompile import cli
from ktcompile.cache.index import Index
from ktcompile.cache.names import record_name
from ktcompile.cache.vfs import RealFolder

FIRST, SECOND = blocks(3), blocks(2, tenant="a")


def store_of(folder: Path, **options):
    return disk_store(RealFolder(folder), index=lambda only: Index(folder, only), **options)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "kv"
    store = store_of(folder)
    assert all(put(store, block) for block in (*FIRST, *SECOND))
    store.close()
    return folder


@pytest.fixture
def cache(folder, capsys):
    """Return what runs `ktc cache --json`, and gives its status and its object."""

    def run(action, *arguments, where=folder):
        capsys.readouterr()
        status = cli.main(["cache", action, *map(str, arguments), "--dir", str(where), "--json"])
        out = capsys.readouterr().out
        return status, json.loads(out) if out else None

    return run


def flip(folder, block):
    path = folder / record_name(block.key)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    path.chmod(0o600)


def test_ls_and_stat_say_what_there_is(cache, folder):
    status, listed = cache("ls")
    assert status == 0 and {r["key"] for r in listed["records"]} == {b.key.hex() for b in (*FIRST, *SECOND)}
    _, some = cache("ls", "--namespace", SECOND[0].namespace.hex()[:10])
    assert len(some["records"]) == 2
    status, sums = cache("stat")
    assert status == 0 and sorted(s["records"] for s in sums["namespaces"]) == [2, 3]
    assert sums["bytes"] == sum(file.stat().st_size for file in folder.glob("*.ktkv"))


def test_lines_are_for_people(folder, capsys):
    for action in ("ls", "stat", "fsck", "scrub"):
        assert cli.main(["cache", action, "--dir", str(folder)]) == 0
        assert str(folder) in capsys.readouterr().out


def test_fsck_finds_and_mends(cache, folder):
    assert cache("fsck") == (0, {"folder": str(folder), "problems": [], "repaired": False})
    (folder / record_name(FIRST[1].key)).write_bytes(b"torn")
    (folder / f"{'ab' * 32}.12345678.tmp").write_bytes(b"left")
    status, found = cache("fsck")
    assert status == 1
    assert sorted(p["kind"] for p in found["problems"]) == ["damaged", "damaged", "unfinished"]
    assert cache("fsck", "--repair")[0] == 1
    status, after = cache("fsck")
    assert status == 0 and [p["kind"] for p in after["problems"]] == ["in quarantine"]
    assert len(cache("ls")[1]["records"]) == 3


def test_scrub_finds_a_flipped_bit(cache, folder):
    flip(folder, FIRST[2])
    assert cache("fsck")[0] == 0
    status, found = cache("scrub", "--dry-run")
    assert status == 1 and found["problems"][0]["name"] == record_name(FIRST[2].key)
    assert cache("scrub")[0] == 1
    assert cache("scrub")[0] == 0
    assert len(cache("ls")[1]["records"]) == 4


def test_a_pin_is_kept_and_taken_back(cache, folder):
    key = FIRST[1].key.hex()
    assert cache("pin", key[:16]) == (0, {"key": key, "pinned_until": "for good"})
    assert sum(r["pinned"] is not None for r in cache("ls")[1]["records"]) == 1
    store = store_of(folder, capacity=600)  # two records
    assert all(read(store, block) for block in FIRST[:2]) and len(store) == 2
    store.close()
    assert cache("pin", key, "--undo")[1]["pinned_until"] is None
    assert cache("pin", key, "--ttl", "10")[1]["pinned_until"] > 10
    assert cache("pin", "ffffffffff")[0] == 2


def test_records_travel(cache, folder, tmp_path):
    bundle, other = tmp_path / "warm.ktkv", tmp_path / "other"
    status, told = cache("export", bundle, "--namespace", FIRST[0].namespace.hex())
    assert status == 0 and told["records"] == 3
    assert cache("export", bundle)[0] == 2  # it is there
    assert cache("import", bundle, where=other) == (0, {"records": 3, "stored": 3})
    assert cache("import", bundle, where=other) == (0, {"records": 3, "stored": 3})
    store = store_of(other)
    assert all(read(store, block) for block in FIRST)
    store.close()
    damaged = bytearray(bundle.read_bytes())
    damaged[-1] ^= 1
    bundle.write_bytes(damaged)
    assert cache("import", bundle, where=tmp_path / "third")[0] == 2
    assert len(cache("ls", where=tmp_path / "third")[1]["records"]) == 2
    bundle.write_bytes(b"nothing of the kind")
    assert cache("import", bundle, where=other)[0] == 2


def test_clear_removes_what_is_named(cache, folder):
    flip(folder, FIRST[2])
    cache("scrub")
    assert cache("clear", "--namespace", SECOND[0].namespace.hex()[:8])[1]["removed"] == 2
    assert not list(folder.glob("*.bad"))
    assert cache("clear")[1]["removed"] == 2
    assert not list(folder.glob("*.ktkv"))


def test_a_folder_that_is_in_use_is_not_changed(cache, folder):
    store = store_of(folder)
    for action, *arguments in (("clear",), ("pin", FIRST[0].key.hex()), ("fsck", "--repair")):
        assert cache(action, *arguments)[0] == 2
    assert cache("ls")[0] == cache("stat")[0] == cache("scrub", "--dry-run")[0] == 0
    store.close()


def test_what_is_not_there_or_not_ours_is_refused(cache, folder, tmp_path, capsys):
    assert cache("ls", where=tmp_path / "none")[0] == 2
    assert not (tmp_path / "none").exists()
    folder.chmod(0o777)
    capsys.readouterr()
    assert cli.main(["cache", "ls", "--dir", str(folder)]) == 2
    assert "other users may write" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        cli.main(["cache", "--help"])
    assert "ktc cache stat" in capsys.readouterr().out
