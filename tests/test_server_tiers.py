"""A server over an engine with tiers: metrics, receipts, and what is left when it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.engines import engine_of
from helpers.servers import call, running
from helpers.text_model import build_model

from ktcompile.server.options import ServerOptions


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_server_tells_of_its_tiers_and_writes_them_at_its_end(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    engine = engine_of(build_model(positions=256), eager=True, kv_disk_path=tmp_path / "kv")
    body = {"model": "model", "messages": [{"role": "user", "content": "x" * 60}], "max_tokens": 3}
    with running(engine, ServerOptions(port=0, cache_receipts=True)) as server:
        usages = [call(server, "/v1/chat/completions", body).json["usage"] for _ in range(2)]
        stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
        usages.append(call(server, "/v1/chat/completions", stream).events[-1]["usage"])
        metrics = call(server, "/metrics").body.decode()
    for usage, cached in zip(usages, (0, 56, 56), strict=True):
        receipt = usage["cache_receipt"]
        tiers = [receipt[f"{name}_tokens"] for name in ("device", "host", "disk", "computed")]
        assert sum(tiers) == usage["prompt_tokens"] >= 60
        assert sum(tiers[:3]) == usage["prompt_tokens_details"]["cached_tokens"] == cached
    demoted = next(line for line in metrics.splitlines() if line.startswith("vllm:kv_tier_demoted_total"))
    assert float(demoted.split()[-1]) >= 7
    assert "vllm:prefix_cache_evictions_total" in metrics
    assert len(list((tmp_path / "kv").glob("*.ktkv"))) >= 7
    assert set(threading.enumerate()) <= before


def test_receipts_are_sent_to_who_asks_only() -> None:
    engine = engine_of(build_model(positions=256), eager=True)
    body = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    with running(engine) as server:
        reply = call(server, "/v1/chat/completions", body).json
        assert "cache_receipt" not in reply["usage"]
        assert "kv_tier" not in call(server, "/metrics").body.decode()
