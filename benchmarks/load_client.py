"""What `ktc bench serve` itself costs and how right its times are, against a server that runs no model and writes down
when it sent each token.

Prints, for some loads: by how much times to the first token and between tokens differ from the server's, and the
processor time of the client for a token. With --check the exit status is 1 if a median, or the 90th percentile on a
machine where nothing else runs, is off by a millisecond."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

from ktcompile.bench.serve import load, probe
from ktcompile.bench.serve.arrivals import ClosedLoop, OpenLoop
from ktcompile.bench.serve.lengths import Lengths
from ktcompile.bench.serve.workload import Workload, random_requests

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.fake_openai import running

_BAR = 1e-3
_IDLE = 0.5
# More requests that are sent at the same moment wait for each other, here and in the server: that is no mistake.
_AT_ONCE = 8
# As the client has it, so that other programs delay neither; needs root.
_NICE = -15 if os.geteuid() == 0 else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    percents = 90 if os.getloadavg()[0] < _IDLE else 50
    print(f"load {os.getloadavg()[0]:.1f}; ms: difference from the server's own times, median, p90, p99")
    wrong = False
    for gap, tokens, arrivals in (
        (0.02, 64, ClosedLoop(1)),
        (0.02, 64, ClosedLoop(8)),
        (0.02, 64, OpenLoop(4)),
        (0.05, 64, ClosedLoop(32)),
    ):
        ttft, itl, cost, rate = measure(0.05, gap, tokens, arrivals)
        print(f"{arrivals!s:28} {rate:6.0f} tokens/s, client {1e6 * cost:5.0f} us/token", end="")
        for name, errors in (("ttft", ttft), ("itl", itl)):
            p50, p90, p99 = np.percentile(np.abs(errors), (50, 90, 99)) * 1e3
            print(f"  {name} {p50:.3f} {p90:.3f} {p99:.3f}", end="")
            burst = name == "ttft" and isinstance(arrivals, ClosedLoop) and arrivals.concurrency > _AT_ONCE
            wrong |= not burst and bool(np.percentile(np.abs(errors), percents) > _BAR)
        print()
    return int(args.check and wrong)


def measure(first, gap, tokens, arrivals):
    """Return the differences in seconds, the client's processor seconds for a token, and tokens per second."""
    requests = random_requests(48, Lengths(128), Lengths(tokens), arrivals, 0)
    workload = Workload(requests, arrivals, 0, "")
    outcomes = []
    with running(_NICE, first=first, gap=gap) as url:
        target = asyncio.run(probe.find(url, None, "completions", workload, api_key=None, extra={}, timeout=10))
        begin, busy = time.perf_counter(), time.process_time()
        run = load.run(url, target.model, target.dialect, workload, api_key=None, timeout=60, keep=outcomes.append)
        asyncio.run(run)
        busy, seconds = time.process_time() - busy, time.perf_counter() - begin
        with urllib.request.urlopen(f"{url}/seen") as answer:
            seen = {tuple(s["body"]["prompt"]): s for s in json.load(answer)}
    ttft, itl = [], []
    for o in outcomes:
        own = seen[tuple(workload.prompt(requests[o.index]))]
        assert o.tokens == tokens == len(own["times"])
        ttft.append(o.ttft - (own["times"][0] - own["received"]))
        itl += list(np.array(o.gaps()) - np.diff(own["times"]))
    produced = tokens * len(outcomes)
    return ttft, itl, busy / produced, produced / seconds


if __name__ == "__main__":
    sys.exit(main())
