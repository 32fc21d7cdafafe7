"""Norms and 1x1 convolutions of NCHW backbones with an adapter along the channel axis.

Parameters and attributes are those of the adapters for tokens, in `alore` and `mlae`: a 1x1 convolution is a linear
over channels. None of them moves an activation between NCHW and channels_last memory, beyond what the layer does
itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from alore_ext import ops

from .alore import AloreAdapter
from .mlae import MlaeAdapter


class AloreLayerNorm2d(AloreAdapter):
    """`alore(layer_norm(x))` over axis 1 in one operator, for the LayerNorm2d of timm and of torchvision.

    Statistics and affine are in float32, as in torch's layer norm. timm's `set_fast_norm` makes its layer round x to
    autocast's dtype before the norm, to save time; here the norm reads float32 x at no cost, so the switch has no
    effect, and the results of either setting differ from this by roundings.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, channels, height, width] -> the same shape, channels_last."""
        return ops.layer_norm_alore_channels(
            x,
            self.weight,
            self.bias,
            self.eps,
            *self._factors(),
            self._alore_dropout,
            self.training,
        )


class _AloreBehind(AloreAdapter):
    def forward(self, x: Tensor) -> Tensor:
        """alore(layer(x)) along axis 1 of the layer's output, in that output's memory format."""
        y = super().forward(x)
        return ops.alore_channels(y, *self._factors(), self._alore_dropout, self.training)


class AloreChannelsNorm(_AloreBehind):
    """Any other norm of NCHW tensors (AS-MLP's `nn.GroupNorm(1, channels)`), run as it is, then `alore` on axis 1."""


class AloreConv(_AloreBehind):
    """A 1x1 convolution, run as it is, then `alore` on its output channels: `after_attn` and `after_ffn`."""


class MlaeConv(MlaeAdapter):
    """A 1x1 convolution with masked rank-1 experts beside its weight: `MlaeLinear` along axis 1.

    `lora_a` [R, in_channels], `lora_b` [out_channels, R], `coeff` [num_experts], R = num_experts * expert_rank.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, in_channels, height, width] -> [batch, out_channels, height, width], in x's memory format.

        Raises:
            ValueError: the convolution is not 1x1 with stride 1, no padding and one group.
        """
        if not is_pointwise(self):
            raise ValueError(
                "MlaeConv: the convolution must have kernel_size 1, stride 1, padding 0 and groups 1, got "
                f"kernel_size {self.kernel_size}, stride {self.stride}, padding {self.padding}, groups {self.groups}"
            )
        return ops.mlae_channels(x, self.weight, self.bias, *self._factors(), self._mlae_mask_p, self.training)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is a linear map of the channels, at each pixel by itself.

    Of kernel_size 1, stride 1, padding 0 and groups 1.
    """
    # 'valid' and 'same' pad nothing around a kernel of one pixel.
    padded = conv.padding not in ((0, 0), "valid", "same")
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and not padded and conv.groups == 1
