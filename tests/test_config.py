"""The options of the backend."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ktcompile.config import CompileOptions, DeviceOptions
from ktcompile.machine import machine
from ktcompile.quant import ALIASES, FORMATS


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("KTCOMPILE_DUMP_GRAPHS", raising=False)


def test_defaults():
    for given in (None, {}):
        assert CompileOptions.from_mapping(given) == CompileOptions()


def test_every_option_can_be_given():
    options = {
        "weight_format": "bf16",
        "dense_format": "int8",
        "head_format": "int4",
        "weights": "take",
        "inner": "eager",
        "isa": "scalar",
        "device": "stand-in",
        "device_expert_fraction": 0.25,
        "device_memory": 1 << 20,
        "keep_cpu_copy": True,
        "placement": "frequency",
        "routing_profile": "profile.json",
        "stream_from": 512,
        "replan": {"interval": 128, "margin": 0.5},
        "disable_passes": ["fuse_moe"],
        "dump_graphs": "graphs",
    }
    assert set(options) == {f.name for f in dataclasses.fields(CompileOptions)}
    made = CompileOptions.from_mapping(options)
    paths = {"dump_graphs": Path("graphs"), "routing_profile": Path("profile.json")}
    records = {"disable_passes": ("fuse_moe",), "replan": (("interval", 128), ("margin", 0.5))}
    assert dataclasses.asdict(made) == options | paths | records
    assert DeviceOptions(**made.device_options()) == DeviceOptions.of_keywords(made.device_options(), "this")


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompileOptions().inner = "eager"
    assert hash(CompileOptions.from_mapping({"disable_passes": ["fuse_moe"]}))


def test_the_given_mapping_is_left_as_it_is():
    given = {"inner": "eager"}
    CompileOptions.from_mapping(given)
    assert given == {"inner": "eager"}


def test_what_options_leave_out_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("KTCOMPILE_DUMP_GRAPHS", "from/environment")
    assert CompileOptions.from_mapping({}).dump_graphs == Path("from/environment")
    assert CompileOptions.from_mapping({"dump_graphs": "given"}).dump_graphs == Path("given")
    assert CompileOptions.from_mapping({"dump_graphs": None}).dump_graphs is None


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("weight_fromat", "weight_format"),
        ("Inner", "inner"),
        ("disable_pass", "disable_passes"),
        ("weigths", "weights"),
    ],
)
def test_an_unknown_option_with_a_suggestion(name, suggestion):
    words = f"option {name!r} of backend 'kt' is unknown; did you mean {suggestion!r}?"
    with pytest.raises(ValueError, match=re.escape(words)):
        CompileOptions.from_mapping({name: "x"})


def test_an_unknown_option_without_a_suggestion():
    with pytest.raises(ValueError, match="option 'temperature' of backend 'kt' is unknown") as caught:
        CompileOptions.from_mapping({"temperature": 1})
    assert "did you mean" not in str(caught.value)
    assert all(f.name in str(caught.value) for f in dataclasses.fields(CompileOptions))


@pytest.mark.parametrize("name", ["auto", *ALIASES, *FORMATS])
def test_every_format_can_be_asked_for(name):
    assert CompileOptions.from_mapping({"weight_format": name}).weight_format == name


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("weight_format", "int3", ("auto", *ALIASES, *FORMATS)),
        ("weight_format", None, ("auto", *FORMATS)),
        ("weights", "steal", ("copy", "take")),
        ("inner", "aot", ("inductor", "eager")),
    ],
)
def test_an_unknown_value(name, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}")) as caught:
        CompileOptions.from_mapping({name: value})
    assert all(each in str(caught.value) for each in allowed)


def test_an_isa_that_cannot_run():
    with pytest.raises(ValueError, match="'sse9'"):
        CompileOptions.from_mapping({"isa": "sse9"})
    for isa in machine().isas:
        assert CompileOptions(isa=isa).isa == isa


def test_a_single_pass_name_is_no_list_of_letters():
    with pytest.raises(ValueError, match="disable_passes is 'fuse_moe'"):
        CompileOptions.from_mapping({"disable_passes": "fuse_moe"})
