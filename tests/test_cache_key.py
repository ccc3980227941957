"""Keys of blocks: what they depend on, and what not."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import fields, replace

import pytest
from helpers.processes import run_python
from hypothesis import given
from hypothesis import strategies as st

from ktcompile.cache.key import KEY_BYTES, MAX_SALT_BYTES, Namespace, child, root

NAMESPACE = Namespace("w", "t", "", "bf16", "2 x 4 heads of 128", 64, "rope 10000", "kernels 1")
TOKENS = st.lists(st.integers(0, (1 << 32) - 1), max_size=8)


def test_a_key_is_a_hash_of_domain_parent_length_and_tokens() -> None:
    parent = root(NAMESPACE)
    bytes_of = b"ktcompile/kv/block" + struct.pack("<I", 1) + parent + struct.pack("<4I", 3, 7, 300, 2**32 - 1)
    assert child(parent, (7, 300, 2**32 - 1)) == hashlib.sha256(bytes_of).digest()


@given(first=TOKENS, second=TOKENS)
def test_keys_are_equal_where_tokens_are(first: list[int], second: list[int]) -> None:
    parent = root(NAMESPACE)
    assert (child(parent, first) == child(parent, tuple(second))) == (first == second)
    assert child(child(parent, first), second) != child(parent, [*first, *second])


@pytest.mark.parametrize("name", [f.name for f in fields(Namespace)])
def test_each_part_of_a_namespace_counts(name: str) -> None:
    other = replace(NAMESPACE, **{name: 32 if name == "block_size" else "other"})
    assert root(other) != root(NAMESPACE) and root(other, "a") != root(NAMESPACE, "a")


def test_text_that_moves_from_one_part_to_the_next_counts() -> None:
    assert (
        replace(NAMESPACE, weights="ab", tokenizer="c").digest != replace(NAMESPACE, weights="a", tokenizer="bc").digest
    )


def test_salts_and_secrets_make_other_keys() -> None:
    roots = [root(NAMESPACE, salt, secret) for salt in ("", "a", "b") for secret in (b"", b"s")]
    assert roots[0] == roots[1] and len(set(roots)) == 5
    assert all(len(key) == KEY_BYTES for key in roots)


def test_a_salt_has_an_end() -> None:
    root(NAMESPACE, "é" * (MAX_SALT_BYTES // 2))
    root(NAMESPACE, "\ud800")  # JSON can have it
    with pytest.raises(ValueError, match="cache_salt has 258 bytes; it may have 256"):
        root(NAMESPACE, "é" * (MAX_SALT_BYTES // 2 + 1))


@pytest.mark.parametrize("wrong", [-1, 1 << 32])
def test_tokens_that_are_none(wrong: int) -> None:
    with pytest.raises(ValueError, match="tokens are numbers from 0 to 4294967295"):
        child(root(NAMESPACE), [1, wrong])


def test_another_process_makes_the_same_keys() -> None:
    program = (
        f"from ktcompile.cache.key import *\nprint(child(root({NAMESPACE!r}, 'tenant', b'secret'), range(64)).hex())"
    )
    assert run_python(program).strip() == child(root(NAMESPACE, "tenant", b"secret"), range(64)).hex()
