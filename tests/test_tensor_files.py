"""Tensors of safetensors files, read with system calls that may return less than was asked for, or fail."""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch
from helpers.compare import assert_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ktcompile.models import checkpoint
from ktcompile.models.checkpoint import Shards
from ktcompile.models.expert_weights import _ExpertReader
from ktcompile.models.tensor_files import DTYPES, TensorFile

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PREADV = os.preadv


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two files with float tensors of seven columns."""
    folder = tmp_path_factory.mktemp("tensors")
    (folder / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(rows, 7, generator=generator) for name, rows in (("a", 6), ("b", 5), ("c", 4))}
    save_file({"a": weights["a"], "c": weights["c"].bfloat16()}, folder / "one.safetensors")
    save_file({"b": weights["b"], "none": torch.empty(0, 7)}, folder / "two.safetensors")
    return folder


def in_pieces(sizes):
    """Return a preadv that returns at most as many bytes as the next of `sizes` says."""
    left = list(sizes)

    def read(descriptor, buffers, offset):
        most = left.pop() if left else 1 << 20
        return PREADV(descriptor, [buffers[0][:most]], offset)

    return read


@FEW
@given(st.data())
def test_any_elements_are_read_in_any_pieces(folder, data):
    shards = Shards(folder)
    name = data.draw(st.sampled_from(["a", "b", "c"]))
    whole = shards[name]
    first = data.draw(st.integers(0, whole.numel()))
    count = data.draw(st.integers(0, whole.numel() - first))
    target = torch.full((count,), torch.nan, dtype=whole.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", in_pieces(data.draw(st.lists(st.integers(1, 40), max_size=12))))
        shards.read_into(target, name, first)
    assert_exact(target, whole.flatten()[first : first + count])


@FEW
@given(st.permutations(range(12)), st.booleans())
def test_rows_are_read_from_wherever_they_lie(folder, order, transposed):
    shards = Shards(folder)
    rows = torch.tensor(order).view(3, 4)
    read = _ExpertReader(shards, ["a", "b", "c"], rows, 7, torch.float32, transposed)
    every = torch.cat([shards["a"], shards["b"], shards["c"].float()])
    for expert in (2, 0, 1, 1):
        wanted = every[rows[expert]]
        assert_exact(read(expert), wanted.mT if transposed else wanted)


def test_every_dtype_is_read(tmp_path):
    values = torch.arange(0, 40, dtype=torch.uint8)
    tensors = {
        name: (values % 2).bool() if name == "BOOL" else values.view(dtype).clone() for name, dtype in DTYPES.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    file = TensorFile(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert file.tensors[name].dtype == name
        got = file.read(name)
        assert got.dtype == tensor.dtype and torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_a_file_that_becomes_shorter_is_named(folder, monkeypatch):
    file = TensorFile(folder / "one.safetensors")
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    with pytest.raises(ValueError, match=f"{re.escape(str(file.path))} ends within a: it was cut short"):
        file.read("a")


@pytest.mark.parametrize("good", range(4))
def test_a_disk_that_fails_is_an_error_with_a_name(folder, good, monkeypatch):
    calls = []

    def failing(descriptor, buffers, offset):
        calls.append(offset)
        if len(calls) > good:
            raise OSError(errno.EIO, "Input/output error")
        return PREADV(descriptor, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(OSError, match="Input/output error, while a was read") as caught:
        TensorFile(folder / "one.safetensors").read("a")
    assert caught.value.errno == errno.EIO and caught.value.filename == str(folder / "one.safetensors")
    assert len(calls) == good + 1


@pytest.mark.parametrize("memory", [64, 1 << 40])
def test_pages_are_given_back_where_they_would_fill_the_memory(folder, memory, monkeypatch):
    given_back = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: given_back.append(args[1:]))
    monkeypatch.setattr(checkpoint, "_memory", lambda: memory)
    shards = Shards(folder)
    assert shards["b"].shape == (5, 7)
    if memory > 64:
        assert not given_back
    else:
        ((begin, length, advice),) = given_back
        assert begin > 8 and (length, advice) == (4 * 35, os.POSIX_FADV_DONTNEED)


def test_files_are_closed_with_their_owner(folder):
    file = TensorFile(folder / "one.safetensors")
    descriptor = file._descriptor
    os.fstat(descriptor)
    del file
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_a_dtype_that_torch_lacks_is_named(folder):
    file = TensorFile(folder / "one.safetensors")
    stored = file.tensors["a"]
    file.tensors["a"] = type(stored)("a", "F6_E2M3", stored.shape, stored.size, stored.begin)
    with pytest.raises(ValueError, match=r"one\.safetensors: a is F6_E2M3, which is not supported; only F64, F32"):
        file.read("a")
