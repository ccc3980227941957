"""Weight formats: what one stores for a weight and how it is computed with."""

from ktcompile.quant.formats import FORMATS, WeightFormat, native_dtype, resolve_format

__all__ = ["FORMATS", "WeightFormat", "native_dtype", "resolve_format"]
