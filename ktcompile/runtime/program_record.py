"""What a `_native.Program` is made of, as JSON has it."""

from __future__ import annotations

from typing import Any, NamedTuple

from ktcompile import _native


class Step(NamedTuple):
    """One operation. op: the name of an `Opcode`. arrays: by number. outs: how many arrays it gives. whole, real:
    numbers, (value, -1) or (0, which argument). packed: which layer, -1 for none."""

    op: str
    arrays: list[int]
    outs: int
    whole: list[tuple[int, int]]
    real: list[tuple[float, int]]
    packed: int


class ProgramRecord(NamedTuple):
    """A program. tensors: names of the elements of those that it is given; whole, real, packed: how many numbers and
    layers come behind them. results: the numbers of the arrays that it returns."""

    tensors: list[str]
    whole: int
    real: int
    packed: int
    steps: list[Step]
    results: list[int]

    @classmethod
    def of_json(cls, value: list[Any]) -> ProgramRecord:
        """Return the record that JSON has as a list."""
        tensors, whole, real, packed, steps, results = value
        return cls(tensors, whole, real, packed, [Step(*step) for step in steps], results)

    def program(self) -> _native.Program:
        """Return the program. ValueError: steps or arrays are not such of one."""
        elements = [getattr(_native.Element, name) for name in self.tensors]
        program = _native.Program(elements, self.whole, self.real)
        for op, arrays, outs, whole, real, packed in self.steps:
            numbers = [(value, place) for value, place in whole], [(value, place) for value, place in real]
            program.add(getattr(_native.Opcode, op), arrays, outs, *numbers, packed)
        program.finish(self.results)
        return program
