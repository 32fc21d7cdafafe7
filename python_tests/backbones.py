"""Tiny backbones of every kind that the tests patch, and what the tests ask of models again and again."""

import copy
from functools import partial

import timm
import torch
from timm.layers import Attention, RmsNorm, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

WIDTH, DEPTH, CLASSES, IMAGE = 32, 3, 5, 32
_TINY = dict(img_size=IMAGE, embed_dim=WIDTH, depth=DEPTH, num_heads=4, num_classes=CLASSES)


class GatedAttention(Attention):
    """timm's attention with its gate, which reads the norm's output beside qkv."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, gated=True, **kwargs)


def _timm(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, pretrained=False, **{**_TINY, "patch_size": 8, **kwargs})


BACKBONES = {
    "vit": partial(VisionTransformer, patch_size=8, **_TINY),
    "vit_drop_path": partial(
        VisionTransformer, patch_size=8, drop_path_rate=0.2, class_token=False, global_pool="avg", **_TINY
    ),
    "vit_inner_norms": partial(
        VisionTransformer, patch_size=8, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, **_TINY
    ),
    "vit_gated_rmsnorm": partial(
        VisionTransformer,
        patch_size=8,
        attn_layer=GatedAttention,
        norm_layer=RmsNorm,
        qkv_bias=False,
        **_TINY,
    ),
    "vit_glu": partial(VisionTransformer, patch_size=8, mlp_layer=SwiGLUPacked, proj_bias=False, **_TINY),
    "deit_distilled": partial(_timm, "deit_tiny_distilled_patch16_224"),
    "deit3": partial(_timm, "deit3_small_patch16_224"),
    "dinov2": partial(_timm, "vit_small_patch14_dinov2"),
    "dinov2_reg": partial(_timm, "vit_small_patch14_reg4_dinov2"),
    "clip": partial(_timm, "vit_base_patch16_clip_224"),
    "eva02_tiny": partial(_timm, "eva02_tiny_patch14_224"),
    "eva02_base": partial(_timm, "eva02_base_patch14_448"),
    "eva_separate_bias": partial(Eva, patch_size=8, qkv_bias_separate=True, use_rot_pos_emb=True, **_TINY)
    if "qkv_bias_separate" in Eva.__init__.__code__.co_varnames
    else None,
    "beit": partial(_timm, "beit_base_patch16_224"),
    "beit_swiglu": partial(Beit, patch_size=8, swiglu_mlp=True, scale_mlp=True, use_shared_rel_pos_bias=True, **_TINY),
}
BACKBONES = {name: make for name, make in BACKBONES.items() if make is not None}


@torch.no_grad()
def randomise_(model: nn.Module) -> nn.Module:
    """Give every parameter, and every joint k bias, values that matter.

    timm starts layer scales, position tables and some projections at or near zero, and an adapter behind a
    zero cannot be seen in the output.
    """
    for name, parameter in model.named_parameters():
        is_gain = parameter.ndim == 1 and "bias" not in name
        parameter.normal_(1.0 if is_gain else 0.0, 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("k_bias"):
            buffer.normal_(0.0, 0.2)
    return model


def build(name: str, device="cpu", dtype=torch.float32) -> nn.Module:
    """A randomised backbone in eval mode."""
    return randomise_(BACKBONES[name]()).to(device=device, dtype=dtype).eval()


def images(device="cpu", dtype=torch.float32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, device=device, dtype=dtype)


@torch.no_grad()
def train_adapters_(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Stand in for training: the factors that start at zero get values, and the coefficients differ."""
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind in ("up", "lora_b"):
            parameter.normal_(0.0, std)
        elif kind == "coeff":
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def snapshot(model: nn.Module) -> dict:
    """All that a failed call must leave as it was."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()},
        "identities": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "state": copy.deepcopy(_plain_state(model)),
    }


def _plain_state(model: nn.Module):
    state = model.__dict__.get("_alore_state")
    return None if state is None else (state.configs, state.head_names, state.merged is not None)


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    for key in before:
        if key == "tensors":
            assert list(after[key]) == list(before[key])
            for name, tensor in before[key].items():
                assert_same_bits(after[key][name], tensor, name)
        else:
            assert after[key] == before[key], key


def assert_same_bits(a: torch.Tensor, b: torch.Tensor, name: str = "") -> None:
    assert a.dtype == b.dtype and a.shape == b.shape, name
    if a.is_floating_point():
        integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
        a, b = a.contiguous().view(integer), b.contiguous().view(integer)
    assert torch.equal(a, b), name


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).double().norm() / b.double().norm()).item()
