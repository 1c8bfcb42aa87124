"""The one table of dtypes: what safetensors calls each of torch's, whose size torch knows."""

import torch

from qtool.base import DType

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of the name that recipes, options and `PartSpec` have for it."""
    return getattr(torch, name)


def stored_name(name: DType) -> str:
    """Return what safetensors calls a dtype: `F16` for `float16`."""
    return _STORED_NAMES[dtype_of(name)]


def item_bytes(stored: str) -> int:
    """Return the size of one value by safetensors' name of its dtype; of an unknown one, 1."""
    return DTYPES[stored].itemsize if stored in DTYPES else 1
