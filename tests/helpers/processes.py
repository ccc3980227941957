"""Python programs in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_python(program: str, *, timeout: float = 120, env: dict[str, str] | None = None) -> str:
    """Return what `program` prints. AssertionError, with all of its output: it fails, or hangs for `timeout` seconds.

    env: added to this process's variables, without those of ktcompile.
    """
    variables = {k: v for k, v in os.environ.items() if not k.startswith("KTCOMPILE_")}
    command = [sys.executable, "-P", "-c", textwrap.dedent(program)]
    try:
        result = subprocess.run(command, env=variables | (env or {}), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"hung for {timeout} s\n{error.stdout}\n{error.stderr}") from error
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout
