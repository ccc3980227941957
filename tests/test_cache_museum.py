"""Failures that other prefix caches had, by their numbers in the project's list, and where each is tested.

Tests say "Museum" and the numbers in their docstrings. Those that do not apply to the tiers behind the device:

| number | what failed | why there is no test here |
| --- | --- | --- |
| 9 | state beside keys and values covered fewer tokens | a block is one payload of all layers, scales included |
| 16 | warm and cold answers differed | bytes come back (test_cache_transfer.py); answers are the engine's |
| 17 | short prompts of hybrid models were never hits | models that keep anything but keys and values are refused |
| 19 | a property of the process was part of the key | keys are made by cache/key.py; nothing is added to them here |
| 22 | a salt of a request ended the engine | salts are checked where keys are made; here they are 32 bytes |
| 26 | prompts that were too long vanished | the scheduler's |
| 27 | prompts starved decodes | the scheduler's |
"""

from __future__ import annotations

import re
from pathlib import Path

ELSEWHERE = {9, 16, 17, 19, 22, 26, 27}


def test_each_failure_has_a_test_or_a_reason():
    folder = Path(__file__).parent
    named = set()
    for path in folder.glob("test_cache_*.py"):
        if path != Path(__file__):
            for numbers in re.findall(r"Museum ([\d, and]+)", path.read_text()):
                named.update(map(int, re.findall(r"\d+", numbers)))
    assert named == set(range(1, 28)) - ELSEWHERE
