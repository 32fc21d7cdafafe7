"""ALoRE and MLAE along the channel axis: axis 1 of `[batch, channels, height, width]`, for convolutional backbones.

Where channels are innermost in memory (`torch.channels_last`), a permuted view goes through the operators of `kron` and
`lora` and back: nothing is copied, and the result is channels_last too. In NCHW memory the same maps are batched
products over the strides that x has: x is not transposed, and the result is NCHW. x that is strided in another way
(a crop, a slice of the channels) is made contiguous first, in the order that it has.

Arithmetic in NCHW memory is that of torch's own products: factors are brought to the activations' dtype (autocast's,
where it is on) after any of them were multiplied together, and dropout draws from torch's generator.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .kron import alore, layer_norm_alore
from .lora import mlae_linear

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float64, torch.float32, *_SIXTEEN_BIT)
_UNCHANGED = contextlib.nullcontext()


def alore_channels(
    x: Tensor, scale: Tensor, down: Tensor, up: Tensor, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    """:func:`alore` along axis 1.

    Args:
        x: ``[batch, num_blocks * p, ...]``; float64, float32, bfloat16 or float16.
        scale: ``[num_experts, num_blocks, num_blocks]``.
        down: ``[num_experts, p, rank]``.
        up: ``[num_experts, rank, p]``. Factors have x's dtype, or float32 under a 16-bit x.
        dropout_p: probability, in [0, 1), of dropping an element of the branch. The mask of one seed depends on x's
            memory format.
        training: without it nothing is dropped.

    Returns:
        x's shape and memory format; x's dtype, or that of autocast where it is on.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or device, or dtype; dropout_p outside [0, 1).
    """
    _check_kron("alore_channels", x, scale, down, up, dropout_p)
    if _channels_innermost(x):
        return alore(x.movedim(1, -1), scale, down, up, dropout_p, training).movedim(-1, 1)
    return _strided_alore(x.to(_compute_dtype(x)), scale, down, up, dropout_p if training else 0.0)


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
    """:func:`layer_norm_alore` along axis 1: the LayerNorm2d of timm and torchvision with the adapter behind it.

    As those layers do, it norms the permuted view. NCHW memory is therefore copied once, transposed, and the result is
    channels_last, which is what LayerNorm2d returns as well.

    Args:
        x: ``[batch, num_blocks * p, ...]``.
        weight, bias: ``[num_blocks * p]`` or None; x's dtype or float32.
        eps: added to the variance.
        scale, down, up, dropout_p, training: as for :func:`alore_channels`.

    Returns:
        x's shape, channels_last; x's dtype, or that of autocast where it is on.

    Raises:
        ValueError, TypeError: as :func:`alore_channels`.
    """
    op = "layer_norm_alore_channels"
    _check_kron(op, x, scale, down, up, dropout_p)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check_shape(op, name, value, "[channels]", (x.shape[1],))
    view = x.movedim(1, -1)
    return layer_norm_alore(view, weight, bias, eps, scale, down, up, dropout_p, training).movedim(-1, 1)


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
    """:func:`mlae_linear` along axis 1: a 1x1 convolution with expert-masked low-rank updates.

    One mask a call for the whole batch, from torch's generator of x's device. The draw follows `torch.manual_seed`, is
    fresh at each replay of a CUDA graph and the same again under activation checkpointing; NCHW and channels_last
    memory draw different masks from one seed. In NCHW memory the base is `torch.nn.functional.conv2d`, so that with
    ``lora_b = 0`` the result is that of the plain layer, bit by bit.

    Args:
        x: ``[batch, in_channels, height, width]``; float64, float32, bfloat16 or float16.
        weight: ``[out_channels, in_channels]``, or the same with two axes of size 1 behind.
        bias: ``[out_channels]`` or None.
        lora_a: ``[R, in_channels]``.
        lora_b: ``[out_channels, R]``.
        coeff: ``[num_experts]``, num_experts dividing R. All five have x's dtype, or float32 under a 16-bit x.
        mask_p: probability, in [0, 1), of masking an expert; with 0 this is a plain low-rank update.
        training: without it nothing is masked, nothing scaled, and nothing drawn.

    Returns:
        ``[batch, out_channels, height, width]`` in x's memory format; x's dtype, or that of autocast where it is on.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or device, or dtype; mask_p outside [0, 1).
    """
    _check_mlae(x, weight, bias, lora_a, lora_b, coeff, mask_p)
    dtype = _compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    if _channels_innermost(x):
        view = x.movedim(1, -1)
        return mlae_linear(view, weight.flatten(1), bias, lora_a, lora_b, coeff, mask_p, training).movedim(-1, 1)
    # Dropout of the coefficients is the mask: m / (1 - p) times each, drawn on the device.
    masked = F.dropout(coeff, mask_p, training)
    to_output = (lora_b.unflatten(1, (coeff.shape[0], -1)) * masked[:, None]).flatten(1)
    return _strided_low_rank(x.to(dtype), weight.to(dtype), bias, lora_a.to(dtype), to_output.to(dtype))


def _strided_alore(x: Tensor, scale: Tensor, down: Tensor, up: Tensor, dropout_p: float) -> Tensor:
    """x + dropout(x W') along axis 1 in NCHW memory."""
    (num_experts, num_blocks, _), (_, p, rank) = scale.shape, down.shape
    batch, spatial = x.shape[0], math.prod(x.shape[2:])
    codes = num_blocks * num_experts * rank
    if _builds_dense(num_blocks * p, codes):
        image = x.reshape(batch, num_blocks * p, spatial)
        return _add_product(image, _dense(scale, down, up).to(x.dtype), image, dropout_p).view(x.shape)
    # [batch, num_blocks] is one axis of batched products, as it is in memory. Each of them computes all experts.
    blocks = x.reshape(batch * num_blocks, p, spatial)
    z = _product(down.to(x.dtype).mT.flatten(0, 1), blocks)
    h = _product(_mixing(scale, rank).to(x.dtype), z.view(batch, codes, spatial))
    h = h.view(batch * num_blocks, num_experts * rank, spatial)
    return _add_product(blocks, up.to(x.dtype).flatten(0, 1).mT, h, dropout_p).view(x.shape)


def _builds_dense(channels: int, codes: int) -> bool:
    """Whether W' [channels, channels] is built; codes is num_blocks * num_experts * rank, the values in z (and h).

    Dense moves 3 * channels values a pixel forward, factored 3 * channels + 4 * codes. Up to channels = 2 * codes
    dense moves at most 0.6 of that, in two launches fewer (four under float32 factors and a 16-bit x), for about twice
    the multiply-adds; on a GPU these hide behind memory. Timed on one CPU core in float32, 4 experts of rank 4
    (codes = 64), forward and backward, batch 8: 0.87 of factored at 96 channels, 1.2 at 128, 2.1 at 192, 31 at 1024.
    """
    return channels <= 2 * codes


def _dense(scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """W' transposed, [channels out, channels in], in the factors' own dtype."""
    device = scale.device.type
    with torch.autocast(device, enabled=False) if _is_autocasting(device) else _UNCHANGED:
        inner = torch.bmm(down, up)
        dense = torch.einsum("eab,epq->bqap", scale, inner)
    return dense.flatten(2).flatten(0, 1)


def _mixing(scale: Tensor, rank: int) -> Tensor:
    """The map from z to h, [(b, expert, rank), (a, expert, rank)]: scale[expert, a, b] where expert and rank agree.

    One product with it, zeros and all, takes less time than bringing z into an order in which each expert could be
    multiplied by its own [num_blocks, num_blocks].
    """
    num_experts, num_blocks, _ = scale.shape
    diagonal = scale.permute(2, 1, 0)[..., None].expand(-1, -1, -1, rank).flatten(2)
    codes = num_blocks * num_experts * rank
    return torch.diag_embed(diagonal).transpose(1, 2).reshape(codes, codes)


def _strided_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, to_code: Tensor, to_output: Tensor) -> Tensor:
    """conv1x1(x) + to_output @ to_code @ x in NCHW memory."""
    # A weight in channels_last memory would make the convolution return that.
    base = F.conv2d(x, weight.flatten(1)[:, :, None, None], bias)
    code = _product(to_code, x.flatten(2))
    return _add_product(base.flatten(2), to_output, code, 0.0).view(base.shape)


def _product(matrix: Tensor, operand: Tensor) -> Tensor:
    """matrix [m, k] @ operand [batch, k, spatial]. torch.matmul would transpose the operand into one large matrix.

    In backward the matrix's gradient is one [m, k] a sample, then their sum: m / spatial of the operand's memory.
    """
    return torch.bmm(matrix.expand(operand.shape[0], -1, -1), operand)


def _add_product(base: Tensor, matrix: Tensor, operand: Tensor, dropout_p: float) -> Tensor:
    """base + dropout(matrix @ operand); without dropout the sum is the product's own, and rounded once."""
    if dropout_p == 0.0:
        return torch.baddbmm(base, matrix.expand(operand.shape[0], -1, -1), operand)
    return base + F.dropout(_product(matrix, operand), dropout_p)


def _channels_innermost(x: Tensor) -> bool:
    return x.stride(1) == 1


def _is_autocasting(device: str) -> bool:
    # Not by torch.amp.is_autocast_available, which torch 2.11 cannot compile.
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, which leaves float64 alone; x's otherwise."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.dtype != torch.float64 and _is_autocasting(device) else x.dtype


def _check_kron(op: str, x: Tensor, scale: Tensor, down: Tensor, up: Tensor, dropout_p: float) -> None:
    _check_x(op, x)
    _check_like_x(op, x, scale=scale, down=down, up=up)
    _check_one_dtype(op, scale=scale, down=down, up=up)
    if scale.dim() != 3 or scale.shape[1] != scale.shape[2]:
        raise _wrong_shape(op, "scale", scale, "[num_experts, num_blocks, num_blocks]")
    if down.dim() != 3:
        raise _wrong_shape(op, "down", down, "[num_experts, p, rank]")
    (num_experts, num_blocks, _), (p, rank) = scale.shape, down.shape[1:]
    if x.shape[1] != num_blocks * p:
        raise ValueError(
            f"{op}: axis 1 of x must be num_blocks * p = {num_blocks} * {p} = {num_blocks * p}, got {list(x.shape)}"
        )
    _check_shape(op, "down", down, "[num_experts, p, rank]", (num_experts, p, rank))
    _check_shape(op, "up", up, "[num_experts, rank, p]", (num_experts, rank, p))
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")


def _check_mlae(x, weight, bias, lora_a, lora_b, coeff, mask_p) -> None:
    op = "mlae_channels"
    _check_x(op, x)
    if x.dim() != 4:
        raise _wrong_shape(op, "x", x, "[batch, in_channels, height, width]")
    given = {} if bias is None else {"bias": bias}
    _check_like_x(op, x, weight=weight, **given, lora_a=lora_a, lora_b=lora_b, coeff=coeff)
    _check_one_dtype(op, lora_a=lora_a, lora_b=lora_b, coeff=coeff)
    channels = x.shape[1]
    if weight.dim() not in (2, 4) or weight.shape[1:] not in ((channels,), (channels, 1, 1)):
        raise _wrong_shape(op, "weight", weight, f"[out_channels, {channels}] or [out_channels, {channels}, 1, 1]")
    out_channels = weight.shape[0]
    if bias is not None:
        _check_shape(op, "bias", bias, "[out_channels]", (out_channels,))
    if lora_a.dim() != 2 or lora_a.shape[1] != channels:
        raise _wrong_shape(op, "lora_a", lora_a, f"[R, in_channels] = [R, {channels}]")
    rank = lora_a.shape[0]
    _check_shape(op, "lora_b", lora_b, "[out_channels, R]", (out_channels, rank))
    if coeff.dim() != 1 or coeff.shape[0] == 0 or rank % coeff.shape[0]:
        raise _wrong_shape(op, "coeff", coeff, f"[num_experts], num_experts dividing R = {rank}")
    if not 0.0 <= mask_p < 1.0:
        raise ValueError(f"{op}: mask_p must be in [0, 1), got {mask_p}")


def _check_x(op: str, x: Tensor) -> None:
    if x.dim() < 2:
        raise _wrong_shape(op, "x", x, "[batch, channels, ...]")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{op}: x must be float64, float32, bfloat16 or float16, got {x.dtype}")


def _check_like_x(op: str, x: Tensor, **others: Tensor) -> None:
    """x's device; x's dtype, or float32 where the arithmetic is in 16 bits."""
    dtype = _compute_dtype(x)
    allowed = (x.dtype, dtype, torch.float32) if dtype in _SIXTEEN_BIT else (dtype,)
    for name, value in others.items():
        if value.device != x.device:
            raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {value.device}")
        if value.dtype not in allowed:
            also = " or float32" if dtype in _SIXTEEN_BIT else ""
            raise TypeError(f"{op}: {name} must be {dtype}{also}, got {value.dtype}")


def _check_one_dtype(op: str, **factors: Tensor) -> None:
    (first, leader), *others = factors.items()
    for name, value in others:
        if value.dtype != leader.dtype:
            raise TypeError(f"{op}: {name} must have {first}'s dtype {leader.dtype}, got {value.dtype}")


def _check_shape(op: str, name: str, value: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise _wrong_shape(op, name, value, f"{axes} = {list(expected)}")


def _wrong_shape(op: str, name: str, value: Tensor, expected: str) -> ValueError:
    return ValueError(f"{op}: {name} must be {expected}, got {list(value.shape)}")
