"""The dtype that the reference functions compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is float64, float32 otherwise."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in `dtype`; None stays None."""
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
