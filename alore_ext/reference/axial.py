"""The axial shift of AS-MLP in plain PyTorch (AS-MLP paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def axial_shift(x: Tensor, shift_size: int, dim: int) -> Tensor:
    """Group g of the channels comes from shift_size // 2 - g places on along dim; zeros beyond the border.

    Args:
        x: [batch, channels, height, width].
        shift_size: the channels are cut into this many groups of ceil(channels / shift_size), the last ones
            smaller or empty.
        dim: 2 (height) or 3 (width), or counted from the end.

    Returns:
        Like x.
    """
    size = x.shape[dim]
    group_channels = -(-x.shape[1] // shift_size)
    groups = []
    for g, channels in enumerate(x.split(max(group_channels, 1), dim=1)):
        distance = max(-size, min(shift_size // 2 - g, size))
        kept = channels.narrow(dim, max(distance, 0), size - abs(distance))
        zeros = torch.zeros_like(channels).narrow(dim, 0, abs(distance))
        groups.append(torch.cat([kept, zeros] if distance > 0 else [zeros, kept], dim=dim))
    return torch.cat(groups, dim=1)


def axial_shift_pair(x: Tensor, shift_size: int) -> tuple[Tensor, Tensor]:
    """x shifted along the width, and along the height."""
    return axial_shift(x, shift_size, 3), axial_shift(x, shift_size, 2)
