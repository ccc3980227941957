"""The committed stub of the native module is what the module says of itself."""

from __future__ import annotations

from pathlib import Path

from nanobind.stubgen import StubGen

from ktcompile import _native

STUB = Path(__file__).parents[1] / "ktcompile/_native.pyi"


def test_the_stub_is_current() -> None:
    generator = StubGen(_native)
    generator.put(_native)
    assert STUB.read_text() == generator.get(), "run `make format`"
