"""The KTCOMPILE_* variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ktcompile import env

NONE = env.Environment(isa=None, features=(), num_threads=None, dump_graphs=None, self_check=True, packed_cache=None)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("ISA", "FEATURES", "NUM_THREADS", "DUMP_GRAPHS", "SELF_CHECK", "PACKED_CACHE"):
        monkeypatch.delenv(f"KTCOMPILE_{name}", raising=False)


def test_nothing_is_set():
    assert env.read() == NONE


def test_each_variable(monkeypatch):
    monkeypatch.setenv("KTCOMPILE_ISA", "avx2")
    monkeypatch.setenv("KTCOMPILE_FEATURES", " -avx512, +avx512_bf16,, ")
    monkeypatch.setenv("KTCOMPILE_NUM_THREADS", "12")
    monkeypatch.setenv("KTCOMPILE_DUMP_GRAPHS", "some/where")
    monkeypatch.setenv("KTCOMPILE_SELF_CHECK", "0")
    monkeypatch.setenv("KTCOMPILE_PACKED_CACHE", "off")
    assert env.read() == env.Environment("avx2", ("-avx512", "+avx512_bf16"), 12, Path("some/where"), False, "off")


def test_empty_variables_are_not_set(monkeypatch):
    for name in ("ISA", "FEATURES", "DUMP_GRAPHS", "SELF_CHECK", "PACKED_CACHE"):
        monkeypatch.setenv(f"KTCOMPILE_{name}", "")
    assert env.read() == NONE


def test_variables_are_read_anew_each_time(monkeypatch):
    assert env.read().num_threads is None
    monkeypatch.setenv("KTCOMPILE_NUM_THREADS", "3")
    assert env.read().num_threads == 3


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1e3", " ", "", "0x4", "²"])
def test_a_number_of_threads_that_is_none(monkeypatch, value):
    monkeypatch.setenv("KTCOMPILE_NUM_THREADS", value)
    with pytest.raises(ValueError, match=re.escape(f"KTCOMPILE_NUM_THREADS is {value!r}")):
        env.read()


def test_a_feature_without_a_sign(monkeypatch):
    monkeypatch.setenv("KTCOMPILE_FEATURES", "-avx512,avx2")
    with pytest.raises(ValueError, match=re.escape("KTCOMPILE_FEATURES has 'avx2'; write +avx2")):
        env.read()


@pytest.mark.parametrize("value", ["no", "off", "2", " ", "true"])
def test_a_self_check_that_is_neither_on_nor_off(monkeypatch, value):
    monkeypatch.setenv("KTCOMPILE_SELF_CHECK", value)
    with pytest.raises(ValueError, match=re.escape(f"KTCOMPILE_SELF_CHECK is {value!r}; it must be 0 or 1")):
        env.read()
