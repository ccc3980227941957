"""The parent's side of a process that runs an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ktcompile.bench.model.process import Loaded, command, environment
from ktcompile.bench.prefix.contenders import KINDS, Capacity, EngineContender
from ktcompile.bench.process import Worker


@dataclass(frozen=True, slots=True)
class Settings:
    """What all engines are told. folder: of the checkpoint. longest: tokens of a prompt. patience: seconds after which
    an engine that does not answer is ended."""

    folder: Path
    capacity: Capacity
    longest: int
    threads: int
    patience: float

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"--threads of {self.threads} cannot be; it must be 1 or more")
        if self.capacity.device < self.longest + self.capacity.block:
            raise ValueError(
                f"{self.capacity.device} tokens on the device are too few for prompts of {self.longest} and a block of "
                f"{self.capacity.block}; raise --kv-tokens, or lower --host-tokens or --longest"
            )


@dataclass(frozen=True, slots=True)
class Answer:
    """seconds: until the first token, which is `token`. wall_seconds: until nothing was left to do. cpu_seconds: of all
    cores, with what was left to do since the answer before. cached: tokens of the prompt that were found, by tier."""

    seconds: float
    wall_seconds: float
    cpu_seconds: float
    token: int
    cached: dict[str, int]


class EngineProcess(Worker):
    """Runs one engine, in the Python that has it. disk: a folder for its blocks."""

    def __init__(self, contender: EngineContender, settings: Settings, disk: Path) -> None:
        super().__init__(command(contender.python), environment(settings.threads), settings.patience)
        self._contender, self._settings, self._disk = contender, settings, disk
        self._cpu = 0.0

    def set_up(self) -> Loaded:
        """Load the model. ContenderError: it cannot be loaded."""
        settings = self._settings
        answer = self.ask(
            "set up",
            driver=KINDS[self._contender.kind].driver,
            model=str(settings.folder),
            requests=1,
            length=settings.longest + 1,
            kv=settings.capacity.options(self._contender, str(self._disk)),
        )
        return Loaded(**answer)

    def first(self, prompt: Sequence[int]) -> Answer:
        """Return what came of a prompt. ContenderError: nothing."""
        answer = self.ask("first", prompt=list(prompt))
        total = answer.pop("cpu_total")
        used, self._cpu = total - self._cpu, total
        return Answer(cpu_seconds=used, **answer)
