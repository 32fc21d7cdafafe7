"""Layers that run each sample of a batch under an adapter of its own, and classifiers that do.

A pooled layer belongs to a `alore_ext.serving.AdapterPool`. It holds no adapter: before each forward the pool writes
into its `LayerRoute` which adapters the batch needs and which sample needs which. Where a route is empty the layer
is the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alore_ext import ops

from .adapter import Adapter
from .multihead import CalledMultiheadAttention


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """One adapter a sample for one place of a layer.

    Attributes:
        factors: three lists with an entry an adapter: scale, down, up, or lora_a, lora_b, coeff [R].
        index: int64 [batch], the entry of each sample, or -1 for none.
    """

    factors: tuple[list[Tensor], list[Tensor], list[Tensor]]
    index: Tensor


@dataclass(eq=False)
class LayerRoute:
    """What a layer does with the batch that is under way; None where no sample has an adapter at that place."""

    before: AdapterStack | None = None  # ALoRE on the input
    weight: AdapterStack | None = None  # a low-rank update of the weight
    after: AdapterStack | None = None  # ALoRE on the output


class PooledLayer(Adapter):
    """Any layer, run as it is, between ALoRE on its input and ALoRE on its output, along the last dimension.

    Samples are outermost in memory: x is [batch, ..., C], or [batch * windows, ..., C] where a model partitions each
    image into windows.
    """

    adapter_attributes = ("_pooled_route", "_pooled_bias_owner")

    _pooled_route: LayerRoute
    # The attention that keeps this linear's bias as q_bias, k_bias and v_bias; None where the linear has its own.
    _pooled_bias_owner: nn.Module | None

    def forward(self, x: Tensor, *args, **kwargs):
        """layer(x), each sample under its own adapters."""
        y = self._apply_layer(_alore(x, self._pooled_route.before), *args, **kwargs)
        stack = self._pooled_route.after
        return (_alore(y[0], stack), *y[1:]) if isinstance(y, tuple) else _alore(y, stack)

    def _apply_layer(self, x: Tensor, *args, **kwargs):
        return super().forward(x, *args, **kwargs)


class PooledLinear(PooledLayer):
    """A linear; its weight may have a low-rank update a sample."""

    def _apply_layer(self, x: Tensor) -> Tensor:
        owner = self._pooled_bias_owner
        return _linear(x, self.weight, self.bias if owner is None else owner.joint_bias(), self._pooled_route.weight)


class PooledLayerNorm(PooledLayer):
    """`alore(layer_norm(x))` in one operator, for `nn.LayerNorm` and timm's over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., embed_dim] -> [..., embed_dim]."""
        stack = self._pooled_route.after
        return self._apply_layer(x) if stack is None else _layer_norm_alore(self, x, stack)


class PooledChannels(PooledLayer):
    """A norm or 1x1 convolution of NCHW tensors; adapters act along axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, C, height, width] -> the layer's output, each sample under its own adapters."""
        route = self._pooled_route
        if route.weight is None:
            y = self._apply_layer(x)
        else:
            y = _linear(x.movedim(1, -1), self.weight.flatten(1), self.bias, route.weight).movedim(-1, 1)
        return y if route.after is None else _alore(y.movedim(1, -1), route.after).movedim(-1, 1)


class PooledLayerNorm2d(PooledLayer):
    """`alore(layer_norm(x))` over axis 1 in one operator, for the LayerNorm2d of timm and of torchvision."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, channels, height, width] -> the same shape, channels_last."""
        stack = self._pooled_route.after
        return (
            self._apply_layer(x) if stack is None else _layer_norm_alore(self, x.movedim(1, -1), stack).movedim(-1, 1)
        )


class PooledMultiheadAttention(CalledMultiheadAttention):
    """`nn.MultiheadAttention` whose joint input projection may have a low-rank update a sample."""

    adapter_attributes = PooledLayer.adapter_attributes

    _pooled_route: LayerRoute
    _pooled_bias_owner: nn.Module | None

    def in_projection(self, x: Tensor) -> Tensor:
        return _linear(x, self.in_proj_weight, self.in_proj_bias, self._pooled_route.weight)

    def cross_projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joint = (self.in_projection(x).chunk(3, -1) for x in (query, key, value))
        return tuple(thirds[i] for i, thirds in enumerate(joint))


@dataclass(eq=False)
class HeadRoute:
    """Which of a head's tensors each sample takes.

    Attributes:
        tensors: an entry an adapter in use: the module's parameters by their own names.
        slot: int64 [batch], the entry of each sample.
        start: int64 [batch], where the outputs of that entry begin among those of all entries. Both are made before the
            forward: a copy from the host amid it would wait for the device.
    """

    tensors: Sequence[dict[str, Tensor]] = ()
    slot: Tensor | None = None
    start: Tensor | None = None


class PooledHeadLinear(nn.Module):
    """Each sample's own linear classifier. Their widths may differ."""

    def __init__(self, route: HeadRoute):
        super().__init__()
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, ..., in_features] -> [batch, ..., widest]; columns past a sample's own width mean nothing.

        All classifiers in use are one product over all samples, of which each takes its own columns: a few adapters'
        worth of spare multiply-adds instead of a weight matrix a sample in memory.
        """
        entries, start = self.route.tensors, self.route.start
        weights = [entry["weight"] for entry in entries]
        if len(entries) == 1:
            return F.linear(x, weights[0], entries[0].get("bias"))
        widths = [len(weight) for weight in weights]
        y = F.linear(x, torch.cat(weights), self._joint_bias(entries, weights))
        columns = start[:, None] + torch.arange(max(widths), device=x.device)
        shape = (len(start), *(1,) * (x.dim() - 2), max(widths))
        return y.gather(-1, columns.clamp(max=sum(widths) - 1).view(shape).expand(*x.shape[:-1], -1))

    @staticmethod
    def _joint_bias(entries: Sequence[dict[str, Tensor]], weights: Sequence[Tensor]) -> Tensor | None:
        biases = [entry.get("bias") for entry in entries]
        if all(bias is None for bias in biases):
            return None
        pairs = zip(biases, weights, strict=True)
        return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for bias, weight in pairs])


class PooledHeadNorm(nn.Module):
    """Each sample's own affine behind a layer norm that is part of a classifier (torchvision's ConvNeXt)."""

    def __init__(self, route: HeadRoute, eps: float, channel_axis: int):
        super().__init__()
        self.route = route
        self.eps = eps
        self.channel_axis = channel_axis

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, ..., C] or [batch, C, height, width] -> its shape. Affine in float32 at least, rounded once."""
        entries, slot = self.route.tensors, self.route.slot
        moved = x.movedim(self.channel_axis, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(moved.to(wide), moved.shape[-1:], eps=self.eps)
        for name, apply in (("weight", torch.mul), ("bias", torch.add)):
            own = torch.stack([entry[name] for entry in entries]).to(wide)[slot]
            y = apply(y, own.view(len(slot), *(1,) * (y.dim() - 2), -1))
        return y.to(x.dtype).movedim(-1, self.channel_axis)


def _by_sample(x: Tensor, index: Tensor) -> Tensor:
    """[batch, rest, C]: windows of one image under its own adapter."""
    batch = index.shape[0]
    if batch == 0:
        return x.flatten(1, -2) if x.dim() > 2 else x[:, None]
    if x.shape[0] % batch:
        raise ValueError(
            f"AdapterPool: a layer got {list(x.shape)} for {batch} images; expected them outermost, whole or in windows"
        )
    return x.reshape(batch, -1, x.shape[-1])


def _alore(x: Tensor, stack: AdapterStack | None) -> Tensor:
    if stack is None:
        return x
    return ops.alore_grouped(_by_sample(x, stack.index), *stack.factors, stack.index).view(x.shape)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, stack: AdapterStack | None) -> Tensor:
    if stack is None:
        return F.linear(x, weight, bias)
    y = ops.masked_lora_linear_grouped(_by_sample(x, stack.index), weight, bias, *stack.factors, stack.index)
    return y.view(*x.shape[:-1], weight.shape[0])


def _layer_norm_alore(layer: nn.LayerNorm, x: Tensor, stack: AdapterStack) -> Tensor:
    y = ops.layer_norm_alore_grouped(
        _by_sample(x, stack.index), layer.weight, layer.bias, layer.eps, *stack.factors, stack.index
    )
    return y.view(x.shape)
