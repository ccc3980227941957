"""Weights as other tools store them, read as they are: the values that the tensors mean, without rounding again.

Each function names the tensors in its errors after `what`, the weight that they belong to. Groups of columns that are
multiples of what the formats know are read as several groups of the same scale.

Shape suffixes: N rows (output features), K columns (input features), G groups of columns, W words of 32 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ktcompile.quant.formats import FORMATS, QuantizedWeight

# AWQ puts this column, of each eight, into the nibbles of a word from the lowest to the highest.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The value of an exponent of eight bits, E8M0; 255 is NaN.
_E8M0 = (*(math.ldexp(1.0, code - 127) for code in range(255)), math.nan)


def read_fp8(
    weight: Tensor, scale: Tensor, block: tuple[int, int] | None, what: str, *, parts: int = 1
) -> QuantizedWeight:
    """Return a weight of e4m3 codes with scales for blocks, rows, or all of it.

    weight: float8_e4m3fn [..., N, K]. scale: what codes are multiplied with; floats, or bytes that are exponents.
    block: rows and columns that share a scale, of scale [..., ceil(N / rows), ceil(K / columns)]; None is a scale for
    each row [..., N, 1], for each matrix [E], or one. parts: of which the rows consist that were stored one after
    another, as gate and up, each with scales of its own. ValueError: a dtype, a shape or a NaN.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{what} has dtype {weight.dtype}; of eight-bit floats only torch.float8_e4m3fn is read")
    codes = weight.contiguous().view(torch.uint8)
    if any((rows & 127 == 127).any() for rows in torch.split(codes.flatten(0, -2), 4096)):
        raise ValueError(f"{what} has NaN codes; the checkpoint is damaged")
    scales = _scales(scale, what)
    if block is None:
        return QuantizedWeight(FORMATS["fp8_channel"], codes, _row_scales(scales, weight.shape, parts, what))
    columns = block[1]
    if columns % 128:
        raise ValueError(f"{what} has blocks of {columns} columns; only multiples of 128 are read")
    groups = _ceil_div(weight.shape[-1], 128)
    by_group = _block_scales(scales, weight.shape, block, parts, what).repeat_interleave(columns // 128, -1)
    return QuantizedWeight(FORMATS["fp8"], codes, by_group[..., :groups].contiguous())


def read_mxfp4(blocks: Tensor, scale: Tensor, what: str) -> QuantizedWeight:
    """Return a weight of e2m1 codes, of two in a byte the lower one first.

    blocks: bytes [..., N, G, 16], or [..., N, K / 2]. scale: bytes [..., N, G] that are exponents, or powers of two.
    Rows keep their order: where gate and up alternate, they do so in the result. ValueError: a dtype, a shape, a NaN,
    or scales that are no powers of two.
    """
    if blocks.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"{what} has blocks of {blocks.dtype}; they must be bytes")
    scales = _scales(scale, what)
    packed = blocks.flatten(-2) if blocks.dim() == scale.dim() + 1 else blocks
    if packed.shape[-1] % 16 or scales.shape != (*packed.shape[:-1], packed.shape[-1] // 16):
        raise ValueError(
            f"{what} has blocks {list(blocks.shape)} and scales {list(scale.shape)}; each 16 bytes need one"
        )
    if (torch.frexp(scales).mantissa != 0.5).any():
        raise ValueError(f"{what} has scales that are no powers of two; only the exponents of MXFP4 are read")
    return QuantizedWeight(FORMATS["mxfp4"], _nibbles(packed), scales)


def read_gptq(
    qweight_WN: Tensor,
    qzeros_GW: Tensor,
    scales_GN: Tensor,
    group_of_column: Tensor | None,
    group_size: int,
    what: str,
    *,
    symmetric: bool,
    zero_offset: int,
) -> QuantizedWeight:
    """Return a weight of four bits as GPTQ stores it.

    qweight_WN: int32 [K / 8, N], columns from the lowest nibble. qzeros_GW: int32 [G, N / 8]. group_of_column: the
    group of each column, [K]; None or empty is in order. group_size: columns of a group, 0 is all of them.
    zero_offset: what was taken from zero points before they were stored: 1 of version 1, 0 of version 2.
    ValueError: a dtype or a shape; columns of one group lie apart; a symmetric weight has zero points other than 8;
    a zero point that readers of version 1 do not agree about.
    """
    _check_words(what, qweight=qweight_WN, qzeros=qzeros_GW)
    columns, rows = qweight_WN.shape[0] * 8, qweight_WN.shape[1]
    groups = _ceil_div(columns, group_size or columns)
    _check_shape(scales_GN, (groups, rows), what, "scales")
    _check_shape(qzeros_GW, (groups, rows // 8), what, "qzeros")
    codes_NK = _nibbles(qweight_WN.unsqueeze(-1)).permute(1, 0, 2).reshape(rows, columns)
    stored_zeros_NG = _nibbles(qzeros_GW).T
    if zero_offset and (stored_zeros_NG == 15).any():
        raise ValueError(
            f"{what} stores 15 for a zero point less one, which some readers of GPTQ take for 0 and others for 16, and "
            "which packers got wrong; use a checkpoint with checkpoint_format gptq_v2, or with sym true"
        )
    zeros_NG, scales_NG = stored_zeros_NG + zero_offset, _scales(scales_GN, what).T
    if group_of_column is not None and group_of_column.numel():
        order_G = _order_of_groups(group_of_column, columns, group_size or columns, groups, what)
        zeros_NG, scales_NG = zeros_NG[:, order_G], scales_NG[:, order_G]
    if symmetric and (zeros_NG != 8).any():
        raise ValueError(f"{what} has zero points other than 8, but quantization_config.sym is true; set it to false")
    return _int4(codes_NK, scales_NG, None if symmetric else zeros_NG, group_size, what)


def read_awq(qweight_KW: Tensor, qzeros_GW: Tensor, scales_GN: Tensor, group_size: int, what: str) -> QuantizedWeight:
    """Return a weight of four bits with zero points as AWQ stores it for its version "gemm".

    qweight_KW: int32 [K, N / 8]. qzeros_GW: int32 [G, N / 8]. Rows of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7.
    group_size: columns of a group, 0 is all of them. ValueError: a dtype or a shape.
    """
    _check_words(what, qweight=qweight_KW, qzeros=qzeros_GW)
    columns, rows = qweight_KW.shape[0], qweight_KW.shape[1] * 8
    groups = _ceil_div(columns, group_size or columns)
    _check_shape(scales_GN, (groups, rows), what, "scales")
    _check_shape(qzeros_GW, (groups, rows // 8), what, "qzeros")
    place = torch.tensor([_AWQ_ORDER.index(i) for i in range(8)])
    codes_KN, zeros_GN = (_nibbles(words.unsqueeze(-1))[..., place].flatten(1) for words in (qweight_KW, qzeros_GW))
    return _int4(codes_KN.T, _scales(scales_GN, what).T, zeros_GN.T, group_size, what)


def read_packed_int4(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_of_column: Tensor | None,
    columns: int,
    group_size: int,
    what: str,
) -> QuantizedWeight:
    """Return a weight of four bits as compressed-tensors stores it for its format "pack-quantized".

    packed: int32 [..., N, ceil(K / 8)], columns from the lowest nibble, stored as value plus 8. scale: [..., N, G].
    zero_point: int32 [..., ceil(N / 8), G], likewise plus 8, rows from the lowest nibble; None is symmetric.
    group_of_column: as for `read_gptq`. columns: K. group_size: columns of a group, 0 is all of them.
    ValueError: a dtype or a shape; columns of one group lie apart.
    """
    _check_words(what, weight_packed=packed)
    rows = packed.shape[-2]
    groups = _ceil_div(columns, group_size or columns)
    _check_shape(packed, (*packed.shape[:-2], rows, _ceil_div(columns, 8)), what, "weight_packed")
    _check_shape(scale, (*packed.shape[:-2], rows, groups), what, "weight_scale")
    scales, zeros = _scales(scale, what), None
    if zero_point is not None:
        _check_words(what, weight_zero_point=zero_point)
        _check_shape(zero_point, (*packed.shape[:-2], _ceil_div(rows, 8), groups), what, "weight_zero_point")
        zeros = _nibbles(zero_point.mT).mT[..., :rows, :]
    if group_of_column is not None and group_of_column.numel():
        order_G = _order_of_groups(group_of_column, columns, group_size or columns, groups, what)
        scales, zeros = scales[..., order_G], None if zeros is None else zeros[..., order_G]
    return _int4(_nibbles(packed)[..., :columns], scales, zeros, group_size, what)


def _block_scales(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int], parts: int, what: str) -> Tensor:
    """Return the scales of blocks for each row, [..., N, blocks of columns]."""
    rows, columns = shape[-2], _ceil_div(shape[-1], block[1])
    part_rows = rows // parts
    # Blocks that begin anew with each part first: that is how parts are stored, and the same where it matters not.
    wanted = (*shape[:-2], parts * _ceil_div(part_rows, block[0]), columns)
    if rows % parts == 0 and scales.shape == wanted:
        of_parts = scales.view(*shape[:-2], parts, -1, columns).repeat_interleave(block[0], -2)
        return of_parts[..., :part_rows, :].flatten(-3, -2)
    if scales.shape == (*shape[:-2], _ceil_div(rows, block[0]), columns):
        return scales.repeat_interleave(block[0], -2)[..., :rows, :]
    raise ValueError(f"{what} is {list(shape)} with scales {list(scales.shape)}; they must be {list(wanted)}")


def _row_scales(scales: Tensor, shape: tuple[int, ...], parts: int, what: str) -> Tensor:
    """Return scales for each row, [..., N, 1]."""
    wanted = (*shape[:-1], 1)
    if scales.numel() == 1:
        scales = scales.reshape(1, 1)
    elif scales.shape == shape[:1] and len(shape) == 3:
        scales = scales[:, None, None]
    elif scales.shape == (*shape[:-2], parts, 1) and shape[-2] % parts == 0:
        scales = scales.repeat_interleave(shape[-2] // parts, -2)
    elif scales.shape != wanted:
        raise ValueError(f"{what} is {list(shape)} with scales {list(scales.shape)}; they must be {list(wanted)}")
    return scales.expand(wanted).contiguous()


def _int4(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, what: str) -> QuantizedWeight:
    """Return the weight with groups of the largest size of the formats that divides `group_size`."""
    columns = codes.shape[-1]
    size = next((s for s in (128, 64, 32) if group_size % s == 0), None)
    if size is None:
        raise ValueError(f"{what} has groups of {group_size} columns; only multiples of 32 are read")
    repeats, groups = _ceil_div(group_size or columns, size), _ceil_div(columns, size)

    def regrouped(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(repeats, -1)[..., :groups].contiguous()

    if zeros is None:
        return QuantizedWeight(FORMATS[f"int4_g{size}"], codes.contiguous(), regrouped(scales))
    return QuantizedWeight(FORMATS[f"int4_g{size}_zp"], codes.contiguous(), regrouped(scales), regrouped(zeros))


def _order_of_groups(group_of_column: Tensor, columns: int, size: int, groups: int, what: str) -> Tensor:
    """Return which stored group each run of `size` columns has."""
    _check_shape(group_of_column, (columns,), what, "g_idx")
    order = group_of_column[::size].long()
    if not torch.equal(order.repeat_interleave(size)[:columns], group_of_column.long()):
        raise ValueError(
            f"{what} has columns of one group that lie apart (desc_act, or act-order, in g_idx), which the kernels "
            "cannot read; use a checkpoint that was quantised with desc_act false"
        )
    if order.min() < 0 or order.max() >= groups:
        raise ValueError(f"{what} has groups in g_idx that are not in [0, {groups}); the checkpoint is damaged")
    return order


def _nibbles(packed: Tensor) -> Tensor:
    """Return the nibbles of the last dimension from the lowest to the highest, one byte each."""
    # The bytes of a word lie in memory from the lowest too: torch runs on such machines, and files are stored so.
    if not packed.is_contiguous() or packed.stride(-1) != 1:  # a dimension of size 1 may have any stride
        packed = packed.clone(memory_format=torch.contiguous_format)
    octets = packed.view(torch.uint8)
    nibbles = torch.empty((*octets.shape[:-1], octets.shape[-1] * 2), dtype=torch.uint8)
    nibbles[..., 0::2] = octets & 15
    nibbles[..., 1::2] = octets >> 4
    return nibbles


def _scales(scale: Tensor, what: str) -> Tensor:
    """Return scales in fp32."""
    if scale.dtype == torch.uint8:
        scales = torch.tensor(_E8M0)[scale.int()]
    elif scale.is_floating_point():
        scales = scale.float()
    else:
        raise ValueError(f"{what} has scales of {scale.dtype}; they must be floats, or bytes that are exponents")
    if not scales.isfinite().all():
        raise ValueError(f"{what} has scales that are NaN or infinite; the checkpoint is damaged")
    return scales


def _check_words(what: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32 or tensor.dim() < 2:
            raise ValueError(f"{what}: {name} is {list(tensor.shape)} of {tensor.dtype}; it must be a matrix of int32")


def _check_shape(tensor: Tensor, wanted: tuple[int, ...], what: str, name: str) -> None:
    if tensor.shape != wanted:
        raise ValueError(
            f"{what}: {name} is {list(tensor.shape)}; for four bits and this group size it must be {list(wanted)}"
        )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
