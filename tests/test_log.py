"""Where it is said what goes on."""

from __future__ import annotations

import io
import logging

import pytest

from ktcompile.log import logger, tell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_goes_on_is_in_the_log_or_else_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal, file = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    with caplog.at_level(logging.INFO, logger.name):
        tell("loading")
    assert caplog.messages == ["loading"] and terminal.getvalue() == ""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger.name):
        tell("tracing")
        monkeypatch.setattr("sys.stderr", file)
        tell("tracing")
    assert caplog.messages == [] and file.getvalue() == ""
    assert terminal.getvalue() == "ktcompile: tracing\n"
