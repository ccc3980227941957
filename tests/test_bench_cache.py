"""Traces, replay and the oracle of `ktc bench cache`."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import random

import pytest

from ktcompile.bench.cache import belady, replay, synthetic, traces
from ktcompile.bench.cache.compare import BELADY, Rates, compare
from ktcompile.bench.serve.trace import BLOCK, TraceRequest
from ktcompile.cache import policies, recording
from ktcompile.cache.costs import Load, Recompute, Worth, saved, worth_loading
from ktcompile.cache.policy import Limits
from ktcompile.cache.recording import Asked, Recording
from ktcompile.cli import main

RATES = Rates(Recompute(1.0, 1 / 8192), (Load(), Load(), Load()))


def random_recording(seed: int, requests: int, branches: int = 2) -> Recording:
    """Return chains of a tree of blocks of 4 tokens; the last tokens of some prompts fill a block."""
    rng = random.Random(seed)
    asked = []
    for time in range(requests):
        path = tuple(rng.randrange(branches) for _ in range(rng.randrange(1, 4)))
        blocks = tuple(path[: index + 1] for index in range(len(path)))
        asked.append(Asked(float(time), 4 * len(path) + rng.choice((0, 1, 3)), blocks))
    return Recording(4, 8, asked)


def best_by_force(found: Recording, room: int) -> int:
    """Return the most tokens that can be found, of all ways to keep at most `room` blocks with those before them."""
    states = {frozenset(): 0}
    for request in found.requests:
        following: dict[frozenset, int] = {}
        for here, hits in states.items():
            own = sum(1 for _ in itertools.takewhile(here.__contains__, found.usable(request)))
            known = here | set(request.blocks)
            for size in range(min(room, len(known)) + 1):
                for kept in map(frozenset, itertools.combinations(sorted(known), size)):
                    if all(len(block) == 1 or block[:-1] in kept for block in kept):
                        following[kept] = max(following.get(kept, -1), hits + own)
        states = following
    return max(states.values()) * found.block_size


@pytest.mark.parametrize("seed", range(30))
def test_no_way_to_keep_prefixes_finds_more_than_belady(seed):
    found = random_recording(seed, requests=9)
    for room in (1, 2, 4):
        assert belady.most_hits(found, room * found.block_bytes) == best_by_force(found, room)


@pytest.mark.parametrize("kind", synthetic.KINDS)
@pytest.mark.parametrize("name", policies.NAMES)
def test_no_policy_finds_more_than_belady_nor_than_there_is(kind, name):
    found = traces.of_requests(synthetic.generate(kind, 150, seed=5), 16)
    for share in (0.1, 0.5, 1.0):
        best, result = compare({kind: found}, [name], [(share,)], RATES)
        assert best.policy == BELADY
        assert result.token_hit_rate <= best.token_hit_rate < 1
        if share == 1.0:
            assert result.token_hit_rate == best.token_hit_rate
        if kind == "nothing":
            assert best.token_hit_rate == 0 and best.of_belady is None


def blocks_one_by_one(found: Recording) -> Recording:
    """Return blocks that are asked for one at a time, which is all that other simulators know."""
    asked = [Asked(r.time, 2 * found.block_size, (block,)) for r in found.requests for block in r.blocks]
    return Recording(found.block_size, found.block_bytes, asked)


@pytest.mark.skipif(not importlib.util.find_spec("libcachesim"), reason="libcachesim is not installed (extra dev)")
@pytest.mark.parametrize("kind", ["chat", "documents"])
def test_the_oracle_and_lru_agree_with_libcachesim(kind, tmp_path):
    import libcachesim

    found = blocks_one_by_one(traces.of_requests(synthetic.generate(kind, 400, seed=5), 1))
    names: dict[object, int] = {}
    numbers = [names.setdefault(r.blocks[0], len(names) + 1) for r in found.requests]
    room = len(names) // 5
    following, nexts = {}, [0] * len(numbers)
    for index in range(len(numbers) - 1, -1, -1):
        nexts[index] = following.get(numbers[index], -1)
        following[numbers[index]] = index + 1
    hits = {}
    for name, cache in (
        ("belady", libcachesim.Belady(cache_size=room)),
        ("lru", libcachesim.LRU(cache_size=room)),
    ):
        hits[name] = 0
        for index, (number, following_use) in enumerate(zip(numbers, nexts, strict=True)):
            use = following_use if following_use > 0 else (1 << 63) - 1
            request = libcachesim.Request(obj_id=number, obj_size=1, clock_time=index, next_access_vtime=use)
            hits[name] += cache.get(request)
    tier = replay.Tier(policies.make("lru", Limits(room * found.block_bytes)))
    assert replay.replay(found, [tier], RATES.recompute).hit_blocks == hits["lru"]
    own = belady.most_hits(found, room * found.block_bytes) // found.block_size
    # Theirs has to take each block that comes, ours may pass it by.
    assert hits["belady"] <= own <= 1.02 * hits["belady"]


def test_what_a_tier_gives_up_is_found_in_the_next():
    found = random_recording(1, requests=200, branches=3)
    room = 6 * found.block_bytes
    one = replay.replay(found, [replay.Tier(policies.make("lru", Limits(room)))], RATES.recompute)
    three = [replay.Tier(policies.make("lru", Limits(size))) for size in (room, room, 10**6)]
    score = replay.replay(found, three, RATES.recompute)
    assert one.hit_tokens[0] == score.hit_tokens[0] > 0
    assert min(score.hit_tokens[1:]) > 0
    # Nothing is lost, so all but the first time is found.
    assert sum(score.hit_tokens) == belady.most_hits(found, 10**6)
    assert score.tokens == sum(r.tokens for r in found.requests) > sum(score.hit_tokens)


def test_nothing_is_loaded_that_is_computed_faster():
    found = random_recording(1, requests=200, branches=3)
    slow = Load(latency=0.0, bytes_per_second=found.block_bytes / (10 * found.block_size))
    tiers = [replay.Tier(policies.make("lru", Limits(room)), load) for room, load in ((48, Load()), (10**6, slow))]
    score = replay.replay(found, tiers, Recompute(1.0))
    assert score.hit_tokens[0] > 0 and score.hit_tokens[1] == 0 == score.saved_seconds[1]


def test_costs_of_computing_and_loading():
    recompute = Recompute(2.0, 0.5)
    by_token = sum(2.0 + 0.5 * position for position in range(3, 7))
    assert recompute.seconds(3, 7) == by_token == recompute.seconds(0, 7) - recompute.seconds(0, 3)
    load = Load(latency=1.0, bytes_per_second=8.0)
    assert load.seconds(16) == 3.0
    assert saved(recompute, load, 3, 7, 16) == by_token - 3.0
    assert worth_loading(recompute, load, 3, 7, 16) and not worth_loading(recompute, load, 0, 1, 8)
    worth = Worth(recompute, load, block_size=4, weight=1.0)
    assert worth.of(4, 16) == (recompute.seconds(4, 8) - 2.0) / 16
    assert worth.of(0, 10**6) == 0.0 == Worth(recompute, load, 4).of(0, 10**6)
    assert Worth(recompute, load, 4).of(4, 16) == 1.0
    for wrong in ({"per_token": 0.0}, {"per_token": 1.0, "per_position": -1.0}):
        with pytest.raises(ValueError, match="prefill cannot take"):
            Recompute(**wrong)
    with pytest.raises(ValueError, match="a tier cannot take"):
        Load(bytes_per_second=0.0)


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_traffic_follows_from_its_seed(kind):
    first = synthetic.generate(kind, 80, seed=3)
    assert first == synthetic.generate(kind, 80, seed=3) != synthetic.generate(kind, 80, seed=4)
    assert synthetic.generate(kind, 40, seed=3) == first[:40]
    assert [r.timestamp for r in first] == sorted(r.timestamp for r in first)
    before: dict[int, int | None] = {}
    for request in first:
        assert len(request.hash_ids) == -(-request.input_length // BLOCK)
        for block, parent in zip(request.hash_ids, (None, *request.hash_ids), strict=False):
            assert before.setdefault(block, parent) == parent
    shared = sum(len(r.hash_ids) for r in first) > len(before)
    assert shared == (kind != "nothing")


def test_traffic_that_cannot_be():
    with pytest.raises(ValueError, match="traffic 'x' is unknown; there are chat"):
        synthetic.generate("x", 1, 0)
    with pytest.raises(ValueError, match="0 requests of seed 0"):
        synthetic.generate("chat", 0, 0)


def test_a_recording_gives_back_what_was_asked_without_keys(tmp_path):
    path = tmp_path / "a.jsonl"
    keys = [bytes([n]) * 32 for n in range(3)]
    with path.open("w") as file:
        recorder = recording.Recorder(file, block_size=16, block_bytes=1000)
        recorder.record(2.0, 40, keys[:2], tenant="mine")
        recorder.record(1.0, 20, keys[:1])
    found = traces.read(path, bytes_per_token=1)
    assert (found.block_size, found.block_bytes) == (16, 1000)
    first, second = found.requests
    assert (first.time, first.tokens, first.tenant, second.tokens) == (1.0, 20, "", 40)
    assert second.blocks[:1] == first.blocks and len(set(second.blocks)) == 2
    text = path.read_text()
    assert "mine" not in text and keys[0].hex()[:8] not in text
    assert traces.read(path, 1, limit=1).requests == [first]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "line 2"),
        ('{"time": 0, "tokens": 0, "blocks": []}', "line 2: 0 must be a whole number above 0"),
        ('{"time": 0, "tokens": 31, "blocks": ["a", "b"]}', "line 2: 2 blocks, each of its own"),
        ('{"time": 0, "tokens": 32, "blocks": ["a", "a"]}', "line 2: 2 blocks, each of its own"),
        ('{"tokens": 32, "blocks": []}', "line 2: 'time'"),
        ("", "line 2"),
    ],
)
def test_a_recording_that_cannot_be(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    file = io.StringIO()
    recording.Recorder(file, 16, 1000)
    path.write_text(file.getvalue() + line + "\n")
    with pytest.raises(ValueError, match=words):
        recording.read(path)


def test_a_trace_whose_blocks_are_no_prefixes_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [{"timestamp": t, "input_length": 1024, "output_length": 1, "hash_ids": [t, 7]} for t in (0, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="block 7 follows on different ones"):
        traces.read(path, 1)


def test_blocks_that_are_not_full_are_not_kept():
    found = traces.of_requests([TraceRequest(0.0, 2 * BLOCK + 1, 1, (1, 2, 3))], 10)
    assert found.requests[0].blocks == (1, 2)
    assert traces.footprint(found) == 2 * BLOCK * 10


def test_the_command_compares_policies(capsys, tmp_path):
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    arguments = ["--traffic", "chat", "--requests", "60", "--capacities", "20", "50", "--policies", "lru", "value"]
    assert main(["bench", "cache", *arguments, "--json", "--out", str(out), "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    assert report["simulated"] and report["traces"]["chat"]["requests"] == 60
    assert [(r["share"], r["policy"]) for r in report["results"]] == [
        ([share], policy) for share in (0.2, 0.5) for policy in ("belady", "lru", "value")
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_replays_three_tiers_of_a_file(capsys, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": 1e3 * r.timestamp,
                    "input_length": r.input_length,
                    "output_length": 1,
                    "hash_ids": r.hash_ids,
                }
            )
            + "\n"
            for r in synthetic.generate("documents", 60, 1)
        )
    )
    assert main(["bench", "cache", "--trace", str(path), "--tiers", "5", "20", "75", "--policies", "lru"]) == 0
    shown = capsys.readouterr().out
    assert "trace.jsonl" in shown and "5+20+75" in shown and "disk %" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--capacities", "0"], "a capacity of 0 %"),
        (["--policies", "best"], "policy 'best' is unknown"),
        (["--traffic", "best"], "traffic 'best' is unknown"),
        (["--prefill-rate", "0"], "--prefill-rate is 0"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, arguments, words):
    assert main(["bench", "cache", "--requests", "5", *arguments]) == 2
    assert words in capsys.readouterr().err
