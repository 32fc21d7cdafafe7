"""Every backbone that the package claims to support, tiny: the rows of the matrix tests.

`alore_ext.supported_models()` names these rows as its evidence.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import timm
import torch
from backbones import BACKBONES, CLASSES, randomise_
from packaging.version import Version
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from alore_ext.models.as_mlp import AsMlp

ALL_LOCATIONS = ("before_attn", "after_attn", "before_ffn", "after_ffn")
ALL_TARGETS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class Row:
    """One tiny backbone.

    Attributes:
        make: the model for a number of classes.
        family: the family that must recognise it.
        library: where the model comes from.
        heads: the names of its classifier's modules.
        image: side of its input.
        cannot: what the model cannot do, patched or not ("checkpointing", "export", ...), and why.
    """

    make: Callable[[int], nn.Module]
    family: str
    library: str
    heads: tuple[str, ...] = ("head",)
    image: int = 32
    cannot: Mapping[str, str] = field(default_factory=dict)

    @property
    def locations(self) -> tuple[str, ...]:
        return ALL_LOCATIONS[2:] if self.family == "convnext" else ALL_LOCATIONS

    @property
    def targets(self) -> tuple[str, ...]:
        return ALL_TARGETS[2:] if self.family == "convnext" else ALL_TARGETS

    def build(self, device="cpu", dtype=torch.float32, classes: int = CLASSES) -> nn.Module:
        """A randomised model in eval mode."""
        return randomise_(self.make(classes)).to(device=device, dtype=dtype).eval()

    def images(self, device="cpu", dtype=torch.float32, batch: int = 2) -> torch.Tensor:
        return torch.randn(batch, 3, self.image, self.image, device=device, dtype=dtype)


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The model's scores, out of whatever it returns: transformers' outputs, or distilled DeiT's pair in training."""
    y = model(x)
    y = getattr(y, "logits", y)
    return torch.stack(y).mean(0) if isinstance(y, tuple) else y


def _timm_vit(name: str) -> Row:
    heads = ("head", "head_dist") if name == "deit_distilled" else ("head",)
    return Row(lambda classes: BACKBONES[name](num_classes=classes), "vit", "timm", heads)


def _timm_swin(cls: type[nn.Module], image: int = 48, window: int = 5, **kwargs) -> Row:
    """By default a map of 12x12 tokens in windows of 5: both stages need padding, and shift."""

    def make(classes: int) -> nn.Module:
        sizes = dict(img_size=image, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=window)
        return cls(num_classes=classes, **sizes, **kwargs)

    return Row(make, "swin", "timm", ("head.fc",), image)


def _timm_convnext(**kwargs) -> Row:
    def make(classes: int) -> nn.Module:
        return ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=classes, **kwargs)

    return Row(make, "convnext", "timm", ("head.fc",), 48)


# timm's v2 cannot pad its windows before 1.0.31.
_PADDED_V2 = 48 if Version(timm.__version__) >= Version("1.0.31") else 40

TIMM = {
    **{name: _timm_vit(name) for name in BACKBONES},
    "swin": _timm_swin(SwinTransformer),
    "swin_whole_windows": _timm_swin(SwinTransformer, image=32, window=4, qkv_bias=False),
    "swinv2": _timm_swin(SwinTransformerV2, image=_PADDED_V2),
    "swinv2_whole_windows": _timm_swin(SwinTransformerV2, image=32, window=4, qkv_bias=False),
    "convnext": _timm_convnext(),
    "convnextv2": _timm_convnext(use_grn=True, ls_init_value=None),
    "convnext_conv_mlp": _timm_convnext(conv_mlp=True),
    "convnextv2_conv_mlp": _timm_convnext(conv_mlp=True, use_grn=True, ls_init_value=None),
}


def _torchvision() -> dict[str, Row]:
    from torchvision.models import convnext, swin_transformer, vision_transformer

    no_switch = {"checkpointing": "torchvision's models have no switch for it"}

    def vit(classes: int) -> nn.Module:
        sizes = dict(image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64)
        return vision_transformer.VisionTransformer(num_classes=classes, **sizes)

    def swin(classes: int, **kwargs) -> nn.Module:
        sizes = dict(patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[5, 5])
        return swin_transformer.SwinTransformer(num_classes=classes, **sizes, **kwargs)

    def swin_v2(classes: int) -> nn.Module:
        parts = swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2
        return swin(classes, block=parts[0], downsample_layer=parts[1])

    def conv(classes: int) -> nn.Module:
        blocks = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 2)]
        return convnext.ConvNeXt(blocks, num_classes=classes)

    return {
        "torchvision_vit": Row(vit, "vit", "torchvision", ("heads",), 32, no_switch),
        "torchvision_swin": Row(swin, "swin", "torchvision", ("head",), 48, no_switch),
        "torchvision_swin_v2": Row(swin_v2, "swin", "torchvision", ("head",), 48, no_switch),
        "torchvision_convnext": Row(conv, "convnext", "torchvision", ("classifier",), 48, no_switch),
    }


_PLAIN = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
_WINDOWED = dict(image_size=48, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=5)
_CONVOLVED = dict(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32])


def _transformers() -> dict[str, Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    logging.getLogger("transformers").setLevel(logging.ERROR)

    def row(
        model: str, config: str, sizes: dict, family: str = "vit", heads: tuple[str, ...] = ("classifier",), image=32
    ) -> Row:
        def make(classes: int) -> nn.Module:
            return getattr(transformers, model)(getattr(transformers, config)(num_labels=classes, **sizes))

        cannot = {"checkpointing": "transformers' ConvNeXt refuses it"} if family == "convnext" else {}
        return Row(make, family, "transformers", heads, image, cannot)

    two_heads = ("cls_classifier", "distillation_classifier")
    registers = "Dinov2WithRegisters"
    return {
        "hf_vit": row("ViTForImageClassification", "ViTConfig", _PLAIN),
        "hf_deit": row("DeiTForImageClassification", "DeiTConfig", _PLAIN),
        "hf_deit_distilled": row("DeiTForImageClassificationWithTeacher", "DeiTConfig", _PLAIN, heads=two_heads),
        "hf_beit": row("BeitForImageClassification", "BeitConfig", _PLAIN),
        "hf_dinov2": row("Dinov2ForImageClassification", "Dinov2Config", _PLAIN),
        "hf_dinov2_swiglu": row("Dinov2ForImageClassification", "Dinov2Config", {**_PLAIN, "use_swiglu_ffn": True}),
        "hf_dinov2_reg": row(f"{registers}ForImageClassification", f"{registers}Config", _PLAIN),
        "hf_swin": row("SwinForImageClassification", "SwinConfig", _WINDOWED, "swin", image=48),
        "hf_convnext": row("ConvNextForImageClassification", "ConvNextConfig", _CONVOLVED, "convnext", image=48),
        "hf_convnextv2": row("ConvNextV2ForImageClassification", "ConvNextV2Config", _CONVOLVED, "convnext", image=48),
    }


def _own() -> dict[str, Row]:
    return {"as_mlp": Row(lambda classes: AsMlp(16, (2, 2), num_classes=classes), "as_mlp", "alore_ext", image=48)}


ZOO: dict[str, Row] = {**TIMM, **_own(), **_torchvision(), **_transformers()}

every_row = pytest.mark.parametrize("row", ZOO.values(), ids=ZOO)


def rows_that_can(feature: str, names=tuple(ZOO)):
    """Parametrise over rows. One that lists the feature under `cannot` must fail: its reason shows in the summary."""
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(
                ZOO[name],
                id=name,
                marks=[pytest.mark.xfail(reason=ZOO[name].cannot[feature], strict=True)]
                if feature in ZOO[name].cannot
                else [],
            )
            for name in names
            if name in ZOO
        ],
    )
