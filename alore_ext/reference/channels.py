"""ALoRE and MLAE along axis 1 in plain PyTorch: the maps of `kron` and `lora` with the channels moved to the end."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kron import alore, layer_norm_alore
from .lora import masked_lora_linear


def alore_channels(
    x: Tensor, scale: Tensor, down: Tensor, up: Tensor, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    """x + dropout(x @ W') along axis 1; x [batch, channels, ...], factors as in `alore`."""
    return alore(x.movedim(1, -1), scale, down, up, dropout_p, training).movedim(-1, 1)


def layer_norm_alore_channels(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    down: Tensor,
    up: Tensor,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """alore(layer_norm(x)), both along axis 1; `weight` and `bias` are [channels] or None."""
    y = layer_norm_alore(x.movedim(1, -1), weight, bias, eps, scale, down, up, dropout_p, training)
    return y.movedim(-1, 1)


def mlae_channels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    coeff: Tensor,
    mask_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """conv1x1(x) + B diag(c) A x along axis 1, c = coeff * m / (1 - p) with one m ~ Bernoulli(1 - p) an expert.

    Args:
        x: [batch, in_channels, height, width].
        weight: [out_channels, in_channels], or the same with two axes of size 1 behind.
        bias: [out_channels] or None.
        lora_a: [R, in_channels].
        lora_b: [out_channels, R].
        coeff: [num_experts]; expert e owns R / num_experts rows of A, one expert after the other.
    """
    masked = F.dropout(coeff, mask_p, training).repeat_interleave(lora_a.shape[0] // coeff.shape[0])
    y = masked_lora_linear(x.movedim(1, -1), weight.flatten(1), bias, lora_a, lora_b, masked)
    return y.movedim(-1, 1)
