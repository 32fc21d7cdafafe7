"""The axial shift: the paper "AS-MLP: An Axial Shifted MLP Architecture for Vision", section 3.2."""

import torch
from torch import Tensor

from .._extension import _C  # noqa: F401  (registers the operators)

_axial_shift = torch.ops.alore_ext.axial_shift.default
_axial_shift_pair = torch.ops.alore_ext.axial_shift_pair.default


def axial_shift(x: Tensor, shift_size: int, dim: int) -> Tensor:
    """Moves groups of channels along one spatial axis, each by its own distance, and fills with zeros.

    Channel c is in group ``g = c // ceil(channels / shift_size)``, and comes from ``shift_size // 2 - g`` places on:
    ``out[..., i] = x[..., i + shift_size // 2 - g]`` along the width. A shift size of 5 reaches two places to either
    side; an even one a place further in the first groups' direction, as in AS-MLP's own code: 4 gives 2, 1, 0, -1.

    Args:
        x: ``[batch, channels, height, width]``; float64, float32, bfloat16 or float16. Channels need not be divisible
            by the shift size.
        shift_size: at least 1, which moves nothing.
        dim: 2 or -2 for the height, 3 or -1 for the width.

    Returns:
        Like x, in x's memory format: contiguous, or channels_last.

    Raises:
        RuntimeError: another number of axes, dtype, dim or shift size.
    """
    return _axial_shift(x, shift_size, dim)


def axial_shift_pair(x: Tensor, shift_size: int) -> tuple[Tensor, Tensor]:
    """:func:`axial_shift` of x along the width and along the height, as an AS-MLP block needs them.

    One pass, which reads x once; backward reads both gradients and writes their sum.
    """
    return _axial_shift_pair(x, shift_size)
