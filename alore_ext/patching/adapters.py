"""Which class a layer takes: the adapter that fits what the layer is and where the adapter acts."""

from __future__ import annotations

from torch import nn

from alore_ext.modules import AloreInput, AloreLayerNorm, AloreLinear, AloreNorm, MlaeLinear
from alore_ext.modules.adapter import Adapter
from alore_ext.modules.channels import AloreChannelsNorm, AloreConv, AloreLayerNorm2d, MlaeConv

from .registry import AloreSite, MlaeSite


def alore_adapter(site: AloreSite, layer: nn.Module) -> type[Adapter]:
    """The class for an ALoRE adapter at `site`, whose module is `layer`."""
    if site.end == "input":
        return AloreInput
    if site.channel_axis == 1:
        if site.side == "after":
            return AloreConv
        return AloreLayerNorm2d if _is_layer_norm_2d(layer) else AloreChannelsNorm
    if site.side == "after":
        return AloreLinear
    return AloreLayerNorm if _is_plain_layer_norm(layer) else AloreNorm


def mlae_adapter(site: MlaeSite) -> type[Adapter]:
    """The class for MLAE experts at `site`."""
    return site.adapter or (MlaeConv if site.channel_axis == 1 else MlaeLinear)


def _is_plain_layer_norm(layer: nn.Module) -> bool:
    """nn.LayerNorm or one that computes the same, over the last dimension: what `ops.layer_norm_alore` computes."""
    kind = type(layer)
    if kind.__module__.startswith("transformers.models.convnext"):
        is_known = getattr(layer, "data_format", None) == "channels_last"
    else:
        is_timm = kind.__module__.startswith("timm.layers.") and kind.__name__ == "LayerNorm"
        is_known = kind is nn.LayerNorm or is_timm
    return is_known and len(layer.normalized_shape) == 1


def _is_layer_norm_2d(layer: nn.Module) -> bool:
    """A layer norm over the channels of NCHW: timm's or torchvision's."""
    kind = type(layer)
    return kind.__name__ == "LayerNorm2d" and kind.__module__.startswith(("timm.layers.", "torchvision.models."))
