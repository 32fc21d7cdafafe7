"""What `patch` supports: one table, from which `supported_models()` and docs/backbones.md are made.

python -m alore_ext.patching.support > docs/backbones.md
"""

from __future__ import annotations

from dataclasses import dataclass

_LOCATIONS = ("before_attn", "after_attn", "before_ffn", "after_ffn")
_TARGETS = ("qkv", "proj", "fc1", "fc2")
_NO_ATTENTION = "before_attn is refused: a dense map does not fold into a depthwise convolution"


@dataclass(frozen=True)
class SupportedModel:
    """One kind of backbone of one library.

    Attributes:
        family: what `patch` takes it for.
        library: where it comes from.
        name: the kind.
        examples: names under which the library builds such models.
        tested: the rows of python_tests/zoo.py that stand for it.
        locations: where ALoRE adapters can go.
        targets: the roles that MLAE experts can take.
        notes: what is special.
    """

    family: str
    library: str
    name: str
    examples: tuple[str, ...]
    tested: tuple[str, ...]
    locations: tuple[str, ...] = _LOCATIONS
    targets: tuple[str, ...] = _TARGETS
    notes: str = ""


class SupportedModels(tuple[SupportedModel, ...]):
    """A tuple of `SupportedModel`. Printed, it is a Markdown table."""

    def __str__(self) -> str:
        rows = [("family", "library", "model", "for example", "locations", "targets", "notes")]
        for model in self:
            examples = ", ".join(f"`{example}`" for example in model.examples)
            places = ", ".join(model.locations), ", ".join(model.targets)
            rows.append((model.family, model.library, model.name, examples, *places, model.notes))
        rows.insert(1, ("---",) * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _convnext(library: str, name: str, examples: tuple[str, ...], tested: tuple[str, ...]) -> SupportedModel:
    return SupportedModel("convnext", library, name, examples, tested, _LOCATIONS[2:], _TARGETS[2:], _NO_ATTENTION)


_TABLE = (
    SupportedModel(
        "vit",
        "timm",
        "ViT",
        ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"),
        ("vit", "vit_drop_path", "vit_inner_norms", "vit_gated_rmsnorm", "vit_glu"),
    ),
    SupportedModel("vit", "timm", "DeiT, distilled", ("deit_base_distilled_patch16_224",), ("deit_distilled",)),
    SupportedModel("vit", "timm", "DeiT-3", ("deit3_base_patch16_224",), ("deit3",)),
    SupportedModel("vit", "timm", "CLIP", ("vit_base_patch16_clip_224",), ("clip",)),
    SupportedModel(
        "vit",
        "timm",
        "DINOv2, with and without registers",
        ("vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"),
        ("dinov2", "dinov2_reg"),
    ),
    SupportedModel(
        "vit",
        "timm",
        "EVA-02",
        ("eva02_tiny_patch14_224", "eva02_base_patch14_448"),
        ("eva02_tiny", "eva02_base"),
        notes="q, k and v apart in base and large",
    ),
    SupportedModel(
        "vit",
        "timm",
        "BEiT",
        ("beit_base_patch16_224",),
        ("beit", "beit_swiglu"),
        notes="its attention reads qkv's weight: adapted, it calls qkv",
    ),
    SupportedModel(
        "vit",
        "torchvision",
        "ViT",
        ("vit_b_16", "vit_b_32"),
        ("torchvision_vit",),
        notes="qkv is nn.MultiheadAttention's in_proj_weight",
    ),
    SupportedModel("vit", "transformers", "ViT", ("ViTForImageClassification",), ("hf_vit",)),
    SupportedModel(
        "vit",
        "transformers",
        "DeiT",
        ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
        ("hf_deit", "hf_deit_distilled"),
    ),
    SupportedModel("vit", "transformers", "BEiT", ("BeitForImageClassification",), ("hf_beit",)),
    SupportedModel(
        "vit",
        "transformers",
        "DINOv2, with and without registers",
        ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"),
        ("hf_dinov2", "hf_dinov2_swiglu", "hf_dinov2_reg"),
    ),
    SupportedModel("swin", "timm", "Swin", ("swin_base_patch4_window7_224",), ("swin", "swin_whole_windows")),
    SupportedModel(
        "swin",
        "timm",
        "Swin v2",
        ("swinv2_base_window8_256",),
        ("swinv2", "swinv2_whole_windows"),
        notes="post-norm: adapters at the linears' inputs",
    ),
    SupportedModel(
        "swin",
        "torchvision",
        "Swin",
        ("swin_t", "swin_s", "swin_b"),
        ("torchvision_swin",),
        notes="its attention reads the weights: adapted, it calls its linears",
    ),
    SupportedModel(
        "swin",
        "torchvision",
        "Swin v2",
        ("swin_v2_t", "swin_v2_s", "swin_v2_b"),
        ("torchvision_swin_v2",),
        notes="post-norm, and as torchvision's Swin",
    ),
    SupportedModel("swin", "transformers", "Swin", ("SwinForImageClassification",), ("hf_swin",)),
    _convnext("timm", "ConvNeXt", ("convnext_base",), ("convnext", "convnext_conv_mlp")),
    _convnext("timm", "ConvNeXt v2", ("convnextv2_base",), ("convnextv2", "convnextv2_conv_mlp")),
    _convnext("torchvision", "ConvNeXt", ("convnext_tiny", "convnext_large"), ("torchvision_convnext",)),
    _convnext("transformers", "ConvNeXt", ("ConvNextForImageClassification",), ("hf_convnext",)),
    _convnext("transformers", "ConvNeXt v2", ("ConvNextV2ForImageClassification",), ("hf_convnextv2",)),
    SupportedModel(
        "as_mlp",
        "alore_ext",
        "AS-MLP",
        ("as_mlp_tiny", "as_mlp_small", "as_mlp_base"),
        ("as_mlp",),
        notes="qkv is axial_shift.conv1, proj is axial_shift.conv3",
    ),
)


def supported_models() -> SupportedModels:
    """The backbones that `patch` is tested on, by family and library."""
    return SupportedModels(_TABLE)


def page() -> str:
    """docs/backbones.md."""
    return f"""# Backbones

Made by `python -m alore_ext.patching.support > docs/backbones.md`; a test keeps it true. Each line stands for tests on
tiny models of its kind (`python_tests/zoo.py`). `alore_ext.verify(model, x)` proves a model of your own.

{supported_models()}

A model that is not here may still work: families are found by what the blocks do. `patch` names what it misses where
it does not. [How to add a family](adding_a_family.md).
"""


if __name__ == "__main__":
    print(page(), end="")
