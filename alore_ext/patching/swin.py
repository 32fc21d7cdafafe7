"""Swin Transformers, v1 and v2, of timm and torchvision, and v1 of transformers.

v1 is pre-norm: the adapters before attention and FFN sit behind the norms. v2 is post-norm: they sit at the inputs of
the same linears, and fold into them all the same. Windows come between norm1 and qkv, and so do zeros that pad the
feature map; an adapter without bias maps zero to zero.

torchvision's attention reads the weights of qkv and proj and goes around the modules. Adapters on those two make the
attention call them (see `modules.CalledWindowAttention`). timm's v2 keeps the bias of qkv apart, as BEiT does.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from alore_ext.modules import CalledWindowAttention, FusedBiasAttention
from alore_ext.modules.adapter import Adapter

from .known_blocks import LINEAR, SEQUENTIAL, Branch, KnownBlock, find_known_structure
from .registry import Structure, register_family


def _joint_bias(attention: nn.Module) -> type[Adapter] | None:
    """timm's v2 attention passes qkv's weight to F.linear, unless it has no bias or adds it behind the call."""
    if attention.q_bias is None or getattr(attention, "qkv_bias_separate", False):
        return None
    return FusedBiasAttention


def _goes_around_linears(attention: nn.Module) -> type[Adapter]:
    """torchvision's attention reads the weights of qkv and proj, in v1 and v2 alike."""
    return CalledWindowAttention


_TIMM_MLP = {"mlp": ("timm.layers.mlp.Mlp",), "mlp.fc1": (LINEAR,), "mlp.fc2": (LINEAR,)}
_TIMM_V1, _TIMM_V2 = "timm.models.swin_transformer", "timm.models.swin_transformer_v2"
_TORCHVISION = "torchvision.models.swin_transformer"
_TORCHVISION_MLP = {"mlp": (SEQUENTIAL,), "mlp.0": (LINEAR,), "mlp.3": (LINEAR,)}
_TORCHVISION_ATTN = Branch(
    inlet="attn.qkv",
    takes=("attn.qkv",),
    gives="attn.proj",
    host="attn",
    host_of_takes=_goes_around_linears,
    host_of_gives=_goes_around_linears,
)
_TRANSFORMERS = "transformers.models.swin.modeling_swin.Swin"

_KNOWN = (
    KnownBlock(
        runs=f"{_TIMM_V1}.SwinTransformerBlock",
        methods=("forward", "_attn"),
        parts={"attn": (f"{_TIMM_V1}.WindowAttention",), **_TIMM_MLP},
        attn=Branch(norm="norm1", inlet="attn", takes=("attn.qkv",), gives="attn.proj"),
        ffn=Branch(norm="norm2", takes=("mlp.fc1",), gives="mlp.fc2"),
    ),
    KnownBlock(
        runs=f"{_TIMM_V2}.SwinTransformerV2Block",
        methods=("forward", "_attn"),
        parts={"attn": (f"{_TIMM_V2}.WindowAttention",), **_TIMM_MLP},
        attn=Branch(
            norm_behind="norm1",
            inlet="attn",
            takes=("attn.qkv",),
            gives="attn.proj",
            host="attn",
            host_of_takes=_joint_bias,
        ),
        ffn=Branch(norm_behind="norm2", inlet="mlp.fc1", takes=("mlp.fc1",), gives="mlp.fc2"),
    ),
    KnownBlock(
        runs=f"{_TORCHVISION}.SwinTransformerBlock",
        parts={"attn": (f"{_TORCHVISION}.ShiftedWindowAttention",), **_TORCHVISION_MLP},
        attn=replace(_TORCHVISION_ATTN, norm="norm1"),
        ffn=Branch(norm="norm2", takes=("mlp.0",), gives="mlp.3"),
    ),
    KnownBlock(
        runs=f"{_TORCHVISION}.SwinTransformerBlockV2",
        parts={"attn": (f"{_TORCHVISION}.ShiftedWindowAttentionV2",), **_TORCHVISION_MLP},
        attn=replace(
            _TORCHVISION_ATTN,
            norm_behind="norm1",
            bias_refused="its forward sets the keys' third of that bias to 0",
        ),
        ffn=Branch(norm_behind="norm2", inlet="mlp.0", takes=("mlp.0",), gives="mlp.3"),
    ),
    KnownBlock(
        runs=f"{_TRANSFORMERS}Layer",
        parts={"attention": (f"{_TRANSFORMERS}Attention",), "mlp": (f"{_TRANSFORMERS}MLP",)},
        attn=Branch(
            norm="layernorm_before",
            inlet="attention",
            takes=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            gives="attention.o_proj",
        ),
        ffn=Branch(norm="layernorm_after", takes=("mlp.fc1",), gives="mlp.fc2"),
    ),
)


class SwinFamily:
    """See the module's text."""

    name = "swin"
    default_locations = ("before_attn", "before_ffn")
    default_targets = ("qkv",)

    def find(self, model: nn.Module) -> Structure:
        """The blocks of all stages and their sites. Raises NotThisFamily."""
        return find_known_structure(model, self.name, _KNOWN)


register_family(SwinFamily())
