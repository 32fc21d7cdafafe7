"""SSF and BitFit layers: a layer whose output is scaled and shifted, and one whose affine parameters are.

Where only a layer's bias, or a norm's gain and bias, change, the layer's forward stays its own: the attribute that it
reads gives the changed value, and the parameter itself stays registered under its name. No activation is touched a
second time, no code that reads the attribute can go around the adapter, and a merge writes down what is read. In a
16-bit layer the value read is rounded to 16 bits, as a merged one is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter
from .multihead import CalledMultiheadAttention


class SsfAdapter(Adapter):
    """`gamma` and `beta`, one of each for every output channel."""

    adapter_parameters = ("gamma", "beta")

    def _scale_and_shift(self, y: Tensor) -> Tensor:
        """gamma * y + beta on the last dimension; y's dtype, computed in gamma's."""
        return torch.addcmul(self.beta, y, self.gamma).to(y.dtype)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "ssf")))


class _SsfLayer(SsfAdapter):
    @property
    def bias(self) -> Tensor:
        """The bias that the layer has as a whole, for an attention (Swin v2's) that takes it off the keys again."""
        own = self._parameters["bias"]
        return torch.addcmul(self.beta, own, self.gamma).to(own.dtype)


class SsfLinear(_SsfLayer):
    """`y = gamma * (x W^T + b) + beta`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return self._scale_and_shift(F.linear(x, self.weight, self._parameters["bias"]))


class SsfConv(_SsfLayer):
    """A convolution whose output channels are scaled and shifted."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, in_channels, height, width] -> [batch, out_channels, height, width], in its memory format."""
        y = self._conv_forward(x, self.weight, self._parameters["bias"])
        gamma, beta = self.gamma[:, None, None], self.beta[:, None, None]
        return torch.addcmul(beta, y, gamma).to(y.dtype)


class SsfMultiheadAttention(SsfAdapter, CalledMultiheadAttention):
    """SSF on the joint input projection of `nn.MultiheadAttention`: `gamma` and `beta` [3E]."""

    def in_projection(self, x: Tensor) -> Tensor:
        return self._scale_and_shift(super().in_projection(x))

    def cross_projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        thirds = zip(super().cross_projections(query, key, value), self.gamma.chunk(3), self.beta.chunk(3), strict=True)
        return tuple(torch.addcmul(beta, y, gamma).to(y.dtype) for y, gamma, beta in thirds)


class SsfNorm(SsfAdapter):
    """Any norm that ends in `weight * x + bias`: its own forward, on a gain and a bias that are scaled and shifted."""

    @property
    def weight(self) -> Tensor:
        """gamma * weight."""
        own = self._parameters["weight"]
        return (own * self.gamma).to(own.dtype)

    @property
    def bias(self) -> Tensor:
        """gamma * bias + beta."""
        own = self._parameters["bias"]
        return torch.addcmul(self.beta, own, self.gamma).to(own.dtype)


def _shifted(name: str) -> property:
    delta = f"{name}_delta"

    def read(self) -> Tensor:
        own = self._parameters[name]
        return (own + getattr(self, delta)).to(own.dtype)

    return property(read, doc=f"{name} + {delta}")


class BitFitAdapter(Adapter):
    """A layer's own forward, on biases that are shifted."""

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "bitfit")))


class BitFitLayer(BitFitAdapter):
    """Any layer with a `bias`: it reads as `bias + bias_delta`."""

    adapter_parameters = ("bias_delta",)
    bias = _shifted("bias")


class BitFitInProjection(BitFitAdapter):
    """`nn.MultiheadAttention`, whose input projection's bias is `in_proj_bias`."""

    adapter_parameters = ("in_proj_bias_delta",)
    in_proj_bias = _shifted("in_proj_bias")


class BitFitJointBias(BitFitAdapter):
    """timm's BEiT, EVA and Swin v2 attention, which keeps the trained parts of qkv's bias as `q_bias` and `v_bias`."""

    adapter_parameters = ("q_bias_delta", "v_bias_delta")
    q_bias = _shifted("q_bias")
    v_bias = _shifted("v_bias")
