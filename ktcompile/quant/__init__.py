"""Weight formats: what one stores for a weight and how it is computed with."""

from ktcompile.quant.activations import quantize_rows
from ktcompile.quant.formats import (
    ALIASES,
    FLOAT_DTYPES,
    FORMATS,
    QuantizedWeight,
    WeightFormat,
    check_format,
    full_name,
    native_dtype,
    resolve_format,
)

__all__ = [
    "ALIASES",
    "FLOAT_DTYPES",
    "FORMATS",
    "QuantizedWeight",
    "WeightFormat",
    "check_format",
    "full_name",
    "native_dtype",
    "quantize_rows",
    "resolve_format",
]
