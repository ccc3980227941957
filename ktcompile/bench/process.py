"""The parent's side of a process that runs contenders.

It is stopped while it is not its turn: threads that spin while they wait, as some peers' do, then take nothing from
the others.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktcompile.bench.contenders import Contender
from ktcompile.bench.shapes import MoeShape

_SCRIPT = Path(__file__).with_name("worker.py")
_PATIENCE = 900.0


class ContenderError(Exception):
    """A contender, or the process that it is in, did not do what it was asked for."""


class ContenderProcess:
    """Runs the contenders of one library. `alive` is False once the process has ended, whoever ended it."""

    def __init__(self) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115, until `close`
        # A session of its own: Ctrl-C is for the parent, which closes it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)] if sys.version_info >= (3, 11) else [sys.executable, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            start_new_session=True,
        )
        self.alive = True

    def set_up(self, contenders: Sequence[Contender], shape: MoeShape, max_tokens: int) -> dict[str, str]:
        """Pack the weights; return why contenders cannot run, by name."""
        dimensions = [shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size]
        answer = self._ask(
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
        rows: list[list[float]] = self._ask("check", contender=contender, tokens=tokens)["rows"]
        return rows

    def time(self, contender: str, tokens: int, turn: int, budget: float) -> tuple[list[float], list[int]]:
        """Return the seconds and the distinct experts of each call of a turn of about `budget` seconds."""
        answer = self._ask("time", contender=contender, tokens=tokens, turn=turn, budget=budget)
        return answer["seconds"], answer["distinct"]

    def close(self) -> None:
        self.alive = False
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        """Return the answer. ContenderError: a problem, the end of the process, or no answer in time."""
        if not self.alive:
            raise ContenderError("its process has ended")
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        alarm = threading.Timer(_PATIENCE, self._process.kill)
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
        self._process.send_signal(signal.SIGSTOP)
        if "problem" in answer:
            raise ContenderError(answer["problem"])
        return answer

    def _last_words(self) -> str:
        self.alive = False
        status = self._process.wait()
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its process ended with status {status}"
