"""Vision Transformers: timm's (plain, DeiT, DINOv2, CLIP, EVA-02, BEiT, and whatever else is built the same way),
torchvision's and transformers'.

timm's blocks are many and alike, so they are read from their data flow (see `traced_blocks`). The others are few, and
are known by the code that they run.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from alore_ext.modules import CalledMultiheadAttention, MlaeMultiheadAttention

from .known_blocks import LINEAR, SEQUENTIAL, Branch, KnownBlock, find_known_structure
from .linear_map import LinearMap
from .registry import NotThisFamily, Structure, register_family
from .traced_blocks import BLOCK_CHILDREN, is_block_list, traced_block_sites

_TORCHVISION = KnownBlock(
    runs="torchvision.models.vision_transformer.EncoderBlock",
    parts={
        "self_attention": ("torch.nn.modules.activation.MultiheadAttention",),
        "mlp": (SEQUENTIAL,),
        "mlp.0": (LINEAR,),
        "mlp.3": (LINEAR,),
    },
    attn=Branch(
        norm="ln_1",
        takes=(LinearMap("self_attention", "in_proj_weight", "in_proj_bias"),),
        takes_adapter=MlaeMultiheadAttention,
        gives="self_attention.out_proj",
        host="self_attention",
        host_of_gives=lambda attention: CalledMultiheadAttention,
    ),
    ffn=Branch(norm="ln_2", takes=("mlp.0",), gives="mlp.3"),
)


_MLP = Branch(takes=("mlp.fc1",), gives="mlp.fc2")
_SWIGLU = Branch(takes=("mlp.gate_proj", "mlp.up_proj"), gives="mlp.down_proj")
_JOINT_SWIGLU = Branch(takes=("mlp.weights_in",), gives="mlp.weights_out")
_BEFORE_AFTER, _NUMBERED = ("layernorm_before", "layernorm_after"), ("norm1", "norm2")


def _transformers(module: str, prefix: str, norms: tuple[str, str], ffn: Branch = _MLP) -> KnownBlock:
    """A layer of transformers 5."""
    path = f"transformers.models.{module}.modeling_{module}.{prefix}"
    return KnownBlock(
        runs=f"{path}Layer",
        parts={"attention": (f"{path}Attention",), "mlp": (f"{path}MLP" if ffn is _MLP else f"{path}SwiGLUFFN",)},
        attn=Branch(
            norm=norms[0],
            takes=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            gives="attention.o_proj",
        ),
        ffn=replace(ffn, norm=norms[1]),
    )


def _nested(known: KnownBlock) -> KnownBlock:
    """The same layer before its attention was one module (DINOv2 up to transformers 5.17)."""
    inner = "attention.attention"
    attn = replace(
        known.attn, takes=tuple(f"{inner}.{name}" for name in ("query", "key", "value")), gives="attention.output.dense"
    )
    prefix = known.runs.removesuffix("Layer")
    return replace(known, parts={**known.parts, inner: (f"{prefix}SelfAttention",)}, attn=attn)


def _dinov2(module: str, prefix: str) -> tuple[KnownBlock, ...]:
    layers = [_transformers(module, prefix, _NUMBERED, ffn) for ffn in (_MLP, _SWIGLU, _JOINT_SWIGLU)]
    return (*layers, *map(_nested, layers))


_KNOWN = (
    _TORCHVISION,
    _transformers("vit", "ViT", _BEFORE_AFTER),
    _transformers("deit", "DeiT", _BEFORE_AFTER),
    _transformers("beit", "Beit", _BEFORE_AFTER),
    *_dinov2("dinov2", "Dinov2"),
    *_dinov2("dinov2_with_registers", "Dinov2WithRegisters"),
)


class VitFamily:
    """See the module's text."""

    name = "vit"
    default_locations = ("before_attn", "before_ffn")
    default_targets = ("qkv",)

    def find(self, model: nn.Module) -> Structure:
        """The blocks and their sites.

        Raises NotThisFamily when there is neither exactly one list of timm's blocks, nor a block of the others.
        """
        lists = [name for name, module in model.named_modules() if is_block_list(module)]
        if len(lists) == 1:
            blocks = model.get_submodule(lists[0])
            prefix = f"{lists[0]}." if lists[0] else ""
            sites = tuple(traced_block_sites(prefix + name, block) for name, block in blocks.named_children())
            return Structure(self.name, lists[0].rpartition(".")[0], sites)
        try:
            return find_known_structure(model, self.name, _KNOWN)
        except NotThisFamily as reason:
            found = f"{len(lists)}: {', '.join(lists)}" if lists else "none"
            expected = f"expected one list of blocks with {', '.join(BLOCK_CHILDREN)}, found {found}"
            raise NotThisFamily(f"{expected}; {reason}") from None


register_family(VitFamily())
