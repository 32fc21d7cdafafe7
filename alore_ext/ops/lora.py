"""Expert-masked low-rank updates: the paper "MLAE: Masked LoRA Experts for Visual Parameter-Efficient Fine-Tuning"."""

import torch
from torch import Tensor


def masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, coeff: Tensor
) -> Tensor:
    """``y = x W^T + b + ((x A^T) * coeff) B^T``.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, x's dtype.
        bias: ``[out_features]`` or None, x's dtype.
        lora_a: ``[R, in_features]``.
        lora_b: ``[out_features, R]``.
        coeff: ``[R]``; carries each expert's coefficient, mask and 1/(1 - p). Where it is 0, the rows of A's and
            B's gradients are exactly 0, while coeff's own gradient stays the true derivative.

    Returns:
        ``[..., out_features]``, x's dtype.
    """
    return torch.ops.alore_ext.masked_lora_linear(x, weight, bias, lora_a, lora_b, coeff)
