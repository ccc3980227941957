"""Count the instructions of a call of an MoE layer by the number of its experts, with callgrind.

The tokens of the call go to the same four experts each time, so the others cost memory and nothing else. Needs
valgrind and a build with tests: `make native-test`, then `python benchmarks/scaling.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DEFAULT_PROGRAM = Path(__file__).parents[1] / "build/dev/native/scaling"


def instructions(program: Path, experts: int) -> float:
    """Return the instructions of one call, all that `context::moe` does. RuntimeError: valgrind failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--toggle-collect=kt::context::moe*"]
        command += [f"--callgrind-out-file={folder}/out", str(program), str(experts)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    total = re.search(r"Collected : (\d+)", done.stderr)
    calls = re.match(r"(\d+) calls", done.stdout)
    if done.returncode or total is None or calls is None:
        raise RuntimeError(f"valgrind failed on {program}:\n{done.stderr}")
    return int(total[1]) / int(calls[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16, 64, 256, 1024], help="numbers of experts")
    parser.add_argument("--program", type=Path, default=DEFAULT_PROGRAM)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if not args.program.is_file():
        parser.error(f"{args.program} is missing; build it with `make native-test`")
    counts = {e: instructions(args.program, e) for e in args.experts}
    if args.json:
        print(json.dumps(counts))
        return 0
    least = min(counts.values())
    for experts, count in counts.items():
        print(f"{experts:6d} experts  {count:12,.0f} instructions a call  {100 * (count / least - 1):+.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
