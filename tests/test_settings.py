"""Settings of servers: the memory and the folder of keys and values from flags, the environment and TOML."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from ktcompile import cli
from ktcompile.cli.settings import add_setting_arguments, of_record, settings_of
from ktcompile.engine.options import EngineOptions
from ktcompile.server.options import ServerOptions

GB = 10**9
# By name: as it is given, and what becomes of it.
TIERS: dict[str, tuple[str, Any]] = {
    "kv_device_memory": ("4G", 4 * GB),
    "kv_host_memory": ("500M", GB // 2),
    "kv_disk_path": ("/some/where", Path("/some/where")),
    "kv_disk_size": ("50G", 50 * GB),
}


def options(*flags: str) -> EngineOptions:
    """Return what flags, the environment and a file say."""
    parser = argparse.ArgumentParser()
    add_setting_arguments(parser, ServerOptions, EngineOptions)
    found: EngineOptions = of_record(EngineOptions, settings_of(parser.parse_args(flags), ServerOptions, EngineOptions))
    return found


def tiers(found: EngineOptions) -> dict[str, Any]:
    return {name: getattr(found, name) for name in TIERS}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text("".join(f'{name} = "{given}"\n' for name, (given, _) in TIERS.items()))
    return path


@pytest.mark.parametrize("source", ["flags", "environment", "file"])
def test_each_tier_is_set_from_anywhere(source: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[str] = []
    if source == "flags":
        flags = [part for name, (given, _) in TIERS.items() for part in (f"--{name.replace('_', '-')}", given)]
    elif source == "environment":
        for name, (given, _) in TIERS.items():
            monkeypatch.setenv(f"KTCOMPILE_SERVE_{name.upper()}", given)
    else:
        flags = ["--config", str(file)]
    assert tiers(options(*flags)) == {name: wanted for name, (_, wanted) in TIERS.items()}


def test_flags_go_before_the_environment_and_that_before_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTCOMPILE_SERVE_KV_HOST_MEMORY", "2G")
    monkeypatch.setenv("KTCOMPILE_SERVE_KV_DISK_SIZE", "2G")
    found = options("--config", str(file), "--kv-disk-size", "3G")
    assert (found.kv_device_memory, found.kv_host_memory, found.kv_disk_size) == (4 * GB, 2 * GB, 3 * GB)


def test_a_file_may_have_bytes_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text("kv_device_memory = 1000\nkv_host_memory = 0\n")
    assert tiers(options("--config", str(path))) == {
        "kv_device_memory": 1000,
        "kv_host_memory": 0,
        "kv_disk_path": None,
        "kv_disk_size": None,
    }


@pytest.mark.parametrize(
    ("name", "given", "wrong"),
    [
        ("kv_host_memory", "much", "KTCOMPILE_SERVE_KV_HOST_MEMORY is 'much', which cannot be used"),
        ("kv_device_memory", "0", "kv_device_memory is 0; it must be 1 byte or more"),
        ("kv_disk_size", "5G", "kv_disk_size says how large kv_disk_path may become, which is not given"),
    ],
)
def test_what_cannot_be_is_named(name: str, given: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"KTCOMPILE_SERVE_{name.upper()}", given)
    with pytest.raises(ValueError, match=wrong):
        options()


def test_a_name_that_is_none_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text('kv_disk_pth = "x"\n')
    with pytest.raises(ValueError, match="'kv_disk_pth', which is no setting; did you mean 'kv_disk_path'"):
        options("--config", str(path))


@pytest.mark.parametrize("command", [["serve"], ["chat"], ["cache", "warm"]])
def test_help_names_each(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    for name in TIERS:
        assert f"--{name.replace('_', '-')} " in out
