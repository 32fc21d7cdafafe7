"""The ops that take one adapter a sample, in plain PyTorch: sample after sample, each through the single op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtype import cast, compute_dtype
from .kron import alore, kron_linear, layer_norm_alore
from .lora import masked_lora_linear

Adapters = Tensor | Sequence[Tensor]


def _each(x: Tensor, index: Tensor, adapted: Callable[[Tensor, int], Tensor], plain: Callable[[Tensor], Tensor]):
    """Sample b is adapted(x[b], index[b]), or plain(x[b]) where the index is -1."""
    samples = [plain(row) if i < 0 else adapted(row, i) for row, i in zip(x, index.tolist(), strict=True)]
    return torch.stack(samples) if samples else plain(x)


def kron_linear_grouped(x: Tensor, scale: Adapters, down: Adapters, up: Adapters, index: Tensor) -> Tensor:
    """kron_linear with sample b (axis 0 of x) under adapter index[b]; 0 where that is -1.

    Args:
        x: [batch, ..., embed_dim].
        scale, down, up: entry i of each is adapter i, shapes as in `kron_linear` with a square map.
        index: int64 [batch].
    """
    return _each(x, index, lambda row, i: kron_linear(row, scale[i], down[i], up[i]), torch.zeros_like)


def alore_grouped(x: Tensor, scale: Adapters, down: Adapters, up: Adapters, index: Tensor) -> Tensor:
    """x + kron_linear_grouped(x)."""
    return _each(x, index, lambda row, i: alore(row, scale[i], down[i], up[i]), torch.clone)


def layer_norm_alore_grouped(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Adapters,
    down: Adapters,
    up: Adapters,
    index: Tensor,
) -> Tensor:
    """alore_grouped(layer_norm(x)); the norm alone where the index is -1."""

    def plain(row: Tensor) -> Tensor:
        values, w, b = cast(compute_dtype(row, weight, bias), row, weight, bias)
        return F.layer_norm(values, row.shape[-1:], w, b, eps).to(row.dtype)

    return _each(x, index, lambda row, i: layer_norm_alore(row, weight, bias, eps, scale[i], down[i], up[i]), plain)


def masked_lora_linear_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Adapters,
    lora_b: Adapters,
    coeff: Adapters,
    index: Tensor,
) -> Tensor:
    """masked_lora_linear with sample b under adapter index[b]; the base linear where that is -1."""

    def plain(row: Tensor) -> Tensor:
        return F.linear(*cast(compute_dtype(row, weight, bias), row, weight, bias)).to(row.dtype)

    return _each(x, index, lambda row, i: masked_lora_linear(row, weight, bias, lora_a[i], lora_b[i], coeff[i]), plain)
