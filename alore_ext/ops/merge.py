"""In-place merging of adapters into the weights of the linears around them."""

import torch
from torch import Tensor


def merge_kron_(weight: Tensor, bias: Tensor | None, scale: Tensor, down: Tensor, up: Tensor, side: str) -> None:
    """Folds an ALoRE adapter into a linear layer, in place.

    With W' as in :func:`alore_ext.ops.kron_linear`:

    - ``side="before"``, the adapter acts on the layer's input: ``W <- W (I + W')^T``; bias is left as it is.
    - ``side="after"``, on its output: ``W <- (I + W')^T W`` and ``b <- b (I + W')``.

    Args:
        weight: ``[out_features, in_features]``, float64, float32, bfloat16 or float16.
        bias: ``[out_features]`` or None.
        scale, down, up: the adapter, square on the side it acts on; any floating dtype.

    Products are taken in float32 (float64 for float64) and rounded once. Call it under ``torch.no_grad()``.
    """
    torch.ops.alore_ext.merge_kron_(weight, bias, scale, down, up, side)


def merge_lora_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, coeff: Tensor) -> None:
    """``W <- W + B diag(coeff) A`` in place; see :func:`alore_ext.ops.masked_lora_linear` for the shapes.

    Products are taken in float32 (float64 for float64) and rounded once. Call it under ``torch.no_grad()``.
    """
    torch.ops.alore_ext.merge_lora_(weight, lora_a, lora_b, coeff)
