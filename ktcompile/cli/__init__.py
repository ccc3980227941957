"""The command line `ktc`: one module for each command, with `add_parser` and what runs it."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from ktcompile import __version__
from ktcompile.cli import bench, cache, chat, doctor, generate, pack, plan, serve, simulate

_COMMANDS = (generate, chat, serve, plan, pack, cache, doctor, bench, simulate)
# Other libraries' errors may list everything that they know.
_LONGEST_ERROR = 800


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for what the user can put right, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (ValueError, FileNotFoundError) as error:
        print(f"ktc: error: {textwrap.shorten(str(error), _LONGEST_ERROR, placeholder=' ...')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; Python must not find that out again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ktc",
        description="Run Mixture-of-Experts models on ordinary machines.",
        epilog="examples:\n  ktc doctor\n  ktc plan --hardware laptop\n  ktc generate 'def fibonacci(n):'\n"
        "  ktc serve\n  ktc pack --list\n  ktc bench kernels --quick\n  ktc simulate --synthetic drift\n\n"
        "'ktc COMMAND --help' describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ktcompile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser
