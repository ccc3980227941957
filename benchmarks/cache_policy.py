"""What a call of a policy of the prefix cache takes by the number of blocks: O(log n), so little more with many.

    python benchmarks/cache_policy.py                        # 10^4, 10^5 and 10^6 blocks
    python benchmarks/cache_policy.py --blocks 10000 --policies lru

A full tier has any of its blocks used, and then gives one up for one that comes; time of the process's CPU, of the
fastest of 5 batches of 4,000 such pairs of calls. What it shows is right by tests/test_cache_policy.py, and comparisons
are counted by tests/test_cache_value.py.
"""

from __future__ import annotations

import argparse
import random
import time

from ktcompile.cache import policies
from ktcompile.cache.policy import Limits

_BATCHES, _PAIRS = 5, 4000
# Seconds between two calls.
_STEP = 0.01


def nanoseconds(name: str, blocks: int) -> float:
    """Return what a call takes."""
    rng = random.Random(0)
    policy = policies.make(name, Limits(blocks))
    for key in range(blocks):
        policy.insert(key, None, 1, 0, key * _STEP)
    best = float("inf")
    coming = blocks
    for _ in range(_BATCHES):
        used = [rng.randrange(blocks) for _ in range(_PAIRS)]
        begin = time.process_time()
        for key in used:
            policy.touch(key, coming * _STEP)
            policy.insert(coming, None, 1, 0, coming * _STEP)
            coming += 1
        best = min(best, time.process_time() - begin)
    return best / (2 * _PAIRS) * 1e9


def main() -> None:
    """Print a line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[10**4, 10**5, 10**6])
    parser.add_argument("--policies", nargs="+", default=list(policies.NAMES))
    args = parser.parse_args()
    print("ns a call  " + "".join(f"{blocks:>12,d}" for blocks in args.blocks))
    for name in args.policies:
        print(f"{name:10s} " + "".join(f"{nanoseconds(name, blocks):12.0f}" for blocks in args.blocks), flush=True)


if __name__ == "__main__":
    main()
