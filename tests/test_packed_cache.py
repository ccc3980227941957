"""Packed models on disk: found again with the same bits, or, when anything is wrong with them, packed anew."""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.compare import assert_exact
from helpers.quantized_models import KINDS
from test_streaming import WAYS, logits

import ktcompile
from ktcompile import _native
from ktcompile.models import checkpoint, hf_experts, packed_cache, packed_model, streaming
from ktcompile.models.packed_cache import PackedCache, cache_for, key_of
from ktcompile.models.packed_file import PackedFile, PackedFileError
from ktcompile.ops.self_check import FirstCall

FORMATS = (
    "fp32",
    "fp16",
    "bf16",
    "int8",
    "int8_dyn",
    "int4_g32",
    "int4_g64_zp",
    "int4_g128_dyn",
    "fp8",
    "fp8_channel",
    "mxfp4",
)


@pytest.fixture(autouse=True)
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return WAYS["qwen3_moe"].write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model_folder, tmp_path):
    """A checkpoint that a test may change."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def cache(tmp_path):
    return PackedCache(tmp_path / "packed")


@pytest.fixture
def without_source(monkeypatch):
    """Return what makes reading a tensor of a checkpoint an error."""

    def forbid():
        def fail(*args, **others):
            pytest.fail("a tensor of the checkpoint was read")

        monkeypatch.setattr(checkpoint.Shards, "__getitem__", fail)
        monkeypatch.setattr(checkpoint.Shards, "read_into", fail)
        monkeypatch.setattr(streaming, "load", fail)

    return forbid


def load(folder, cache, **options):
    return ktcompile.load(folder, packed_cache=cache.folder, **options)


def files(cache):
    return sorted(path.name for path in cache.folder.iterdir()) if cache.folder.exists() else []


def is_mapped(model):
    return all(hf_experts.packed(module).native.mapped for module in hf_experts.experts_modules(model))


def assert_same_model(got, wanted):
    assert_exact(logits(got), logits(wanted))
    assert got.config.to_dict() == wanted.config.to_dict()
    assert got.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert got.training is wanted.training is False
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)()) for m in (got, wanted))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].requires_grad == tensor.requires_grad, name
            if not name.endswith("packed_experts"):
                assert_exact(ours[name], tensor, name)
    state, whole = got.state_dict(), wanted.state_dict()
    assert state.keys() == whole.keys()
    for name, tensor in whole.items():
        assert_exact(state[name], tensor, name)


@pytest.mark.parametrize("way", WAYS)
def test_every_family_is_the_same_from_the_cache(way, tmp_path, cache, without_source):
    WAYS[way].write(tmp_path)
    wanted = load(tmp_path, cache)
    assert len(files(cache)) == 1 and not is_mapped(wanted)
    without_source()
    got = load(tmp_path, cache)
    assert is_mapped(got)
    assert_same_model(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_checkpoints_are_the_same_from_the_cache(kind, tmp_path, cache, without_source):
    KINDS[kind].write(tmp_path)
    wanted = load(tmp_path, cache)
    without_source()
    assert_same_model(load(tmp_path, cache), wanted)


def test_each_format_has_a_file_of_its_own(model_folder, cache, without_source):
    wanted = {name: logits(load(model_folder, cache, weight_format=name)) for name in FORMATS}
    assert len(files(cache)) == len(FORMATS)
    without_source()
    for name, expected in wanted.items():
        model = load(model_folder, cache, weight_format=name)
        assert {hf_experts.packed(m).format.name for m in hf_experts.experts_modules(model)} == {name}
        assert_exact(logits(model), expected, name)
    load(model_folder, cache, weight_format="int4")  # another name of int4_g32
    assert len(files(cache)) == len(FORMATS)


def test_experts_that_are_left_to_transformers_are_kept_plain(folder, cache, monkeypatch, without_source):
    from ktcompile.models.expert_weights import ExpertsParameter

    def unknown(self, shapes, pattern, names):
        raise RuntimeError("rows are mixed")

    monkeypatch.setattr(ExpertsParameter, "_converted", unknown)
    wanted = logits(load(folder, cache, weight_format="int8"))
    without_source()
    model = load(folder, cache, weight_format="int8")
    assert {hf_experts.packed(m).format.name for m in hf_experts.experts_modules(model)} == {"int8"}
    assert_exact(logits(model), wanted)


def test_a_change_of_what_is_packed_is_another_key(folder, monkeypatch):
    keys = [key_of(folder, "auto"), key_of(folder, "int8")]
    os.utime(folder / "model.safetensors", ns=(1, 1))
    keys.append(key_of(folder, "auto"))
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    keys.append(key_of(folder, "auto"))
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    keys.append(key_of(folder, "auto"))
    header = (folder / "model.safetensors").read_bytes().replace(b"down_proj", b"dawn_proj", 1)
    (folder / "model.safetensors").write_bytes(header)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    keys.append(key_of(folder, "auto"))
    monkeypatch.setattr(_native, "numa_nodes", lambda: [0, 1])
    keys.append(key_of(folder, "auto"))
    monkeypatch.setattr(_native, "LAYOUT_VERSION", 99)
    keys.append(key_of(folder, "auto"))
    monkeypatch.setattr(ktcompile, "__version__", "99")
    keys.append(key_of(folder, "auto"))
    assert len(set(keys)) == len(keys)


def test_changed_weights_are_packed_anew(folder, cache):
    before = logits(load(folder, cache))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2000:] = bytes(2000)
    file.write_bytes(content)
    os.utime(file, ns=(5, 5))
    after = logits(load(folder, cache))
    assert_exact(after, logits(streaming.load(folder)))
    assert not torch.equal(before, after) and len(files(cache)) == 2


def places_to_flip(file: Path):
    """Yield (offset, what) of bytes all over a file: of its first block and header, and of each payload."""
    descriptor = os.open(file, os.O_RDONLY)
    packed = PackedFile(descriptor, file)
    packed.close()
    yield from ((at, "first block") for at in (*range(0, 60, 3), 100, 4000, 4079, 4080, 4095))
    end = packed.size
    text_begin = file.read_bytes().rindex(b'{"model"')
    yield from ((at, "header") for at in range(text_begin, min(end, text_begin + 4000), 397))
    for name, payload in packed_model.payloads(packed.header):
        if payload.size:
            yield from ((payload.offset + at, name) for at in {0, payload.size // 2, payload.size - 1})


def test_any_byte_that_differs_is_found(model_folder, cache, caplog):
    """And the file is named, packed anew and replaced."""
    load(model_folder, cache)
    key = key_of(model_folder, "auto")
    path = cache.path(key)
    whole = path.read_bytes()
    places = list(places_to_flip(path))
    assert len(places) > 100
    for at, what in places:
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        caplog.clear()
        assert packed_model.load(cache, key, model_folder, "auto") is None, (at, what)
        assert str(path) in caplog.text, (at, what)
    caplog.clear()
    wanted = logits(load(model_folder, cache))
    assert "is not used, and replaced" in caplog.text and path.read_bytes() == whole
    caplog.clear()
    assert_exact(logits(load(model_folder, cache)), wanted)
    assert not caplog.text


def test_a_file_that_was_cut_short_is_found(model_folder, cache, caplog):
    load(model_folder, cache)
    key = key_of(model_folder, "auto")
    path = cache.path(key)
    whole = path.read_bytes()
    cuts = [0, 1, 7, 8, 51, 4095, 4096, 4097, *range(5000, len(whole), len(whole) // 23), len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        caplog.clear()
        assert packed_model.load(cache, key, model_folder, "auto") is None, cut
        assert str(path) in caplog.text, cut
    path.write_bytes(whole + b"\0")
    assert packed_model.load(cache, key, model_folder, "auto") is None


def test_a_file_of_another_version_is_packed_anew(model_folder, cache, caplog):
    load(model_folder, cache)
    path = cache.path(key_of(model_folder, "auto"))
    content = bytearray(path.read_bytes())
    content[8] += 1
    path.write_bytes(content)
    load(model_folder, cache)
    assert "it has version 2 of the format, this is 1" in caplog.text
    assert path.read_bytes()[8] == 1


class Failing:
    """Lets the n-th of the calls fail that make or read a file of the cache."""

    NAMES = ("open", "pwrite", "ftruncate", "fsync", "rename", "pread", "fstatvfs", "scandir")

    def __init__(self, patch, folder, n, number):
        self.calls, self.n, self.folder = 0, n, folder
        for name in self.NAMES:
            patch.setattr(os, name, self.wrapped(getattr(os, name), number))
        patch.setattr(fcntl, "flock", self.wrapped(fcntl.flock, number))

    def wrapped(self, plain, number):
        def call(*args, **others):
            if self.is_ours(args[0], others):
                self.calls += 1
                if self.calls == self.n:
                    raise OSError(number, os.strerror(number), "the cache")
            return plain(*args, **others)

        return call

    def is_ours(self, what, others):
        """Return whether a path or a descriptor is of the folder."""
        if "dir_fd" in others or "src_dir_fd" in others:
            return True
        try:
            path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else os.fspath(what)
        except OSError:
            return False
        return str(path).startswith(str(self.folder))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("written", [False, True])
def test_whatever_fails_the_model_is_loaded(number, written, model_folder, tmp_path, caplog):
    """The n-th call to the system fails, for all n until none does; nothing that is half written stays."""
    wanted = streaming.load(model_folder)
    expected = logits(wanted)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for n in range(1, 500):
        cache = PackedCache(tmp_path / f"cache{n}")
        if written:
            assert packed_model.store(cache, key_of(model_folder, "auto"), model_folder, "auto", wanted)
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, cache.folder, n, number)
            if written:
                key = key_of(model_folder, "auto")
                model = packed_model.load(cache, key, model_folder, "auto") or wanted
            else:
                stored = packed_model.store(cache, key_of(model_folder, "auto"), model_folder, "auto", wanted)
                model = wanted
                assert not stored or failing.calls < n
        assert not [name for name in files(cache) if name.endswith(".tmp")], n
        for name in files(cache):
            file = cache.open(name.removesuffix(".ktpacked"))  # what is there is whole
            assert file is not None
            file.close()
        if failing.calls < n:
            break
        assert caplog.text, n
        if n % 7 == 0:
            assert_exact(logits(model), expected)
    assert 3 < n < 499
    del model
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def test_a_disk_that_is_too_small_is_not_filled(model_folder, cache, caplog, monkeypatch):
    plain = os.fstatvfs
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result((*plain(fd)[:3], 1, 1, *plain(fd)[5:])))
    monkeypatch.setattr(os, "pwrite", lambda *args: pytest.fail("something was written"))
    load(model_folder, cache)
    assert "No space left on device" in caplog.text and not files(cache)


def test_files_are_the_users_alone(model_folder, cache):
    before = os.umask(0)
    try:
        load(model_folder, cache)
    finally:
        os.umask(before)
    (name,) = files(cache)
    assert stat.S_IMODE((cache.folder / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("how", ["link", "writable", "file", "foreign"])
def test_a_folder_that_others_could_write_to_is_refused(how, model_folder, tmp_path, caplog, monkeypatch):
    cache = PackedCache(tmp_path / "packed")
    (tmp_path / "other").mkdir(mode=0o700)
    if how == "link":
        cache.folder.symlink_to(tmp_path / "other")
    elif how == "file":
        cache.folder.write_text("")
    else:
        cache.folder.mkdir()
        cache.folder.chmod(0o777 if how == "writable" else 0o700)
        if how == "foreign":
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
    model = load(model_folder, cache)
    assert "the packed model is not kept" in caplog.text
    assert not any((tmp_path / "other").iterdir())
    assert how in ("link", "file") or not files(cache)
    assert logits(model) is not None


@pytest.mark.parametrize("how", ["link", "writable", "folder"])
def test_a_file_that_others_could_have_written_is_not_read(how, model_folder, cache, caplog):
    load(model_folder, cache)
    path = cache.path(key_of(model_folder, "auto"))
    if how == "writable":
        path.chmod(0o666)
    else:
        path.rename(path.with_suffix(".other"))
        path.mkdir() if how == "folder" else path.symlink_to(path.with_suffix(".other"))
    assert packed_model.load(cache, path.stem, model_folder, "auto") is None
    assert "the cache of packed models is not used" in caplog.text


START = """
import sys, torch, ktcompile
from ktcompile.models import hf_experts
model = ktcompile.load(sys.argv[1], packed_cache=sys.argv[2])
with torch.no_grad():
    out = model(torch.arange(1, 9)[None]).logits
print(hf_experts.packed(hf_experts.experts_modules(model)[0]).native.mapped, out.double().sum().item())
"""


def test_processes_that_pack_at_once_all_succeed(model_folder, cache):
    command = [sys.executable, "-c", START, str(model_folder), str(cache.folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in running]
    assert all(process.returncode == 0 for process in running), results
    assert not any("packed model" in stderr for _, stderr in results), results
    assert len(files(cache)) == 1
    sums = {stdout.split()[1] for stdout, _ in results}
    with torch.no_grad():
        model = load(model_folder, cache)
        assert sums == {str(model(torch.arange(1, 9)[None]).logits.double().sum().item())}
    assert is_mapped(model)


def test_threads_that_write_at_once_all_succeed(model_folder, cache):
    model, key = streaming.load(model_folder), key_of(model_folder, "auto")
    done = []
    work = [
        threading.Thread(target=lambda: done.append(packed_model.store(cache, key, model_folder, "auto", model)))
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert done == [True] * 4 and files(cache) == [cache.path(key).name]
    assert_same_model(packed_model.load(cache, key, model_folder, "auto"), model)


def test_what_a_killed_process_was_writing_is_removed(model_folder, cache):
    cache.folder.mkdir(mode=0o700)
    code = (
        "import os, sys, signal; from pathlib import Path\n"
        "from ktcompile.models.packed_cache import PackedCache\n"
        "with PackedCache(Path(sys.argv[1])).writing('0' * 32, 1) as writer:\n"
        "    writer.add(memoryview(b'x' * 10000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(cache.folder)], check=False)
    assert killed.returncode == -9
    (left,) = files(cache)
    assert left.endswith(".tmp") and not cache.entries()
    with cache.writing("1" * 32, 1):
        (mine,) = [name for name in files(cache) if name.endswith(".tmp")]
        assert mine != left
        with cache.writing("2" * 32, 1):  # what is being written stays
            assert mine in files(cache)


def test_weights_from_the_cache_can_be_written_to(model_folder, cache):
    """It is this process's model that changes, not the file."""
    wanted = logits(load(model_folder, cache))
    model = load(model_folder, cache)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    assert not torch.equal(logits(model), wanted)
    assert_exact(logits(load(model_folder, cache)), wanted)
    other = load(model_folder, cache, weight_format="int8")
    other.load_state_dict(streaming.load(model_folder).state_dict(), assign=True)
    assert_exact(logits(other), logits(streaming.load(model_folder, "int8")))


def test_a_replaced_or_removed_file_stays_with_who_has_it(model_folder, cache):
    load(model_folder, cache)
    model = load(model_folder, cache)
    key = key_of(model_folder, "auto")
    packed_model.store(cache, key, model_folder, "auto", model)
    cache.remove(key)
    assert_exact(logits(model), logits(streaming.load(model_folder)))


def test_the_memory_lives_as_long_as_the_experts(model_folder, cache):
    load(model_folder, cache)
    model = load(model_folder, cache)
    native = hf_experts.packed(hf_experts.experts_modules(model)[0]).native
    size = sum(native.parts)
    before, after = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    native.read(1, before.data_ptr())
    del model
    gc.collect()
    native.read(1, after.data_ptr())
    assert torch.equal(after, before)
    path = str(cache.folder)
    assert path in Path("/proc/self/maps").read_text()
    del native
    gc.collect()
    assert path not in Path("/proc/self/maps").read_text()


def test_mapped_experts_are_not_written_to(model_folder, cache):
    load(model_folder, cache)
    packed = hf_experts.packed(hf_experts.experts_modules(load(model_folder, cache))[0])
    bytes_ = torch.zeros(sum(packed.native.parts), dtype=torch.uint8)
    for write in (
        lambda: packed.native.fill(0, 0),
        lambda: packed.native.write(0, bytes_.data_ptr()),
        lambda: packed.native.copy(0, packed.native, 1),
    ):
        with pytest.raises(RuntimeError, match="mapped from a file cannot be written to"):
            write()


@pytest.mark.parametrize("keep", [False, True])
def test_mapped_experts_move_to_a_device_and_back(keep, model_folder, cache):
    options = {"device": "stand-in", "placement": "uniform", "stream_from": 0, "device_expert_fraction": 0.4}
    wanted = logits(load(model_folder, cache))
    half = logits(load(model_folder, PackedCache(cache.folder / "none"), **options, keep_cpu_copy=keep))
    model = load(model_folder, cache, **options, keep_cpu_copy=keep)
    assert is_mapped(model)
    assert_exact(logits(model), half)
    for module in hf_experts.experts_modules(model):
        split = hf_experts.packed(module).split
        resident = split.resident
        assert (resident and split.cpu_bytes < split.experts.num_experts * split.experts.native.expert_nbytes) or keep
        for expert in resident:
            split.demote(expert)
        split.settle()
        assert not split.resident and split.activity.demoted == len(resident) and not split.activity.bytes_demoted
        assert split.cpu_bytes == split.experts.num_experts * split.experts.native.expert_nbytes
    assert_exact(logits(model), wanted)


def test_slices_of_several_memory_nodes_are_copied_to_them(tmp_path, cache, monkeypatch):
    config = WAYS["gpt_oss"]
    config.write(tmp_path)
    monkeypatch.setattr(_native, "numa_nodes", lambda: [0, 1])
    layer = "model.layers.0.mlp.experts"
    for weight_format in ("auto", "int8_dyn"):
        wanted = load(tmp_path, cache, weight_format=weight_format)
        got = load(tmp_path, cache, weight_format=weight_format)
        assert_exact(logits(got), logits(wanted))
        native = hf_experts.packed(got.get_submodule(layer)).native
        assert native.mapped == (len(native.slices) == 1)


def test_a_large_file_is_checked_where_it_is_read_at_load(model_folder, cache, monkeypatch):
    load(model_folder, cache)
    key = key_of(model_folder, "auto")
    file = cache.open(key)
    file.close()
    payload = dict(packed_model.payloads(file.header))["model.layers.0.mlp.experts"]
    plain = dict(packed_model.payloads(file.header))["model.norm.weight"]
    monkeypatch.setattr(packed_model, "_CHECKED", 0)
    content = bytearray(cache.path(key).read_bytes())
    content[payload.offset] ^= 1
    cache.path(key).write_bytes(content)
    assert packed_model.load(cache, key, model_folder, "auto") is not None  # ktc pack --verify finds it
    content[plain.offset] ^= 1
    cache.path(key).write_bytes(content)
    assert packed_model.load(cache, key, model_folder, "auto") is None


def test_the_first_call_is_checked_for_each_kind_of_layer(model_folder, cache, monkeypatch):
    """And not for each layer: the kernels are the same, and the weights have checksums."""
    first = [hf_experts.packed(m).first_call for m in hf_experts.experts_modules(load(model_folder, cache))]
    assert len(first) == 2 and None not in first
    model = load(model_folder, cache)
    packed = [hf_experts.packed(m) for m in hf_experts.experts_modules(model)]
    assert [p.first_call is not None for p in packed] == [True, False]
    calls = []
    check = FirstCall.check
    monkeypatch.setattr(FirstCall, "check", lambda self, *args: (calls.append(self), check(self, *args)))
    logits(model)
    assert calls and packed[0].first_call is None
    monkeypatch.setenv("KTCOMPILE_SELF_CHECK", "0")
    model = load(model_folder, cache)
    assert not any(hf_experts.packed(m).first_call for m in hf_experts.experts_modules(model))


def test_where_models_are_kept(model_folder, tmp_path, monkeypatch):
    for option in (None, "off"):
        assert cache_for(option, model_folder) is None
    assert cache_for("auto", model_folder) is None  # the tests' environment says so
    assert cache_for(tmp_path, model_folder).folder == cache_for(str(tmp_path), model_folder).folder == tmp_path
    monkeypatch.setenv("KTCOMPILE_PACKED_CACHE", str(tmp_path / "named"))
    assert cache_for("auto", model_folder).folder == tmp_path / "named"
    monkeypatch.delenv("KTCOMPILE_PACKED_CACHE")
    assert cache_for("auto", model_folder) is None  # it is small
    monkeypatch.setattr(packed_cache, "_WORTH_IT", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_for("auto", model_folder).folder == tmp_path / "caches" / "ktcompile" / "packed"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_for("auto", model_folder).folder == Path.home() / ".cache" / "ktcompile" / "packed"


def test_a_compiled_model_can_come_from_the_cache(model_folder, cache, without_source):
    wanted = logits(load(model_folder, cache))
    without_source()
    torch._dynamo.reset()
    model = ktcompile.models.load.load_for_compiler(model_folder, packed_cache=cache.folder)
    compiled = torch.compile(model, backend="kt", options={"inner": "program", "weights": "take"})
    assert_close = (logits(compiled) - wanted).abs().max() / wanted.abs().max()
    assert assert_close < 0.02
    torch._dynamo.reset()


def test_an_empty_entry_has_a_problem(cache, model_folder, caplog):
    caplog.set_level(logging.WARNING)
    load(model_folder, cache)
    (entry,) = cache.entries()
    assert (entry.model, entry.weight_format, entry.problem) == (str(model_folder), "auto", None)
    entry.path.write_bytes(b"")
    (entry,) = cache.entries()
    assert entry.problem == "it does not begin as one" and entry.size == 0
    with pytest.raises(PackedFileError):
        cache.open(entry.key)


MEMORY = """
import sys, torch, ktcompile
from ktcompile.models import hf_experts

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

warm = ktcompile.load(packed_cache="off")  # kept: its memory must not be used again below
before = resident("RssAnon")
model = ktcompile.load(sys.argv[1], packed_cache=sys.argv[2])
with torch.no_grad():
    model(torch.arange(64)[None])
experts = [hf_experts.packed(m) for m in hf_experts.experts_modules(model)]
print(sum(e.nbytes for e in experts), resident("RssAnon") - before, experts[0].native.mapped)
"""


@pytest.mark.slow
def test_what_is_mapped_is_not_in_the_memory_of_the_process(tmp_path, cache):
    from test_streaming import QWEN, Stored

    sizes = {"num_hidden_layers": 4, "num_experts": 32, "num_local_experts": 32, "hidden_size": 1024}
    Stored(type(QWEN)(**{**QWEN.to_dict(), **sizes, "moe_intermediate_size": 768}), 4).write(tmp_path)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(cache.folder)]
    for mapped in (False, True):
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        packed, anonymous, was_mapped = result.stdout.split()
        assert was_mapped == str(mapped) and int(packed) > 5e8
        # Far apart: a tenth of it, where packed weights are pages of the file, or nearly all.
        share = int(anonymous) / int(packed)
        assert share < 0.13 if mapped else share > 0.9
