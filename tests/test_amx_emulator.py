"""The emulated tile instructions against the pseudocode of the Intel SDM, volume 2, bit for bit."""

from __future__ import annotations

import ctypes
from fractions import Fraction

import numpy as np
import pytest
from helpers.compiler import COMPILER, ROOT, compile_native, cpu_has, try_compile

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a compiler")

SMALLEST_NORMAL = 2.0**-126
PRODUCT_SHAPES = [(1, 1, 1), (16, 16, 16), (1, 16, 16), (16, 1, 16), (16, 16, 1), (3, 5, 7), (13, 9, 4), (2, 16, 11)]


# The pseudocode, over all rows and columns at once. Legend: M rows of c and a; N columns of c and b; K pairs of bf16
# or quads of bytes, which have an axis of their own, last.


def tdpbf16ps(c_MN: np.ndarray, a_MK2: np.ndarray, b_KN2: np.ndarray) -> np.ndarray:
    """Return the new c as float32. c: float32; a, b: bf16 patterns."""
    M, K, _ = a_MK2.shape
    N = b_KN2.shape[1]
    temp1_MN2 = np.zeros((M, N, 2), np.float32)
    for k in range(K):
        temp1_MN2 = fma32(make_fp32(a_MK2[:, k])[:, None], make_fp32(b_KN2[k])[None], temp1_MN2)
    tmpf32_MN = add32(temp1_MN2[..., 0], temp1_MN2[..., 1])
    return add32(c_MN, tmpf32_MN)


def tdpbusd(c_MN: np.ndarray, a_MK4: np.ndarray, b_KN4: np.ndarray) -> np.ndarray:
    """Return the new c as uint32. c: uint32; a: uint8; b: int8."""
    products_MN = np.einsum("mkq,knq->mn", a_MK4.astype(np.int64), b_KN4.astype(np.int64))
    return ((c_MN.astype(np.int64) + products_MN) % 2**32).astype(np.uint32)


def make_fp32(bf16: np.ndarray) -> np.ndarray:
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def daz(x: np.ndarray) -> np.ndarray:
    """Return x, denormals as zero of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def add32(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return x + y with denormals as zero. A sum of two floats that is denormal is exact, and so needs no more care."""
    with np.errstate(invalid="ignore", over="ignore"):
        return daz(daz(x) + daz(y))


def fma32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return x * y + z, rounded once to nearest even, denormals as zero. x and y: values of bf16, as float32.

    Exact, since: the product of two numbers of 8 bits is exact in double, and no denormal there (2^-252 at least).
    TwoSum gives the rounding error of a sum in double, without error. With it the sum is rounded to odd: an inexact one
    to that neighbour whose last bit is odd. Rounding that again, to any precision of 51 bits or fewer, gives what
    rounding the exact sum would have given: an odd last bit is never a tie nor representable (Boldo and Melquiond,
    "When double rounding is odd", 2005). A result counts as denormal if it is one after rounding to 24 bits with an
    exponent without limit; that is rounded 2^64 higher, where float32 has normal numbers.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product = daz(x).astype(np.float64) * daz(y).astype(np.float64)
        addend = daz(z).astype(np.float64)
        total = product + addend
        addend_kept = total - product
        error = (product - (total - addend_kept)) + (addend - addend_kept)
        even = total.view(np.int64) % 2 == 0
        away = np.nextafter(total, np.copysign(np.inf, error))
        odd = np.where(np.isfinite(total) & (error != 0) & even, away, total)
        tiny = (
            np.abs((np.where(np.abs(odd) < 2.0**-100, odd, 1) * 2.0**64).astype(np.float32)) < SMALLEST_NORMAL * 2.0**64
        )
        return np.where(tiny, np.copysign(np.float32(0), odd), odd.astype(np.float32)).astype(np.float32)


def round_fraction(x: Fraction) -> float:
    """Return x rounded to float32, to nearest even; zero where it is denormal after rounding. By the definition."""
    if x == 0:
        return 0.0
    exponent = 0
    while abs(x) / Fraction(2) ** exponent >= 2:
        exponent += 1
    while abs(x) / Fraction(2) ** exponent < 1:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    rounded = round(x / unit) * unit  # Python rounds ties to even
    if abs(rounded) < Fraction(2) ** -126:
        return 0.0
    return float(rounded) if abs(rounded) < Fraction(2) ** 128 else float("inf") * (1 if x > 0 else -1)


# Patterns of bf16 that meet: 0 to 7 are special values; the rest is a range of exponents.
SPECIAL = np.array([0, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81], np.uint16)
EXPONENTS = {
    "moderate": range(118, 136),
    "all": range(256),
    "around the smallest normal": (0, 1, 2, 50, 51, 52, 53, 63, 64, 126, 127),
    "around the largest": (127, 128, 190, 191, 252, 253, 254),
    "cancelling": (120, 127, 144, 151),
}


def patterns(rng: np.random.Generator, shape: tuple[int, ...], exponents, special: float = 0.0) -> np.ndarray:
    """Return bf16 patterns, half of them powers of two, a part of them special values."""
    mantissas = rng.integers(0, 128, shape) * rng.integers(0, 2, shape)
    bits = rng.integers(0, 2, shape) << 15 | rng.choice(np.array(exponents), shape) << 7 | mantissas
    return np.where(rng.random(shape) < special, rng.choice(SPECIAL, shape), bits.astype(np.uint16))


def sums(rng: np.random.Generator, shape: tuple[int, ...], exponents, special: float = 0.0) -> np.ndarray:
    low = rng.integers(0, 2**16, shape).astype(np.uint32) * rng.integers(0, 2, shape).astype(np.uint32)
    return (patterns(rng, shape, exponents, special).astype(np.uint32) << 16 | low).view(np.float32)


@pytest.fixture(scope="module", params=[(), ("-mavx2", "-mfma")], ids=["baseline", "fma"])
def emulator(request, tmp_path_factory) -> ctypes.CDLL:
    if request.param and not cpu_has("avx2", "fma"):
        pytest.skip("the processor lacks AVX2 or FMA")
    output = tmp_path_factory.mktemp("tiles") / "tiles_emu.so"
    return ctypes.CDLL(str(compile_native(output, *request.param, "-shared", ROOT / "native/tests/tiles_emu.cpp")))


def emulate(product, c_MN: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    c, a, b = (np.ascontiguousarray(x).copy() for x in (c_MN, a, b))
    product(
        *(ctypes.c_int(n) for n in (a.shape[0], a.shape[1], b.shape[1])),
        *(ctypes.c_void_p(x.ctypes.data) for x in (c, a, b)),
    )
    return c


def assert_same_bits(got: np.ndarray, right: np.ndarray) -> None:
    """A NaN is a NaN, whatever its sign and payload."""
    same = (got.view(np.uint32) == right.view(np.uint32)) | (np.isnan(got) & np.isnan(right))
    assert same.all(), [(g.hex(), r.hex()) for g, r in zip(got[~same].tolist(), right[~same].tolist(), strict=True)][:5]


@pytest.mark.parametrize("exponents", EXPONENTS.values(), ids=EXPONENTS)
@pytest.mark.parametrize("special", [0.0, 0.01, 0.2])
def test_tdpbf16ps(emulator, exponents, special):
    rng = np.random.default_rng(7)
    for M, K, N in PRODUCT_SHAPES * 6:
        c_MN = sums(rng, (M, N), exponents, special)
        a_MK2, b_KN2 = patterns(rng, (M, K, 2), exponents, special), patterns(rng, (K, N, 2), exponents, special)
        assert_same_bits(emulate(emulator.emu_dpbf16, c_MN, a_MK2, b_KN2), tdpbf16ps(c_MN, a_MK2, b_KN2))


def test_denormals_are_those_after_rounding(emulator):
    """Products of about 2^-150 next to 2^-126: some sums are rounded to 2^-126, and some are zero, of either sign."""
    rng = np.random.default_rng(11)
    seen = set()
    for _ in range(20):
        c_MN = np.full((16, 16), -0.0, np.float32)
        a_MK2, b_KN2 = patterns(rng, (16, 2, 2), (51, 52)), patterns(rng, (2, 16, 2), (51, 52))
        a_MK2[:, 0], b_KN2[0] = 0x0080 | a_MK2[:, 1] & 0x8000, 0x3F80
        b_KN2[1] |= 0x8000
        got = emulate(emulator.emu_dpbf16, c_MN, a_MK2, b_KN2)
        assert_same_bits(got, tdpbf16ps(c_MN, a_MK2, b_KN2))
        seen |= set(got.view(np.uint32).ravel().tolist())
    assert {0, 0x80000000, 0x00800000, 0x80800000} <= seen


def test_the_order_of_summation_shows(emulator):
    """Sums of random products differ, for most, from those in any other order: the test above can tell."""
    rng = np.random.default_rng(8)
    a_MK2, b_KN2 = (patterns(rng, (16, 16, 2), EXPONENTS["moderate"]) for _ in range(2))
    c_MN = sums(rng, (16, 16), EXPONENTS["moderate"])
    got = emulate(emulator.emu_dpbf16, c_MN, a_MK2, b_KN2)
    descending = tdpbf16ps(c_MN, a_MK2[:, ::-1], b_KN2[::-1])
    swapped = tdpbf16ps(c_MN, a_MK2.reshape(16, 32)[:, ::-1].reshape(16, 16, 2), b_KN2[::-1, :, ::-1])
    for other in (descending, swapped):
        assert (got != other).mean() > 0.2


@pytest.mark.parametrize("extreme", [False, True])
def test_tdpbusd(emulator, extreme):
    rng = np.random.default_rng(9)
    for M, K, N in PRODUCT_SHAPES * 6:
        c_MN = rng.integers(0, 2**32, (M, N), dtype=np.uint32)
        a_MK4 = rng.integers(0, 256, (M, K, 4), dtype=np.uint8)
        b_KN4 = rng.integers(-128, 128, (K, N, 4), dtype=np.int8)
        if extreme:
            c_MN, a_MK4, b_KN4 = c_MN | 0x7FFFFFF0, a_MK4 | 0xF0, (b_KN4 >> 7) ^ 0x7F
        np.testing.assert_array_equal(emulate(emulator.emu_dpbusd, c_MN, a_MK4, b_KN4), tdpbusd(c_MN, a_MK4, b_KN4))


@pytest.mark.parametrize("exponents", EXPONENTS.values(), ids=EXPONENTS)
def test_the_transcribed_fma_is_exact(exponents):
    rng = np.random.default_rng(10)
    x, y = (make_fp32(patterns(rng, (400,), exponents)) for _ in range(2))
    z = sums(rng, (400,), exponents)
    finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(z)
    x, y, z = x[finite], y[finite], z[finite]
    # Beside sums of any kind those that cancel, to the last bits of the product, and ties.
    with np.errstate(over="ignore"):
        z = np.concatenate([z, -(x.astype(np.float64) * y).astype(np.float32), (x * y * np.float32(2.0**24))])
    x, y = np.tile(x, 3), np.tile(y, 3)
    got = fma32(x, y, z)
    for xi, yi, zi, g in zip(daz(x).tolist(), daz(y).tolist(), daz(z).tolist(), got.tolist(), strict=True):
        if np.isfinite(zi):
            assert round_fraction(Fraction(xi) * Fraction(yi) + Fraction(zi)) == g, (xi.hex(), yi.hex(), zi.hex())


@pytest.mark.parametrize("header", ["tile_hw.h", "tile_emu.h"])
@pytest.mark.parametrize(
    ("product", "right"),
    [("0, 1, 2", True), ("0, 0, 2", False), ("0, 1, 1", False), ("2, 1, 2", False), ("0, 1, 8", False)],
)
def test_products_of_one_tile_with_itself_do_not_compile(tmp_path, header, product, right):
    source = tmp_path / "product.cpp"
    source.write_text(f"""
        #include <cstdio>
        #include <cstdlib>
        #define KT_ISA_NAME test
        #include "{ROOT}/native/isa/begin.inl"
        #include "{ROOT}/native/isa/{header}"
        }}
        void bf16() {{ tiles::dpbf16<{product}>(); }}
        void bytes() {{ tiles::dpbusd<{product}>(); }}
        }}
        }}
    """)
    result = try_compile("-fsyntax-only", "-I", ROOT / "native/include", source)
    assert (result.returncode == 0) == right, result.stderr
    assert right or "static assertion failed" in result.stderr
