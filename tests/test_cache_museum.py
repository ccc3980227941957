"""Failures that other prefix caches had: decision 23 lists them by number, with the tests that re-enact each."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

FOLDER = Path(__file__).parent
TABLE = FOLDER.parent / "docs" / "decisions" / "0023-the-tiers-behind-the-device.md"
COUNT = 27


def named() -> dict[int, set[str]]:
    """Return the tests whose docstrings say "Museum" and a number, by number."""
    result = defaultdict(set)
    for path in FOLDER.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            for numbers in re.findall(r"Museum (\d+(?:(?:, | and )\d+)*)", text or ""):
                for number in re.findall(r"\d+", numbers):
                    result[int(number)].add(f"{path.stem.removeprefix('test_')}: {node.name.removeprefix('test_')}")
    return result


def listed() -> dict[int, set[str]]:
    """Return the tests of each row of the table."""
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", TABLE.read_text(), re.M)
    return {int(number): set(tests.split("; ")) for number, tests in rows}


def test_each_failure_has_tests_and_the_table_lists_them():
    assert set(named()) == set(range(1, COUNT + 1))
    assert listed() == named()
