"""Recorded routing: the steps, their files, and what goes wrong with files."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.layers import EXPERTS, random_inputs, random_layer
from helpers.text_model import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktcompile.engine.generate import generate
from ktcompile.models import hf_experts
from ktcompile.models.placed import attach
from ktcompile.ops import moe
from ktcompile.ops.observer import Observers, observe, observing
from ktcompile.plan.files import check_writable
from ktcompile.plan.profile import Phase, RoutingProfile
from ktcompile.plan.trace import Trace
from ktcompile.runtime.devices import Placer, device_for
from ktcompile.runtime.recording import HALF_LIFE, Recording, Steps, TraceLog

PROMPT = [17, 3, 250, 99, 42, 42, 7] * 3  # more tokens than a decode step has
TOKENS = 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(model) -> list[np.ndarray]:
    """Let a model note the rows of each expert, by hooks, one array for each call of a layer."""
    rows: list[np.ndarray] = []

    def note(module, args):
        rows.append(np.bincount(args[1].flatten().numpy(), minlength=module.down_proj.shape[0]))

    for module in hf_experts.experts_modules(model):
        module.register_forward_pre_hook(note)
    return rows


def kt_model():
    model = build_model()
    model.set_experts_implementation("kt")
    return model


def split_model():
    model = kt_model()
    attach(model, Placer(device_for("stand-in", None), 0.5, "uniform", stream_from=10))
    return model


@pytest.mark.parametrize("make", [kt_model, split_model])
def test_a_trace_has_what_the_layers_were_given(make, tmp_path):
    model = make()
    rows = counted(model)
    recording = Recording(tmp_path / "trace.npz", tmp_path / "profile.json")
    recording.check(hf_experts.shape(model))
    with recording.running():
        list(generate(model, PROMPT, TOKENS))
    recorded = list(rows)
    list(generate(model, PROMPT, 1))  # not recorded any more
    assert recording.save() == [tmp_path / "trace.npz", tmp_path / "profile.json"]
    trace = Trace.load(tmp_path / "trace.npz")
    assert (trace.num_layers, trace.num_experts) == (2, 5)
    assert trace.tokens.tolist() == [len(PROMPT), 1, 1, 1]
    assert trace.prefill.tolist() == [True, False, False, False]
    assert (trace.counts(0, TOKENS) == np.stack(recorded).reshape(TOKENS, 2, 5)).all()
    profile = RoutingProfile.load(tmp_path / "profile.json")
    for phase, steps in ((Phase.PREFILL, slice(0, 1)), (Phase.DECODE, slice(1, None))):
        assert profile.rows(phase) == pytest.approx(trace.counts(0, TOKENS)[steps].sum(0), rel=1e-4)


@pytest.mark.slow
def test_a_compiled_model_is_recorded_too(tmp_path):
    model = build_model()
    wanted = counted(plain := kt_model())
    options = {"inner": "eager", "device": "stand-in", "stream_from": 0}
    compiled = torch.compile(model.forward, backend="kt", options=options)
    recording = Recording(tmp_path / "trace.npz")
    with recording.running():
        list(generate(model, PROMPT, 2, forward=compiled))
    list(generate(plain, PROMPT, 2))
    recording.save()
    assert (Trace.load(tmp_path / "trace.npz").counts(0, 2) == np.stack(wanted).reshape(2, 2, 5)).all()


def test_the_step_that_was_broken_off_is_left_out(tmp_path):
    model = kt_model()
    recording = Recording(tmp_path / "trace.npz")
    last = list(hf_experts.experts_modules(model))[-1]
    calls = []

    def interrupted(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    last.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt), recording.running():
        list(generate(model, PROMPT, TOKENS))
    recording.save()
    assert Trace.load(tmp_path / "trace.npz").tokens.tolist() == [len(PROMPT), 1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 3))
def test_steps_are_made_of_calls(tokens, layers):
    experts = [random_layer(seed=0, sizes=(EXPERTS, 8, 8)).pack() for _ in range(layers)]
    taken = []
    steps, log = Steps(taken.append), TraceLog()
    ids = [torch.arange(2 * count).view(count, 2) % EXPERTS for count in tokens]
    for step_ids in ids:
        for layer in experts:
            steps(layer, torch.empty(0, 2, dtype=torch.int64))  # a call without tokens is none
            steps(layer, step_ids)
    steps.end()
    steps.end()
    assert [step.tokens for step in taken] == tokens
    for step, step_ids in zip(taken, ids, strict=True):
        assert (step.rows == np.bincount(step_ids.flatten(), minlength=EXPERTS)).all()
        assert step.phase is (Phase.PREFILL if step.tokens > 16 else Phase.DECODE)
        log.add(step)
    trace = log.trace()
    assert (trace.counts(0, len(tokens)) == np.stack([step.rows for step in taken])).all()


def test_ids_of_other_machines_do_not_count():
    taken = []
    steps = Steps(taken.append)
    steps(random_layer().pack(), torch.tensor([[0, EXPERTS + 3]], dtype=torch.int32))
    steps.end()
    assert taken[0].rows.sum() == 1


def test_steps_of_several_models_make_no_trace():
    log = TraceLog()
    for sizes in ((2, 8, 8), (3, 8, 8)):
        steps = Steps(log.add)
        steps(random_layer(sizes=sizes).pack(), torch.zeros(1, 1, dtype=torch.int64))
        steps.end()
    with pytest.raises(ValueError, match=r"several models.*\(1, 2\), \(1, 3\)"):
        log.trace()
    assert TraceLog().trace() is None


def test_observers_hear_of_calls_while_they_are_there():
    layer, heard = random_layer().pack(), []
    x, ids, weights = random_inputs(3)
    with observing(lambda experts, ids_TK: heard.append((experts, ids_TK.clone()))):
        with observing(lambda *_: heard.append(None)):
            moe(x, ids, weights, layer)
        moe(x, ids, weights, layer)
    moe(x, ids, weights, layer)
    assert len(heard) == 3 and heard[1] is None
    assert all(h[0] is layer and torch.equal(h[1], ids) for h in heard if h)


def test_a_call_that_is_refused_is_not_heard_of():
    layer, heard = random_layer().pack(), []
    x, ids, weights = random_inputs(3)
    with observing(lambda *_: heard.append(1)), pytest.raises(ValueError, match="ids"):
        moe(x, ids - EXPERTS, weights, layer)
    assert not heard


def test_observers_leave_when_their_block_fails():
    observers, heard = Observers(), []
    with pytest.raises(RuntimeError), observers.added(lambda *_: heard.append(1)):
        raise RuntimeError
    observers(random_layer().pack(), torch.zeros(1, 1, dtype=torch.int64))
    assert not heard


def test_what_a_profile_had_fades_with_what_is_added(tmp_path):
    path = tmp_path / "profile.npz"
    before = RoutingProfile(1, EXPERTS, half_life=10.0)
    before.record_counts(np.full((1, EXPERTS), 8.0), np.full((1, EXPERTS), 8.0), 8, 8, Phase.DECODE)
    before.save(path)
    recording = Recording(None, path)
    layer, (x, ids, weights) = random_layer().pack(), random_inputs(1)
    with recording.running():
        for _ in range(10):
            moe(x, torch.zeros_like(ids[:, :1]), weights[:, :1], layer)
    for _ in range(2):  # to save again adds nothing again
        recording.save()
        after = RoutingProfile.load(path)
        assert after.half_life == 10.0
        assert after.rows(Phase.DECODE)[0, 1:] == pytest.approx(4.0)  # ten tokens are one half-life
        assert 4.0 + 7 < after.rows(Phase.DECODE)[0, 0] < 4.0 + 10


def test_a_new_profile_forgets_slowly(tmp_path):
    recording = Recording(None, tmp_path / "profile.npz")
    layer, (x, ids, weights) = random_layer().pack(), random_inputs(1)
    with recording.running():
        moe(x, ids, weights, layer)
    recording.save()
    assert RoutingProfile.load(tmp_path / "profile.npz").half_life == HALF_LIFE


def test_nothing_is_written_where_nothing_was_recorded(tmp_path):
    recording = Recording(tmp_path / "trace.npz", tmp_path / "profile.npz")
    with recording.running():
        pass
    assert recording.save() == [] and not list(tmp_path.iterdir())


def test_a_profile_of_another_model_is_refused(tmp_path):
    RoutingProfile(3, 5).save(tmp_path / "profile.npz")
    recording = Recording(None, tmp_path / "profile.npz")
    recording.check((3, 5))
    with pytest.raises(ValueError, match=r"profile.npz is of \(3, 5\) layers and experts; the model has \(2, 5\)"):
        recording.check((2, 5))
    with pytest.raises(ValueError, match="no experts whose routing could be recorded"):
        recording.check((0, 0))
    Recording().check((0, 0))


def recorded(*paths: Path | None) -> Recording:
    recording = Recording(*paths)
    layer, inputs = random_layer().pack(), random_inputs(2)
    with recording.running():
        moe(*inputs, layer)
    return recording


@pytest.mark.parametrize("path", ["missing/file.npz", ".", "file/below.npz"])
def test_a_place_that_cannot_be_written_is_found_at_once(path, tmp_path):
    (tmp_path / "file").write_text("")
    for paths in ((tmp_path / path, None), (None, tmp_path / path)):
        with pytest.raises(ValueError, match="cannot be written"):
            Recording(*paths)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_profile_that_is_none_is_found_at_once(tmp_path):
    path = tmp_path / "profile.npz"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="is not a routing profile"):
        Recording(None, path)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_what_was_there_and_writes_the_other_file(failing, tmp_path, monkeypatch):
    files = tmp_path / "trace.npz", tmp_path / "profile.npz"
    for path in files:
        recorded(*(path if path == p else None for p in files)).save()
    before = [path.read_bytes() for path in files]
    recording, calls, sync = recorded(*files), [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=rf"{files[failing - 1].name} cannot be written: No space left"):
        recording.save()
    assert len(calls) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.npz", "trace.npz"]
    assert files[failing - 1].read_bytes() == before[failing - 1]
    monkeypatch.undo()
    assert recording.save() == list(files)


def test_a_file_that_can_be_written_stays_as_it_is(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    check_writable(path)
    check_writable(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"


class Recordings(RuleBasedStateMachine):
    """Recordings one after the other into the same files, steps that end and that do not, disks that are full."""

    @initialize(layers=st.integers(1, 3))
    def begin(self, layers):
        self.folder = tempfile.TemporaryDirectory()
        self.trace, self.profile = (Path(self.folder.name) / name for name in ("trace.npz", "profile.npz"))
        self.layers = [random_layer(sizes=(EXPERTS, 8, 8)).pack() for _ in range(layers)]
        self.counted = self.saved = RoutingProfile(layers, EXPERTS, HALF_LIFE)
        self.written: list[np.ndarray] = []
        self.reopen()

    @rule()
    def reopen(self):
        """What was not saved is gone."""
        self.recording, self.steps = Recording(self.trace, self.profile), []
        self.counted = self.saved.copy(HALF_LIFE)

    @rule(ids=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=20))
    def step(self, ids):
        rows = np.bincount(ids, minlength=EXPERTS)
        self.call(ids, len(self.layers))
        self.steps.append(rows)
        rows_LE = np.stack([rows] * len(self.layers))
        phase = Phase.PREFILL if len(ids) > 16 else Phase.DECODE
        self.counted.record_counts(rows_LE, np.minimum(rows_LE, 1), len(ids), 1, phase)

    @precondition(lambda self: self.steps and len(self.layers) > 1)
    @rule(ids=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=20))
    def broken_step(self, ids):
        self.call(ids, len(self.layers) - 1)

    def call(self, ids, layers):
        with self.recording.running():
            for layer in self.layers[:layers]:
                observe(layer, torch.tensor(ids)[:, None])

    @rule()
    def save(self):
        assert self.recording.save() == ([self.trace, self.profile] if self.steps else [])
        if self.steps:
            self.written, self.saved = list(self.steps), self.counted.copy(HALF_LIFE)

    @precondition(lambda self: self.steps)
    @rule()
    def save_on_a_full_disk(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self.full)
            with pytest.raises(ValueError, match="No space left"):
                self.recording.save()

    @staticmethod
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @invariant()
    def files_are_those_of_the_last_save(self):
        names = [path.name for path in (self.profile, self.trace) if self.written]
        assert sorted(p.name for p in Path(self.folder.name).iterdir()) == names
        if self.written:
            trace, profile = Trace.load(self.trace), RoutingProfile.load(self.profile)
            assert (trace.counts(0, trace.num_steps) == np.stack(self.written)[:, None]).all()
            for phase in Phase:
                assert profile.rows(phase) == pytest.approx(self.saved.rows(phase), rel=1e-9)
                assert profile.steps(phase) == pytest.approx(self.saved.steps(phase), rel=1e-9)

    def teardown(self):
        self.folder.cleanup()


TestRecordings = Recordings.TestCase
TestRecordings.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
