"""Adapter modules: what a patched layer's class becomes.

`alore_ext.patch` puts them in; they are rarely made by hand.
"""

from .adapter import Adapter, attach, detach
from .alore import AloreLayerNorm, AloreLinear, AloreNorm
from .channels import AloreChannelsNorm, AloreConv, AloreLayerNorm2d, MlaeConv
from .mlae import FusedBiasAttention, MlaeLinear

__all__ = [
    "Adapter",
    "AloreChannelsNorm",
    "AloreConv",
    "AloreLayerNorm",
    "AloreLayerNorm2d",
    "AloreLinear",
    "AloreNorm",
    "FusedBiasAttention",
    "MlaeConv",
    "MlaeLinear",
    "attach",
    "detach",
]
