"""Python programs, and `ktc serve`, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def ktc_serve(*flags: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """Give a process that serves, its port, and the lines of its log so far."""
    command = [sys.executable, "-P", "-c", "import sys, ktcompile.cli as c; sys.exit(c.main())", "serve", "--eager"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", **variables}
    process = subprocess.Popen(
        [*command, "--port", "0", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    assert process.stdout and process.stderr
    errors = process.stderr
    reader = threading.Thread(target=lambda: log.extend(errors), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, (line, log)
        yield process, int(found[1]), log
    finally:
        process.kill()
        process.wait()
        reader.join(10)
