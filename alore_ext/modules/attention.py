"""Shifted-window attention that calls its linears.

torchvision's shifted-window attention hands `self.qkv.weight` and `self.proj.weight` to a function: an adapter on
such a linear would never run. The class here computes the same from the same parameters, but calls the linears as
modules. It is attached to the attention around an adapted linear (see `adapter.py`) and has no parameter of its own.

The arithmetic around the linears is in functions that `torch.fx` takes as they are, since it cannot follow
branches on sizes: a model traced by torchvision's feature extraction keeps working.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .adapter import Adapter

# The CUDA grid of memory-efficient attention has one row a head, and no more rows than this.
_MOST_HEADS = 65535


class CalledWindowAttention(Adapter):
    """torchvision's `ShiftedWindowAttention` and `ShiftedWindowAttentionV2`, with `qkv` and `proj` called.

    Both see [B, H, W, C] tokens: `qkv` the padded and rolled map, `proj` the cropped one. V2 (cosine attention)
    ignores the key third of qkv's bias: its forward zeroes that third in a clone, and the parameter keeps its
    values. Here that third is taken off the keys again, which comes to the same, exactly where it is 0, as
    torchvision's constructor leaves it; the gradient of that third is 0 to rounding. What `qkv` computes must
    therefore carry its bias unchanged, as MLAE does.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> [B, H, W, C]."""
        window, shift = self.window_size, self.shift_size
        height, width = x.shape[1], x.shape[2]
        logit_scale = getattr(self, "logit_scale", None)  # V2 alone has one
        qkv = self.qkv(_pad_and_roll(x, window, shift))
        y = _window_attention(
            qkv,
            self.get_relative_position_bias(),
            height,
            width,
            window,
            shift,
            self.num_heads,
            logit_scale,
            None if logit_scale is None else self.qkv.bias,
            self.attention_dropout if self.training else 0.0,
        )
        y = self.proj(_unroll_and_crop(y, height, width, window, shift))
        return F.dropout(y, self.dropout, self.training)


@fx.wrap
def _pad_and_roll(x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """[B, H, W, C] -> [B, H', W', C]: zeros up to whole windows, then the cyclic shift."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    shift = _shift_within(x, window, shift)
    return x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x


@fx.wrap
def _unroll_and_crop(x: Tensor, height: int, width: int, window: list[int], shift: list[int]) -> Tensor:
    """[B, H', W', C] -> [B, height, width, C], undoing `_pad_and_roll`."""
    shift = _shift_within(x, window, shift)
    x = x.roll(tuple(shift), (1, 2)) if any(shift) else x
    return x[:, :height, :width].contiguous()


@fx.wrap
def _window_attention(
    qkv: Tensor,
    position_bias: Tensor,
    height: int,
    width: int,
    window: list[int],
    shift: list[int],
    num_heads: int,
    logit_scale: Tensor | None,
    qkv_bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention within windows of N tokens: [B, H', W', 3C] -> [B, H', W', C].

    Args:
        qkv: of whole windows, already rolled.
        position_bias: [1, num_heads, N, N].
        height, width: of the map before `_pad_and_roll`.
        window, shift: tokens down and across.
        logit_scale: [num_heads, 1, 1], the log of cosine attention's scale; None for scaled dot products.
        qkv_bias: [3C], whose key third is taken off the keys of cosine attention; None where there is none.
        dropout: of the attention weights.
    """
    batch, padded_height, padded_width, channels = qkv.shape
    rows, columns = padded_height // window[0], padded_width // window[1]
    # [3, B, windows, heads, N, head_dim]
    parts = qkv.reshape(batch, rows, window[0], columns, window[1], 3, num_heads, channels // (3 * num_heads))
    parts = parts.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 3)
    q, k, v = parts.unbind(0)
    scale = None  # 1 / sqrt(head_dim)
    if logit_scale is not None:
        scale = 1.0
        q = F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp()
        if qkv_bias is not None:
            k = k - qkv_bias.chunk(3)[1].to(k.dtype).view(num_heads, 1, -1)
        k = F.normalize(k, dim=-1)
        if (padded_height, padded_width) != (height, width):
            # Keys of padding are 0, where the derivative of the normalisation is 1e12: in the bias's gradient, two
            # sums of such would not cancel.
            k = k.masked_fill(_padding(qkv, height, width, window, shift), 0)

    mask = position_bias
    if any(_shift_within(qkv, window, shift)):
        mask = mask + _shift_mask(qkv, window, shift).to(mask.dtype)
    # A mask for each window is the same in every image: with windows as heads it broadcasts over the batch.
    as_heads = mask.size(0) > 1 and rows * columns * num_heads <= _MOST_HEADS
    if as_heads:
        q, k, v = (part.flatten(1, 2) for part in (q, k, v))
        mask = mask.flatten(0, 1)[None]  # the fused kernels take no mask of three dimensions
    else:
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        mask = mask if mask.size(0) == 1 else mask.repeat(batch, 1, 1, 1)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    y = y.reshape(batch, rows, columns, num_heads, window[0], window[1], -1)
    return y.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, padded_height, padded_width, -1)


def _shift_within(x: Tensor, window: list[int], shift: list[int]) -> list[int]:
    """The shift along each axis: none where one window covers the padded map [B, H', W', C]."""
    return [0 if covers >= size else by for covers, size, by in zip(window, x.shape[1:3], shift, strict=True)]


def _in_windows(tokens: Tensor, window: list[int]) -> Tensor:
    """[H', W'] -> [windows, N]."""
    rows, columns = tokens.size(0) // window[0], tokens.size(1) // window[1]
    return tokens.view(rows, window[0], columns, window[1]).transpose(1, 2).flatten(2).flatten(0, 1)


def _padding(x: Tensor, height: int, width: int, window: list[int], shift: list[int]) -> Tensor:
    """[windows, 1, N, 1]: true for the tokens that `_pad_and_roll` added to reach x [B, H', W', C]."""
    down, across = (torch.arange(size, device=x.device) for size in x.shape[1:3])
    is_added = (down >= height)[:, None] | (across >= width)
    shift = _shift_within(x, window, shift)
    return _in_windows(is_added.roll((-shift[0], -shift[1]), (0, 1)), window)[:, None, :, None]


def _shift_mask(x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """[windows, 1, N, N]: -100 between tokens that the cyclic shift brought together from opposite edges, else 0."""

    def side(size: int, covers: int, by: int) -> Tensor:
        # Only the last window along an axis mixes two sides: what was there, and the `by` tokens from the start.
        position = torch.arange(size, device=x.device)
        return (position >= size - covers).long() + (position >= size - by).long()

    down, across = map(side, x.shape[1:3], window, _shift_within(x, window, shift))
    region = _in_windows(3 * down[:, None] + across, window)
    return torch.where(region[:, None, :] != region[:, :, None], -100.0, 0.0)[:, None]
