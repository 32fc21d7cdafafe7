"""ConvNeXt, v1 and v2, of timm (linear and conv_mlp), torchvision and transformers.

The block's first linear map is a depthwise convolution, into which no dense map folds, so the two adapters stand around
the MLP: before pwconv1 (behind the norm) and after pwconv2. v2's response normalisation stands between the two.
"""

from __future__ import annotations

from torch import nn

from .known_blocks import CONV, LINEAR, SEQUENTIAL, Branch, KnownBlock, find_known_structure
from .registry import Structure, register_family

_REFUSED = {
    "before_attn": "a ConvNeXt block starts with a depthwise convolution, and a dense map does not fold into one",
    **{place: "a ConvNeXt block has no attention" for place in ("after_attn", "qkv", "proj")},
}
_TIMM_MLPS = ("timm.layers.mlp.Mlp", "timm.layers.mlp.GlobalResponseNormMlp")


def _timm(mlps: tuple[str, ...], linear: str, channel_axis: int) -> KnownBlock:
    return KnownBlock(
        runs="timm.models.convnext.ConvNeXtBlock",
        parts={"mlp": mlps, "mlp.fc1": (linear,), "mlp.fc2": (linear,)},
        ffn=Branch(norm="norm", takes=("mlp.fc1",), gives="mlp.fc2"),
        channel_axis=channel_axis,
        refused=_REFUSED,
    )


def _transformers(module: str, prefix: str) -> KnownBlock:
    return KnownBlock(
        runs=f"transformers.models.{module}.modeling_{module}.{prefix}Layer",
        parts={"pwconv1": (LINEAR,), "pwconv2": (LINEAR,)},
        ffn=Branch(norm="layernorm", takes=("pwconv1",), gives="pwconv2"),
        refused=_REFUSED,
    )


_KNOWN = (
    _timm(_TIMM_MLPS, LINEAR, -1),
    _timm((*_TIMM_MLPS, "timm.layers.mlp.ConvMlp"), CONV, 1),
    KnownBlock(
        runs="torchvision.models.convnext.CNBlock",
        parts={"block": (SEQUENTIAL,), "block.3": (LINEAR,), "block.5": (LINEAR,)},
        ffn=Branch(norm="block.2", takes=("block.3",), gives="block.5"),
        refused=_REFUSED,
    ),
    _transformers("convnext", "ConvNext"),
    _transformers("convnextv2", "ConvNextV2"),
)


class ConvNextFamily:
    """See the module's text."""

    name = "convnext"
    default_locations = ("before_ffn", "after_ffn")
    default_targets = ("fc1",)

    def find(self, model: nn.Module) -> Structure:
        """The blocks of all stages and their sites. Raises NotThisFamily."""
        return find_known_structure(model, self.name, _KNOWN)


register_family(ConvNextFamily())
