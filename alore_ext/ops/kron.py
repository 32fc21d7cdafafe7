"""Kronecker-structured maps: the paper "ALoRE: Efficient Visual Adaptation via Aggregating Low Rank Experts"."""

import torch
from torch import Tensor

from .._extension import _C

_SEED_RANGE = (-(2**63), 2**63 - 1)


def _draw_seed(x: Tensor, dropout_p: float, training: bool) -> tuple[Tensor | None, float]:
    """A dropout seed from torch's generator of x's device; (None, 0) where nothing is dropped.

    The seed stays on the device: CUDA graphs draw a fresh one at each replay, and activation checkpointing, which
    restores the generator, draws the same one again.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if not training or dropout_p == 0.0:
        return None, 0.0
    return torch.randint(*_SEED_RANGE, (1,), dtype=torch.int64, device=x.device), dropout_p


def kron_linear(x: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``y = x W'`` with ``W' = sum_e kron(scale[e], down[e] @ up[e])``, which is never built.

    Args:
        x: ``[..., s_in * p_in]``; float64, float32, bfloat16 or float16.
        scale: ``[num_experts, s_in, s_out]``.
        down: ``[num_experts, p_in, rank]``.
        up: ``[num_experts, rank, p_out]``.

    Returns:
        ``[..., s_out * p_out]``, x's dtype.
    """
    return torch.ops.alore_ext.kron_linear(x, scale, down, up)


def alore(x: Tensor, scale: Tensor, down: Tensor, up: Tensor, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    """``x + dropout(kron_linear(x))``, the ALoRE module.

    Args:
        x, scale, down, up: as for :func:`kron_linear`, with ``s_out * p_out == s_in * p_in``.
        dropout_p: probability, in [0, 1), of dropping an element of the branch; kept ones are divided by 1 - p. The
            mask is recomputed in backward from one int64 seed.
        training: without it nothing is dropped.

    Raises:
        ValueError: dropout_p outside [0, 1).
    """
    seed, p = _draw_seed(x, dropout_p, training)
    return torch.ops.alore_ext.alore(x, scale, down, up, seed, p)


def layer_norm_alore(
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
    """``alore(layer_norm(x))`` over the last axis: a transformer block's norm with the adapter behind it.

    Args:
        x: ``[..., embed_dim]``.
        weight, bias: ``[embed_dim]`` or None; x's dtype or float32.
        eps: added to the variance.
        scale, down, up, dropout_p, training: as for :func:`alore`.

    Returns:
        Like x; under autocast, float32 x gives the autocast dtype. Backward keeps x, one mean and one reciprocal
        standard deviation a token, and recomputes the rest.
    """
    seed, p = _draw_seed(x, dropout_p, training)
    return torch.ops.alore_ext.layer_norm_alore(x, weight, bias, eps, scale, down, up, seed, p)[0]


def plan_kron(x: Tensor, scale: Tensor, down: Tensor, up: Tensor, backward: bool = False):
    """How the CUDA kernels would run :func:`kron_linear` on tensors of these shapes; printable.

    Returns:
        An object with ``chunk_tokens``, ``num_chunks``, ``scale_grad_blocks`` and ``workspace_bytes``.
    """
    return _C.plan_kron(
        num_tokens=x[..., 0].numel(),
        num_experts=scale.size(0),
        s_in=scale.size(1),
        s_out=scale.size(2),
        p_in=down.size(1),
        p_out=up.size(2),
        rank=down.size(2),
        dtype=x.dtype,
        factor_dtype=scale.dtype,
        backward=backward,
    )
