"""The parent's side of processes that run contenders.

They are stopped while it is not their turn: threads that spin while they wait, as some peers' do, then take nothing
from the others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ktcompile.bench.contenders import Contender
from ktcompile.bench.shapes import MoeShape

_SCRIPT = Path(__file__).with_name("worker.py")
_PATIENCE = 900.0


class ContenderError(Exception):
    """A contender, or the process that it is in, did not do what it was asked for."""


class Worker:
    """A process that answers a JSON line with another, which begins with @.

    `alive` is False once the process has ended, whoever ended it. environment: what it has beside this process's.
    patience: seconds after which a process that does not answer is ended.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, patience: float = _PATIENCE
    ) -> None:
        self._patience = patience
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115, until `close`
        # A session of its own: Ctrl-C is for the parent, which closes it, and what it starts stops with it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self.alive = True

    def close(self) -> None:
        if self._complaints.closed:
            return
        self.alive = False
        self._signal(signal.SIGKILL)
        self._process.communicate()
        self._complaints.close()

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """Return the answer. ContenderError: a problem, the end of the process, or no answer in time."""
        if not self.alive:
            raise ContenderError("its process has ended")
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        alarm = threading.Timer(self._patience, self._signal, [signal.SIGKILL])
        alarm.daemon = True
        alarm.start()
        try:
            self._process.stdin.write(json.dumps({"do": what, **request}) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("@"):
                    answer: dict[str, Any] = json.loads(line[1:])
                    break
            else:
                raise ContenderError(self._last_words())
        except BrokenPipeError:
            raise ContenderError(self._last_words()) from None
        finally:
            alarm.cancel()
        self._signal(signal.SIGSTOP)
        if "problem" in answer:
            raise ContenderError(answer["problem"])
        return answer

    def _signal(self, which: signal.Signals) -> None:
        """Send a signal to the process and to what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, which)

    def _last_words(self) -> str:
        self.alive = False
        status = self._process.wait()
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its process ended with status {status}"


class ContenderProcess(Worker):
    """Runs the contenders of one library on MoE layers."""

    def __init__(self) -> None:
        safe = ["-P"] if sys.version_info >= (3, 11) else []
        super().__init__([sys.executable, *safe, str(_SCRIPT)])

    def set_up(self, contenders: Sequence[Contender], shape: MoeShape, max_tokens: int) -> dict[str, str]:
        """Pack the weights; return why contenders cannot run, by name."""
        dimensions = [shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size]
        answer = self.ask(
            "set up",
            library=contenders[0].library,
            shape=dimensions,
            threads=contenders[0].threads,
            contenders=[c.setup(max_tokens) for c in contenders],
        )
        problems: dict[str, str] = answer["problems"]
        return problems

    def rows(self, contender: str, tokens: int) -> list[list[float]]:
        """Return what the contender computes from `worker.make_inputs`, [tokens, hidden_size]."""
        rows: list[list[float]] = self.ask("check", contender=contender, tokens=tokens)["rows"]
        return rows

    def time(self, contender: str, tokens: int, turn: int, budget: float) -> tuple[list[float], list[int]]:
        """Return the seconds and the distinct experts of each call of a turn of about `budget` seconds."""
        answer = self.ask("time", contender=contender, tokens=tokens, turn=turn, budget=budget)
        return answer["seconds"], answer["distinct"]
