"""MLAE in plain PyTorch (DESIGN section 2; MLAE paper, equations 4 to 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtype import cast, compute_dtype


def masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, coeff: Tensor
) -> Tensor:
    """y = x @ weight^T + bias + ((x @ lora_a^T) * coeff) @ lora_b^T.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.
        lora_a: [R, in_features].
        lora_b: [out_features, R].
        coeff: [R], with the mask and its 1 / (1 - p) already inside.

    Returns:
        [..., out_features], in x's dtype.
    """
    dtype = compute_dtype(x, weight, bias, lora_a, lora_b, coeff)
    values, weight, bias, lora_a, lora_b, coeff = cast(dtype, x, weight, bias, lora_a, lora_b, coeff)
    y = F.linear(values, weight, bias) + F.linear(F.linear(values, lora_a) * coeff, lora_b)
    return y.to(x.dtype)


def layer_norm_mlae_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    coeff: Tensor,
) -> tuple[Tensor, Tensor]:
    """masked_lora_linear(n) and n, n = layer_norm(x) over the last axis; no mask is drawn. Shapes as there."""
    dtype = compute_dtype(x, norm_weight, norm_bias, weight, bias, lora_a, lora_b, coeff)
    values, norm_weight, norm_bias = cast(dtype, x, norm_weight, norm_bias)
    normalised = F.layer_norm(values, values.shape[-1:], norm_weight, norm_bias, eps)
    y = masked_lora_linear(normalised, weight, bias, lora_a, lora_b, coeff)
    return y.to(x.dtype), normalised.to(x.dtype)


def merge_lora_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, coeff: Tensor) -> None:
    """weight <- weight + lora_b diag(coeff) lora_a, in place. Shapes as in `masked_lora_linear`."""
    dtype = compute_dtype(weight, lora_a, lora_b, coeff)
    wide, lora_a, lora_b, coeff = cast(dtype, weight, lora_a, lora_b, coeff)
    with torch.no_grad():
        weight.copy_(wide + (lora_b * coeff) @ lora_a)
