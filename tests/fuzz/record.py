"""Feed the parser of records and the decoders with bytes that were never written.

    PYTHONPATH=tests .venv/bin/python -P tests/fuzz/record.py -runs=1000000

With atheris (the extra `fuzz`) guided by coverage; without it, at random and from a seed.
"""

from __future__ import annotations

import random
import sys
import time

try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None:
    with atheris.instrument_imports(include=["ktcompile.cache.record", "ktcompile.cache.codec"]):
        from helpers.record_fuzz import check_any_bytes, mutated, resealed, sealed
else:
    from helpers.record_fuzz import check_any_bytes, mutated, resealed, sealed


def one_input(data: bytes) -> None:
    check_any_bytes(data)
    check_any_bytes(mutated(data[:60]))
    check_any_bytes(resealed(data[:60]))
    if len(data) > 3:
        check_any_bytes(sealed(data[0] % 8, int.from_bytes(data[1:3], "little"), data[3:]))


def main() -> None:
    if atheris is not None:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
        return
    runs = next((int(arg[6:]) for arg in sys.argv if arg.startswith("-runs=")), 100_000)
    seed = time.time_ns()
    print(f"atheris is not installed; {runs} random inputs from seed {seed}")
    generator = random.Random(seed)
    for _ in range(runs):
        one_input(generator.randbytes(generator.randrange(400)))


if __name__ == "__main__":
    main()
