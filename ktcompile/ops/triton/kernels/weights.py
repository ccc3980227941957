"""Products with stored weights: codes become numbers in registers, and sums are scaled, in fp32.

Columns of a weight are taken in chunks of 64. A byte of a format of four bits holds columns j and j + 32 of its chunk,
so that both halves are used as they lie. A code becomes a number that bf16 and fp16 represent exactly, up to a power of
two, and scales multiply the fp32 sum over their group: the only roundings are those of the sums.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """Return acc + a @ b. The interpreter multiplies the bit patterns of bf16, hence the conversion."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def from_e4m3(codes, DTYPE: tl.constexpr):
    """Return the values of e4m3 codes times 2**-8. NaN codes, which packing refuses, become numbers."""
    codes = codes.to(tl.uint16)
    bits = ((codes & 0x7F) << 7) | ((codes & 0x80) << 8)
    return bits.to(tl.float16, bitcast=True).to(DTYPE)


@triton.jit
def from_e2m1(codes, DTYPE: tl.constexpr):
    """Return the values of e2m1 codes times 2**-14."""
    codes = codes.to(tl.uint16)
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    return bits.to(tl.float16, bitcast=True).to(DTYPE)


@triton.jit
def from_int4(codes, zeros, DTYPE: tl.constexpr):
    """Return codes less zero points (fp32). 2**23 + code is the code in the low bits of an fp32."""
    numbers = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (numbers - (8388608.0 + zeros)).to(DTYPE)


@triton.jit
def load_scales(scales_ptr, group, rows, row_mask, num_rows, FORMAT: tl.constexpr):
    """Return the scales of a group for `rows`, with the power of two that the numbers lack. Zero past the last row."""
    scales = tl.load(scales_ptr + group * num_rows + rows, mask=row_mask, other=0)
    if FORMAT == "mxfp4":
        return (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True) * 16384.0
    if FORMAT == "fp8":
        return scales.to(tl.float32) * 256.0
    return scales.to(tl.float32)


@triton.jit
def load_inputs(row_ptrs, row_mask, chunk, columns, FORMAT: tl.constexpr):
    """Return the two halves of a chunk of rows, [M, 32] each, or the chunk [M, 64] twice if weights are not halved."""
    HALVED: tl.constexpr = FORMAT == "int4" or FORMAT == "mxfp4"
    WIDTH: tl.constexpr = 32 if HALVED else 64
    first = chunk * 64 + tl.arange(0, WIDTH)
    low = tl.load(row_ptrs[:, None] + first[None, :], mask=row_mask[:, None] & (first < columns)[None, :], other=0)
    if HALVED:
        second = first + 32
        high = tl.load(
            row_ptrs[:, None] + second[None, :], mask=row_mask[:, None] & (second < columns)[None, :], other=0
        )
    else:
        high = low
    return low, high


@triton.jit
def _add_group(
    acc, x, codes, scales_ptr, zeros_ptr, group, rows, row_mask, num_rows,
    FORMAT: tl.constexpr, HAS_ZEROS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return acc + scale * (x @ numbers of the codes) for half a chunk, which lies in one group."""
    if FORMAT == "mxfp4":
        numbers = from_e2m1(codes, x.dtype)
    elif HAS_ZEROS:
        zeros = tl.load(zeros_ptr + group * num_rows + rows, mask=row_mask, other=0).to(tl.float32)
        numbers = from_int4(codes, zeros[None, :], x.dtype)
    else:
        numbers = from_int4(codes, 8.0, x.dtype)
    scales = load_scales(scales_ptr, group, rows, row_mask, num_rows, FORMAT)
    product = dot(x, numbers, tl.zeros_like(acc), INTERPRET)
    return acc + product * scales[None, :]


@triton.jit
def add_chunk(
    acc, low, high, codes_ptr, scales_ptr, zeros_ptr, rows, row_mask, chunk, num_rows, columns,
    stride_row, stride_column,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return acc [M, N] plus the product of a chunk of inputs and the chunk of `rows` of a weight.

    GROUP: columns that share a scale; 0 if all do, which `scale_sum` then applies to the whole sum.
    """
    if FORMAT == "int4" or FORMAT == "mxfp4":
        at = (chunk * num_rows + rows)[None, :] * 32 + tl.arange(0, 32)[:, None]
        codes = tl.load(codes_ptr + at, mask=row_mask[None, :], other=0)
        first = chunk * 64 // GROUP
        # The second half may be all past the last column, and have no group then. Its inputs are zeros.
        second = tl.minimum(chunk * 64 + 32, columns - 1) // GROUP
        acc = _add_group(
            acc, low, codes & 0xF, scales_ptr, zeros_ptr, first, rows, row_mask, num_rows, FORMAT, HAS_ZEROS, INTERPRET
        )
        acc = _add_group(
            acc, high, codes >> 4, scales_ptr, zeros_ptr, second, rows, row_mask, num_rows, FORMAT, HAS_ZEROS, INTERPRET
        )
    else:
        k = chunk * 64 + tl.arange(0, 64)
        at = rows[None, :] * stride_row + k[:, None] * stride_column
        codes = tl.load(codes_ptr + at, mask=row_mask[None, :] & (k < columns)[:, None], other=0)
        # Those of int8, and of plain weights in a dtype that the inputs' holds, are numbers as they are.
        numbers = from_e4m3(codes, low.dtype) if FORMAT == "fp8" else codes.to(low.dtype)
        if GROUP > 0:
            scales = load_scales(scales_ptr, chunk * 64 // GROUP, rows, row_mask, num_rows, FORMAT)
            acc += dot(low, numbers, tl.zeros_like(acc), INTERPRET) * scales[None, :]
        else:
            acc = dot(low, numbers, acc, INTERPRET)
    return acc


@triton.jit
def scale_sum(acc, scales_ptr, rows, row_mask, num_rows, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    """Return the sum over all columns, scaled if one scale is for all of them."""
    if FORMAT != "plain" and GROUP == 0:
        acc *= load_scales(scales_ptr, 0, rows, row_mask, num_rows, FORMAT)[None, :]
    return acc
