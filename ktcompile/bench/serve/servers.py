"""Servers that a benchmark starts itself, one after the other: each in the Python that has it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Beside the fields that a server is sent, what it may take of memory for keys and values.
VLLM_CACHE_GIB = 2
_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 1.0
_LINES_OF_COMPLAINT = 3
_LOOPBACK = "127.0.0.1"


class ServerError(Exception):
    """A server did not start, or has ended."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A server. package: that its Python must have. command: what follows the Python, of the model's folder and the
    port. environment: of the number of threads."""

    package: str
    what: str
    command: Callable[[Path, int], list[str]]
    environment: Callable[[int], Mapping[str, str]] = field(default=lambda threads: {"OMP_NUM_THREADS": str(threads)})


def _kt(model: Path, port: int) -> list[str]:
    run = "import sys; from ktcompile.cli import main; sys.exit(main())"
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    return [*safe, "-c", run, "serve", "--model", str(model), "--host", _LOOPBACK, "--port", str(port)]


def _vllm(model: Path, port: int) -> list[str]:
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", _LOOPBACK, "--port", str(port)]


def _transformers(model: Path, port: int) -> list[str]:
    run = "from transformers.cli.transformers import main; main()"
    return ["-c", run, "serve", str(model), "--continuous-batching", "--host", _LOOPBACK, "--port", str(port)]


KINDS = {
    "kt": Kind("ktcompile", "ktc serve", _kt, lambda threads: {"KTCOMPILE_NUM_THREADS": str(threads)}),
    "vllm": Kind(
        "vllm",
        "vLLM's server",
        _vllm,
        lambda threads: {
            "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, range(threads))),
        },
    ),
    "transformers": Kind("transformers", "transformers serve, with continuous batching", _transformers),
}


class Server:
    """A server in a process of its own, on a port of this machine that the kernel chose. To be closed."""

    def __init__(self, command: list[str], environment: Mapping[str, str], port: int) -> None:
        self.url = f"http://{_LOOPBACK}:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, until `close`
        # A session of its own: Ctrl-C is for the parent, which closes it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )

    def wait(self, patience: float) -> float:
        """Wait until it answers, and return the seconds that took. ServerError: it has ended, or takes too long."""
        begin = time.monotonic()
        pause = _SHORTEST_WAIT
        while not _answers(f"{self.url}/health") and not _answers(f"{self.url}/v1/models"):
            if self._process.poll() is not None:
                raise ServerError(self._last_words())
            if time.monotonic() - begin > patience:
                raise ServerError(f"it did not answer within {patience:g} s; {self._last_words()}")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT)
        return time.monotonic() - begin

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def resident_bytes(self) -> int:
        """Return the memory that it and what it started have now; 0 once it has ended."""
        total = 0
        try:
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                total += each.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        return total

    def close(self, patience: float = 20.0) -> None:
        """End it: politely, and after `patience` seconds not."""
        for which in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, which)
                try:
                    self._process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        status = self._process.poll()
        end = "" if status is None else f"it ended with status {status}: "
        return end + " / ".join(lines[-_LINES_OF_COMPLAINT:])


def start(kind: str, python: str, model: Path, threads: int) -> Server:
    """Return a server that has been started and does not answer yet."""
    port = free_port()
    known = KINDS[kind]
    return Server([python, *known.command(model, port)], known.environment(threads), port)


def free_port() -> int:
    """Return a port of the loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
