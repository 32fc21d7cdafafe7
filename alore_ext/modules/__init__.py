"""Adapter modules: what a patched layer's class becomes.

`alore_ext.patch` puts them in; they are rarely made by hand.
"""

from .adapter import Adapter, attach, detach
from .affine import AffineBehind, AffineInput
from .alore import AloreInput, AloreLayerNorm, AloreLinear, AloreNorm
from .attention import CalledWindowAttention
from .channels import AloreChannelsNorm, AloreConv, AloreLayerNorm2d, MlaeConv
from .lora import LoraConv, LoraLinear, LoraMultiheadAttention
from .mlae import FusedBiasAttention, MlaeLinear
from .mlae_norm import MlaeNorm
from .multihead import CalledMultiheadAttention, MlaeMultiheadAttention, check_multihead_attention
from .scale_shift import (
    BitFitAdapter,
    BitFitInProjection,
    BitFitJointBias,
    BitFitLayer,
    SsfConv,
    SsfLinear,
    SsfMultiheadAttention,
    SsfNorm,
)
from .shared_scale import start_sharing, stop_sharing

__all__ = [
    "Adapter",
    "AffineBehind",
    "AffineInput",
    "AloreChannelsNorm",
    "AloreConv",
    "AloreInput",
    "AloreLayerNorm",
    "AloreLayerNorm2d",
    "AloreLinear",
    "AloreNorm",
    "BitFitAdapter",
    "BitFitInProjection",
    "BitFitJointBias",
    "BitFitLayer",
    "CalledMultiheadAttention",
    "CalledWindowAttention",
    "FusedBiasAttention",
    "LoraConv",
    "LoraLinear",
    "LoraMultiheadAttention",
    "MlaeConv",
    "MlaeLinear",
    "MlaeMultiheadAttention",
    "MlaeNorm",
    "SsfConv",
    "SsfLinear",
    "SsfMultiheadAttention",
    "SsfNorm",
    "attach",
    "check_multihead_attention",
    "detach",
    "start_sharing",
    "stop_sharing",
]
