"""The parent's side of a process that runs a whole model."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktcompile.bench.model.contenders import KINDS, VLLM_CACHE_GIB, ModelContender
from ktcompile.bench.model.demand import CONTEXT, Work
from ktcompile.bench.process import ContenderError, Worker

_DRIVERS = Path(__file__).with_name("drivers")
# A prompt is repeated until its calls took so long together, since a short one alone is timed badly.
_LEAST_SECONDS = 0.5
_LOGIT_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What the processes of all contenders are told.

    folder: of the checkpoint. works: what they will be asked for. steps: of decode in a turn. threads: of each.
    cache: of transformers' models, dynamic or static. gguf: folder for files of llama.cpp, and files that are there,
    by format. patience: seconds after which a contender that does not answer is ended.
    """

    folder: Path
    works: tuple[Work, ...]
    steps: int
    threads: int
    cache: str
    gguf_folder: Path
    gguf_files: dict[str, Path]
    patience: float

    def __post_init__(self) -> None:
        sizes = [("batches and prompts", work.size) for work in self.works]
        for name, value in (("--steps", self.steps), ("--threads", self.threads), *sizes):
            if value < 1:
                raise ValueError(f"{name} of {value} cannot be; it must be 1 or more")
        if not self.works:
            raise ValueError("there is nothing to measure: name --batches or --prompts")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is in memory. facts: bytes of its weights, where its library says more than its name does."""

    load_seconds: float
    resident_bytes: int | None
    versions: dict[str, str]
    facts: dict[str, float]


class ModelProcess(Worker):
    """Runs one contender, in the Python that has it."""

    def __init__(self, contender: ModelContender, settings: Settings) -> None:
        variables = {**environment(settings.threads), "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB)}
        super().__init__(command(contender.python), variables, settings.patience)
        self._contender, self._settings = contender, settings

    def set_up(self) -> Loaded:
        """Load the model. ContenderError: it cannot be loaded."""
        contender, settings = self._contender, self._settings
        requests = max(work.requests for work in settings.works)
        lengths = [(work.requests, CONTEXT if work.kind == "decode" else work.size) for work in settings.works]
        request: dict[str, Any] = {
            "driver": KINDS[contender.kind].driver,
            "model": str(settings.folder),
            "kind": contender.kind,
            "variant": contender.variant,
            "cache": settings.cache,
            "threads": settings.threads,
            "steps": settings.steps,
            "requests": requests,
            # Requests of a large batch do not all begin in the same step of an engine.
            "length": max(length for _, length in lengths) + settings.steps + requests,
            "tokens": max(number * (length + settings.steps + 1) for number, length in lengths),
        }
        if contender.kind == "llama.cpp":
            request["gguf"] = str(gguf(contender, settings))
        return Loaded(**self.ask("set up", **request))

    def time(self, work: Work, turn: int, steps: int) -> tuple[list[float], list[int], int | None]:
        """Return the seconds of each call, the tokens that the first step of decode was given, and the most memory so
        far. turn: prompts depend on it."""
        a = self.ask("run", work=work.kind, size=work.size, seed=turn, steps=steps, least_seconds=_LEAST_SECONDS)
        return a["seconds"], a["tokens"], a["peak_bytes"]

    def logits(self) -> np.ndarray:
        """Return the logits after some prompts, all of them in one row. ContenderError: the library gives none."""
        answer = self.ask("logits", prompts=_LOGIT_PROMPTS, length=CONTEXT)
        return np.frombuffer(base64.b64decode(answer["logits"]), np.float32)


def command(python: str) -> list[str]:
    """Return what starts a process that runs a driver."""
    return [python, str(_DRIVERS / "model_worker.py")]


def environment(threads: int) -> dict[str, str]:
    """Return what the process of any library has in its environment."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "OMP_NUM_THREADS": str(threads),
        "KTCOMPILE_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",  # the model is a folder
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        # A prompt may be as long as the model's positions, and the engine wants room for an answer.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def gguf(contender: ModelContender, settings: Settings) -> Path:
    """Return the file that llama.cpp loads, made of the checkpoint if it is not there. ContenderError: it cannot be."""
    given = settings.gguf_files
    if contender.variant in given:
        return given[contender.variant]
    settings.gguf_folder.mkdir(parents=True, exist_ok=True)
    plain = given.get("bf16", settings.gguf_folder / "bf16.gguf")
    if not plain.exists():
        _convert(contender.python, [str(settings.folder), "bf16", str(plain)])
    if contender.variant == "bf16":
        return plain
    file = settings.gguf_folder / f"{contender.variant}.gguf"
    if not file.exists():
        _convert(contender.python, [str(plain), contender.variant, str(file)])
    return file


def _convert(python: str, arguments: Sequence[str]) -> None:
    done = subprocess.run(
        [python, str(_DRIVERS / "gguf_file.py"), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ContenderError(f"no GGUF file: {lines[-1] if lines else f'status {done.returncode}'}")
