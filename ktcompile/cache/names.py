"""Names of files in the folder of the disk tier, and what a file without a good one is."""

from __future__ import annotations

import secrets

from ktcompile.cache.block_id import KEY_SIZE

_RECORD, _UNFINISHED, _BAD = ".ktkv", ".tmp", ".bad"
_DIGITS = frozenset("0123456789abcdef")


def record_name(key: bytes) -> str:
    """Return the name of a block's record."""
    return key.hex() + _RECORD


def unfinished_name(key: bytes) -> str:
    """Return a new name for a record while it is written."""
    return f"{key.hex()}.{secrets.token_hex(4)}{_UNFINISHED}"


def bad_name(key: bytes) -> str:
    """Return the name of a record that is in quarantine."""
    return key.hex() + _BAD


def key_of(name: str) -> bytes | None:
    """Return the key of a record's name, None: it is no record."""
    digits = name.removesuffix(_RECORD)
    if digits == name or len(digits) != 2 * KEY_SIZE or not _DIGITS.issuperset(digits):
        return None
    return bytes.fromhex(digits)


def is_unfinished(name: str) -> bool:
    """Return whether a file is what is left of a record that was never published."""
    return name.endswith(_UNFINISHED)


def is_bad(name: str) -> bool:
    """Return whether a file is in quarantine."""
    return name.endswith(_BAD)
