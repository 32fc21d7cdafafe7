"""Kronecker-structured maps: the paper "ALoRE: Efficient Visual Adaptation via Aggregating Low Rank Experts"."""

import torch
from torch import Tensor

from .._extension import _C
from ._limits import device_limits

_SEED_RANGE = (-(2**63), 2**63 - 1)

# Bound once: a training step at a small batch waits for the host, and looking an operator up by name takes as long as
# a good part of the call.
_kron_linear = torch.ops.alore_ext.kron_linear.default
_alore = torch.ops.alore_ext.alore.default
_layer_norm_alore = torch.ops.alore_ext.layer_norm_alore.default
_add_layer_norm_alore = torch.ops.alore_ext.add_layer_norm_alore.default


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
    return _kron_linear(x, scale, down, up)


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
    seed, p = (None, 0.0) if dropout_p == 0.0 else _draw_seed(x, dropout_p, training)
    return _alore(x, scale, down, up, seed, p)


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
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``alore(layer_norm(x))`` over the last axis: a transformer block's norm with the adapter behind it.

    Args:
        x: ``[..., embed_dim]``.
        weight, bias: ``[embed_dim]`` or None; x's dtype or float32.
        eps: added to the variance.
        scale, down, up, dropout_p, training: as for :func:`alore`.
        residual: like x. The norm then acts on ``x + residual``, rounded to their dtype, which is returned as well:
            a block's residual sum costs no pass of its own.

    Returns:
        Like x; under autocast, float32 x gives the autocast dtype. With a residual, that and the sum. Backward keeps
        x (or the sum), one mean and one reciprocal standard deviation a token, and recomputes the rest.
    """
    seed, p = (None, 0.0) if dropout_p == 0.0 else _draw_seed(x, dropout_p, training)
    if residual is None:
        return _layer_norm_alore(x, weight, bias, eps, scale, down, up, seed, p)[0]
    return _add_layer_norm_alore(x, residual, weight, bias, eps, scale, down, up, seed, p)[:2]


def plan_alore(
    x: Tensor,
    scale: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    norm: bool = True,
    residual: bool = True,
    out_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    returns_sum: bool = False,
    backward: bool = False,
    device: torch.device | str | int | None = None,
    capability: int | None = None,
    num_sms: int | None = None,
    shared_per_block: int | None = None,
):
    """How a CUDA device would run :func:`layer_norm_alore`, or :func:`alore` or :func:`kron_linear`; printable.

    The fused kernels take 16-bit activations (or float32 ones behind a norm, under autocast), ``embed_dim /
    num_experts`` a multiple of 8, at most 8 blocks and ``num_experts * rank`` at most 64 (backward: not 33 to 48), on
    compute capability 8.0 and later, where the factors and a tile of 16 tokens fit a block's shared memory (embed_dim
    up to 1536 at 227 KiB, 1408 at 163 KiB and 768 at 99 KiB in both passes behind a norm, with 4 experts of rank 4).
    Both passes are ``pipelined``, and fastest, for 4 blocks, ``num_experts * rank`` up to 16, embed_dim 128, 256, 384,
    512 or 768 (forward 1024 too), 16-bit rows (backward behind a norm bfloat16 alone), no dropout and no sum, where
    114 to 217 KiB of shared memory are there.
    Anything else is composed of cuBLAS products and smaller kernels: see :func:`plan_kron`.

    Args:
        x, scale, down, up: tensors of the call's shapes and dtypes; no values are read.
        norm: with the layer norm in front.
        residual: False for :func:`kron_linear`, which adds nothing to its result.
        out_dtype: of the result; x's by default.
        dropout_p: of the call.
        returns_sum: :func:`layer_norm_alore` with a residual input, whose sum is returned too.
        backward: the plan of the backward pass.
        device: a CUDA device to ask for its limits; x's by default.
        capability, num_sms, shared_per_block: limits of a device that is not there: 10 * major + minor, the number of
            multiprocessors, and the shared memory a block may opt in to, in bytes.

    Returns:
        An object with ``fused``, and ``reason`` where it is False.

    Raises:
        ValueError: the map is not square, or no device and no limits are known.
    """
    if scale.size(1) != scale.size(2) or down.size(1) != up.size(2):
        raise ValueError(
            "plan_alore: the map must be square block by block; got scale "
            f"{list(scale.shape)}, down {list(down.shape)}, up {list(up.shape)}"
        )
    device = torch.device(x.device if device is None else device)
    limits = device_limits("plan_alore", device, capability, num_sms, shared_per_block)
    return _C.plan_alore(
        num_tokens=x[..., 0].numel(),
        num_experts=scale.size(0),
        num_blocks=scale.size(1),
        block_dim=down.size(1),
        rank=down.size(2),
        dtype=x.dtype,
        out_dtype=out_dtype or x.dtype,
        factor_dtype=scale.dtype,
        norm=norm,
        add_base=residual,
        dropout=dropout_p > 0,
        residual=returns_sum,
        capability=limits[0],
        num_sms=limits[1],
        shared_per_block=limits[2],
        backward=backward,
    )


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
