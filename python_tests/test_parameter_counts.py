"""The parameter counts of the papers' tables, on the papers' own backbones, on the meta device."""

import pytest
import timm
import torch

import alore_ext as ae
from alore_ext.models.as_mlp import as_mlp_base

TIMM = {
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
    "ViT-H": "vit_huge_patch14_224",
    "Swin-B": "swin_base_patch4_window7_224",
    "ConvNeXt-B": "convnext_base",
}


def backbone(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        if name == "AS-MLP-B":
            return as_mlp_base()
        return timm.create_model(TIMM[name], pretrained=False)


def trained(name: str, config) -> int:
    model = ae.patch(backbone(name), config)
    summary = ae.trainable_summary(model)
    assert summary.trainable == summary.adapter + summary.head
    return summary.adapter


# Backbone, fields of AloreConfig, parameters, the paper's millions. n = 4, r = 4 where nothing else is said.
ALORE = [
    ("ViT-B", {}, 147_520, "0.15"),
    ("ViT-B", {"locations": ("before_attn",)}, 73_792, "0.07"),
    ("ViT-L", {}, 393_280, "0.39"),
    ("ViT-H", {}, 655_424, "0.66"),
    ("Swin-B", {}, 192_576, "0.19"),
    ("AS-MLP-B", {}, 192_576, "0.19"),
    ("ConvNeXt-B", {"locations": ("before_ffn", "after_ffn")}, 288_832, "0.29"),
    ("ViT-B", {"rank": 1}, 36_928, "0.04"),
    ("ViT-B", {"rank": 2}, 73_792, "0.07"),
    ("ViT-B", {"rank": 8}, 294_976, "0.29"),
    ("ViT-B", {"rank": 16}, 589_888, "0.59"),
    ("ViT-B", {"rank": 32}, 1_179_712, "1.18"),
    ("ViT-B", {"num_experts": 1}, 147_457, "0.15"),
    ("ViT-B", {"num_experts": 2}, 147_464, "0.15"),
    ("ViT-B", {"num_experts": 8}, 147_968, "0.15"),
    ("ViT-B", {"num_experts": 16}, 151_552, "0.15"),
    ("ViT-B", {"num_experts": 32}, 180_224, "0.18"),
    ("ViT-B", {"layers": range(2)}, 24_640, "0.02"),
    ("ViT-B", {"layers": range(4)}, 49_216, "0.05"),
    ("ViT-B", {"layers": range(6)}, 73_792, "0.07"),
    ("ViT-B", {"layers": range(8)}, 98_368, "0.10"),
    ("ViT-B", {"layers": range(10)}, 122_944, "0.12"),
    ("ViT-B", {"layers": range(12)}, 147_520, "0.15"),
    ("ViT-B", {"structure": "stacked_linear"}, 663_936, "0.66"),
    ("ViT-B", {"structure": "stacked_nonlinear"}, 663_936, "0.66"),
]


@pytest.mark.parametrize(
    ("name", "fields", "count", "millions"), ALORE, ids=[f"{name}-{fields}" for name, fields, *_ in ALORE]
)
def test_alore(name, fields, count, millions):
    assert trained(name, ae.AloreConfig(**fields)) == count
    assert f"{count / 1e6:.2f}" == millions


def test_convnext_takes_both_modules_of_the_paper_by_default():
    assert trained("ConvNeXt-B", ae.AloreConfig()) == 288_832


def test_mlae():
    assert trained("ViT-B", ae.MlaeConfig()) == 295_008
    # A fixed pattern moves experts between blocks of equal width, and so costs what 8 in each do.
    assert trained("ViT-B", ae.MlaeConfig(masking="fixed", pattern="protruding")) == 295_008
    assert trained("ViT-B", ae.MlaeConfig(masking="fixed", pattern=[1] * 12)) == 12 * (3072 + 1)


def test_rep_adapter():
    # The papers' 0.22 M are the weights; the biases, which its public code trains too, make it 0.24 M.
    model = ae.patch(backbone("ViT-B"), ae.RepAdapterConfig())
    adapters = {name: value.numel() for name, value in ae.adapter_state_dict(model, include_head=False).items()}
    weights = sum(count for name, count in adapters.items() if not name.endswith("_bias"))
    assert weights == 24 * (768 * 8 + 8 * 768 // 2) == 221_184
    assert ae.trainable_summary(model).adapter == weights + 24 * (8 + 768) == 239_808
