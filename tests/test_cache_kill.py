"""A process that is killed while it publishes records: the next one finds each whole or not at all."""

from __future__ import annotations

import os
import random
from pathlib import Path

from helpers.processes import run_python

ROOT = Path(__file__).parents[1]
# `make nightly` says more.
KILLS = int(os.environ.get("KT_TEST_KILLS", "50"))
# The package's own __init__ loads torch.
WITHOUT_TORCH = f"""
import sys, types
package = types.ModuleType("ktcompile")
package.__path__ = [{str(ROOT / "ktcompile")!r}]
sys.modules["ktcompile"] = package
sys.path.insert(0, {str(ROOT / "tests")!r})
"""


def test_the_tiers_need_no_torch():
    program = WITHOUT_TORCH + "import ktcompile.cache.tiers, ktcompile.cache.vfs; print('torch' in sys.modules)"
    assert run_python(program).strip() == "False"


def test_nothing_wrong_is_served_after_a_kill_at_any_point(tmp_path):
    call = f"run(Path({str(tmp_path / 'kv')!r}), {KILLS}, {random.randrange(1 << 30)})"
    program = WITHOUT_TORCH + f"from pathlib import Path\nfrom helpers.kill_loop import run\nprint({call})"
    assert int(run_python(program, timeout=60 + 2 * KILLS)) > 10 * KILLS
