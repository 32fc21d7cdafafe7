"""Where timm's Swin and ConvNeXt take adapters, written by hand: `ae.patch` does not know these families yet.

Once it does, delete this file and `families_by_hand` in `places.py`; nothing else knows of it. (A family that the
library knows is found first, so what stands here is out of use from that day even if it is left.)

Everything behind the places, from the adapters to freezing and counting, is the library's own.
"""

import contextlib

from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock

from alore_ext.patching import registry
from alore_ext.patching.registry import AloreSite, BlockSites, MlaeSite, NotThisFamily, Structure


def blocks_of(model, model_type, block_type):
    """[(name, block)] over the whole model; raises NotThisFamily for any other model."""
    if not isinstance(model, model_type):
        raise NotThisFamily(f"expected timm's {model_type.__name__}")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, block_type)]


class SwinByHand:
    """norm1 -> attn.qkv and norm2 -> mlp.fc1. Swin v2 is another class, with its norms behind, and is refused."""

    name = "swin, by hand"
    default_locations = ("before_attn", "before_ffn")
    default_targets = ("qkv",)

    def find(self, model):
        """See `alore_ext.patching.registry.Family`."""
        return Structure(
            self.name,
            "",
            tuple(
                BlockSites(
                    name,
                    alore={
                        "before_attn": AloreSite(f"{name}.norm1", "before", (f"{name}.attn.qkv",), block.dim),
                        "before_ffn": AloreSite(f"{name}.norm2", "before", (f"{name}.mlp.fc1",), block.dim),
                    },
                    mlae={"qkv": (MlaeSite(f"{name}.attn.qkv"),)},
                )
                for name, block in blocks_of(model, SwinTransformer, SwinTransformerBlock)
            ),
        )


class ConvNextByHand:
    """norm -> mlp.fc1 and behind mlp.fc2; the block permutes to NHWC first, so the last axis is the channels'."""

    name = "convnext, by hand"
    default_locations = ("before_ffn", "after_ffn")
    default_targets = ("fc1",)

    def find(self, model):
        """See `alore_ext.patching.registry.Family`."""
        sites = []
        for name, block in blocks_of(model, ConvNeXt, ConvNeXtBlock):
            if block.use_conv_mlp:
                raise NotThisFamily(f"{name} computes its MLP by 1x1 convolutions: try --model-kwargs conv_mlp=False")
            width, fc1, fc2 = block.mlp.fc2.out_features, f"{name}.mlp.fc1", f"{name}.mlp.fc2"
            alore = {
                "before_ffn": AloreSite(f"{name}.norm", "before", (fc1,), width),
                "after_ffn": AloreSite(fc2, "after", (fc2,), width),
            }
            sites.append(BlockSites(name, alore=alore, mlae={"fc1": (MlaeSite(fc1),)}))
        return Structure(self.name, "", tuple(sites))


@contextlib.contextmanager
def families_by_hand():
    """Within it the library knows these families too."""
    families = (SwinByHand(), ConvNextByHand())
    for family in families:
        registry.register_family(family)
    try:
        yield
    finally:
        for family in families:
            del registry._FAMILIES[family.name]
