"""Records and codecs: what is written is read, and no bytes make the parser do anything but refuse."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.cache_blocks import LAYOUT, blocks
from helpers.record_fuzz import check_any_bytes, good_record, mutated, resealed, sealed
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ktcompile.cache
from ktcompile.cache import codec
from ktcompile.cache.block_id import BlockId, chain
from ktcompile.cache.counters import NAMES, Counters
from ktcompile.cache.record import MOST_HEADER_BYTES, Header, RecordError, check_is, checksum, parse, payload_of

keys = st.binary(min_size=32, max_size=32)
ids = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=80).map(tuple)
some_blocks = st.builds(BlockId, keys, keys, keys, st.integers(0, 2**64 - 1), ids)
sums = st.binary(min_size=16, max_size=16)
big = st.integers(0, 2**64 - 1)
headers = st.builds(Header, some_blocks, st.text(max_size=50), st.integers(0, 2**16 - 1), big, big, sums, sums)


@settings(max_examples=50)
@given(headers, st.binary(max_size=20))
def test_a_header_is_read_as_it_was_written(header, behind):
    packed = header.pack()
    assert len(packed) == header.size <= MOST_HEADER_BYTES
    assert parse(packed + behind) == header


@given(headers, st.data())
def test_a_header_that_is_cut_anywhere_is_refused(header, data):
    packed = header.pack()
    with pytest.raises(RecordError):
        parse(packed[: data.draw(st.integers(0, len(packed) - 1))])


@settings(max_examples=300)
@given(st.binary(max_size=400))
@example(good_record())
def test_any_bytes_are_a_record_or_refused(data):
    check_any_bytes(data)


@settings(max_examples=300)
@given(st.binary(min_size=8, max_size=64))
def test_a_record_that_was_changed_is_refused(choice):
    check_any_bytes(mutated(choice))


@given(st.binary(max_size=60))
def test_a_header_that_was_changed_is_refused_though_its_checksum_is_right(choice):
    check_any_bytes(resealed(choice))


@given(st.integers(0, 8), st.integers(0, 5000), st.binary(max_size=200))
def test_any_payload_is_decoded_or_refused(number, raw_size, stored):
    check_any_bytes(sealed(number, raw_size, stored))


@pytest.mark.parametrize("place", range(0, 12 + 96 + 8 + 24, 2))
def test_lengths_are_not_believed(place):
    """Museum 23: with a right checksum too, a length is compared with what is there before it is used."""
    record = bytearray(good_record())
    header = parse(record)
    for value in (0, 1, 0xFFFF):
        changed = bytearray(record)
        struct.pack_into("<H", changed, place, value)
        body = bytes(changed[: header.size - 16])
        changed[header.size - 16 : header.size] = checksum(body)
        check_any_bytes(bytes(changed))


def test_a_record_of_another_block_says_what_is_other():
    block, other = blocks(2)[1], blocks(2, seed=3)[1]
    header = Header(block, LAYOUT, 0, 4, 4, bytes(16), bytes(16))
    check_is(header, block, LAYOUT, 4)
    for name in ("key", "parent", "token_ids", "position"):
        wanted = replace(block, **{name: 99 if name == "position" else getattr(other, name)})
        with pytest.raises(RecordError, match=name):
            check_is(header, wanted, LAYOUT, 4)
    with pytest.raises(RecordError, match="namespace"):
        check_is(header, replace(block, namespace=bytes(32)), LAYOUT, 4)
    for layout, size in ((LAYOUT, 5), ("another", 4)):
        with pytest.raises(RecordError) as error:
            check_is(header, block, layout, size)
        assert error.value.reason == "layout"


@pytest.mark.parametrize(
    ("block", "layout"),
    [
        (replace(blocks(1)[0], token_ids=(1 << 32,)), ""),
        (replace(blocks(1)[0], token_ids=(-1,)), ""),
        (replace(blocks(1)[0], token_ids=(1,) * ((1 << 16) + 1)), ""),
        (replace(blocks(1)[0], position=1 << 64), ""),
        (blocks(1)[0], "x" * ((1 << 16) + 1)),
    ],
)
def test_what_does_not_fit_a_record_is_an_error(block, layout):
    with pytest.raises(ValueError):
        Header(block, layout, 0, 1, 1, bytes(16), bytes(16)).pack()


def test_a_chain_has_no_more_blocks_than_tokens():
    made = chain(bytes(32), [b"1" * 32, b"2" * 32], range(9), 4)
    assert [(b.position, b.parent[:1], b.token_ids) for b in made] == [
        (0, b"\0", (0, 1, 2, 3)),
        (4, b"1", (4, 5, 6, 7)),
    ]
    with pytest.raises(ValueError, match="more than"):
        chain(bytes(32), [b"1" * 32, b"2" * 32], range(7), 4)
    with pytest.raises(ValueError, match="32 bytes"):
        chain(bytes(32), [b"short"], range(7), 4)


def keys_and_values(dtype, count: int = 40_000) -> memoryview:
    numbers = np.random.default_rng(0).normal(0, 1, count).astype(np.float32)
    raw = (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else numbers.astype(dtype)
    return memoryview(raw.view(np.uint8))


@pytest.mark.parametrize(("dtype", "width", "ratio"), [("bf16", 2, 1.4), ("float32", 4, 1.15), ("float16", 2, 1.0)])
def test_floating_point_numbers_come_back_from_less(dtype, width, ratio):
    raw = keys_and_values(dtype)
    number, stored = codec.encode(raw, width)
    assert len(raw) / len(stored) >= ratio
    out = memoryview(bytearray(len(raw)))
    codec.decode(number, memoryview(stored), out)
    assert out == raw


@given(st.binary(max_size=3000), st.sampled_from((0, *codec.WIDTHS)), st.integers(1, 50))
def test_any_payload_comes_back_and_never_grows(part, width, times):
    raw = memoryview(part * times)
    number, stored = codec.encode(raw, width)
    assert len(stored) <= len(raw)
    out = memoryview(bytearray(len(raw)))
    codec.decode(number, memoryview(stored), out)
    assert out == raw


def test_noise_is_stored_as_it_is():
    raw = memoryview(np.random.default_rng(0).bytes(100_000))
    assert codec.encode(raw, 2) == (codec.NONE, raw)


@pytest.mark.parametrize("change", ["cut", "longer", "flipped", "bomb", "codec", "size", "planes", "none"])
def test_a_stored_payload_that_is_none_is_refused(change):
    raw = keys_and_values("bf16", 5000)
    number, stored = codec.encode(raw, 2)
    stored, out = bytearray(stored), bytearray(len(raw))
    if change == "cut":
        stored = stored[:-9]
    if change == "longer":
        stored += b"\0"
    if change == "flipped":
        stored[-2000:-1900] = bytes(100)
    if change == "bomb":  # a frame that becomes more than a plane has
        frame = codec.zstd.compress(bytes(1 << 24), 1)
        stored = bytearray(struct.pack("<2I", len(frame), 5000) + frame + bytes(5000))
    if change == "codec":
        number = 3
    if change == "size":
        out = bytearray(len(raw) + 1)
    if change == "planes":
        stored[:4] = b"\xff" * 4
    if change == "none":
        number = codec.NONE
    with pytest.raises(RecordError) as error:
        codec.decode(number, memoryview(stored), memoryview(out))
    assert error.value.reason == "codec"


def test_a_record_of_a_length_that_is_not_its_own_is_refused():
    record = good_record()
    header = parse(record)
    assert len(payload_of(header, record)) == header.stored_size
    for wrong in (record[:-1], record + b"\0"):
        with pytest.raises(RecordError):
            payload_of(header, wrong)


def test_nothing_here_unpickles_or_evaluates():
    folder = Path(ktcompile.cache.__file__).parent
    sources = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert len(sources) > 15
    wrong = re.compile(r"\b(pickle|marshal|shelve|torch\.load|eval\(|exec\(|__import__|yaml)\b")
    assert not {name for name, text in sources.items() if wrong.search(text)}


def test_counters_have_names():
    counters = Counters()
    counters.add("dropped", 3)
    assert counters.snapshot()["dropped"] == 3 and counters.snapshot().keys() == NAMES
    with pytest.raises(AssertionError):
        counters.add("nothing of the kind")
