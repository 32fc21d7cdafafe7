"""Slicing an adapter down to a part of its experts (see `alore_ext.retain_experts`)."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_experts(factor: Tensor, kept: tuple[int, ...] | None, dim: int = 0, width: int = 1) -> Tensor:
    """The part of a factor that belongs to the kept experts, in ascending order; None keeps all.

    Args:
        factor: holds the experts one after the other along `dim`.
        kept: indices of experts, ascending.
        width: entries of each expert along `dim`.

    Returns:
        A view where the kept experts are neighbours, else a copy. Nothing is sent to the device for it, as an index
        tensor would be.
    """
    if kept is None:
        return factor
    if kept[-1] - kept[0] + 1 == len(kept):
        return factor.narrow(dim, kept[0] * width, len(kept) * width)
    return torch.cat([factor.narrow(dim, expert * width, width) for expert in kept], dim)


def keep_lora_experts(
    lora_a: Tensor, lora_b: Tensor, coeff: Tensor, kept: tuple[int, ...] | None, expert_rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """MLAE's `lora_a` [R, in], `lora_b` [out, R] and `coeff` [num_experts] of the kept experts alone.

    What is left computes what coefficients of 0 for the others would, with less work.
    """
    return (
        keep_experts(lora_a, kept, 0, expert_rank),
        keep_experts(lora_b, kept, 1, expert_rank),
        keep_experts(coeff, kept),
    )
