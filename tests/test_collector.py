"""The garbage collector while modules are imported."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from ktcompile import collector


@pytest.mark.parametrize("enabled", [True, False])
def test_it_rests_and_is_as_before(enabled):
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with collector.paused():
            assert not gc.isenabled()
            with collector.paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(RuntimeError), collector.paused():
            raise RuntimeError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_it_works_again_after_lazy_imports():
    code = "import gc, ktcompile; ktcompile.load; ktcompile.LLM; assert gc.isenabled()"
    subprocess.run([sys.executable, "-c", code], check=True)
