"""Adapters with biases (stacked ALoRE, RepAdapter): exact where they merge, refused where they cannot."""

import copy
from functools import partial

import pytest
import torch
from backbones import BACKBONES, assert_unchanged, images, randomise_, relative_error, snapshot
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn
from torchvision.models import swin_transformer as tv_swin
from torchvision.models import vision_transformer as tv_vit

import alore_ext as ae

# 48 pixels in patches of 4 are 12 tokens a side, padded to 15 for windows of 5.
_SWIN = dict(patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5)
_TV_SWIN = dict(patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[5, 5], num_classes=5)
_TV_SWIN_V2 = dict(block=tv_swin.SwinTransformerBlockV2, downsample_layer=tv_swin.PatchMergingV2)
_CONVNEXT = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5)
_TV_VIT = dict(image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5)
MODELS = {
    "vit": (BACKBONES["vit"], 32),
    "torchvision_vit": (partial(tv_vit.VisionTransformer, **_TV_VIT), 32),
    "swin_padded": (partial(SwinTransformer, img_size=48, window_size=5, **_SWIN), 48),
    "torchvision_swin_padded": (partial(tv_swin.SwinTransformer, **_TV_SWIN), 48),
    "convnext": (partial(ConvNeXt, **_CONVNEXT), 48),
    "convnext_conv_mlp": (partial(ConvNeXt, conv_mlp=True, **_CONVNEXT), 48),
}
STACKED = partial(ae.AloreConfig, 3, 2, structure="stacked_linear")
CONFIGS = {
    "stacked_linear": STACKED,
    "stacked_nonlinear": partial(ae.AloreConfig, 3, 2, structure="stacked_nonlinear"),
    "rep_adapter": partial(ae.RepAdapterConfig, 4, 2, 0.5),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_config = pytest.mark.parametrize("kind", CONFIGS)


def places(name):
    ffn = ("before_ffn", "after_ffn")
    return ffn if "convnext" in name else ("before_attn", "after_attn", *ffn)


def build(name, device, dtype=torch.float64):
    make, size = MODELS[name]
    return randomise_(make()).to(device, dtype).eval(), torch.randn(2, 3, size, size, device=device, dtype=dtype)


@torch.no_grad()
def train_(model):
    for name in ae.adapter_state_dict(model, include_head=False):
        if name.endswith(("up", "_bias")):
            model.get_parameter(name).normal_(0.0, 0.2)
    return model


@every_model
@every_config
def test_life_of_an_adapter(name, kind, device, tmp_path):
    model, x = build(name, device)
    base = copy.deepcopy(model)
    plain = snapshot(model)
    expected = model(x).detach()
    ae.patch(model, CONFIGS[kind](locations=places(name)))
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-12
    train_(model)
    model(x).square().sum().backward()
    for key in ae.adapter_state_dict(model, include_head=False):
        assert model.get_parameter(key).grad.abs().sum() > 0, key
    model.zero_grad()
    with torch.no_grad():
        adapted = model(x)
        assert relative_error(adapted, expected) > 1e-3
        loaded = ae.load_adapter(base, ae.save_adapter(model, tmp_path / "adapter.safetensors"))
        assert torch.equal(loaded(x), adapted)
        before = snapshot(model)
        if kind == "stacked_nonlinear":
            for merge in (ae.merge_, ae.merge_and_unload):
                with pytest.raises(ValueError, match="cannot be merged: GELU stands between"):
                    merge(model)
        else:
            ae.merge_(model)
            assert relative_error(model(x), adapted) < 1e-12
            ae.unmerge_(model)
        assert_unchanged(model, before)
    assert_unchanged(ae.unpatch(model), plain)


@pytest.mark.parametrize("kind", ["stacked_linear", "rep_adapter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sixteen_bit_merges_round_once(kind, dtype, device):
    model, _ = build("vit", device, dtype)
    wide = copy.deepcopy(model).double()
    config = CONFIGS[kind](locations=places("vit"))
    train_(ae.patch(model, config))
    train_(ae.patch(wide, config))
    with torch.no_grad():
        for key, value in ae.adapter_state_dict(model, include_head=False).items():
            wide.get_parameter(key).copy_(value)
    ae.merge_(model)
    ae.merge_(wide)
    for (key, value), exact in zip(model.named_parameters(), wide.parameters(), strict=True):
        error = (value.double() - exact).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 2e-6).all(), key


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", ["stacked_nonlinear", "rep_adapter"])
def test_channels_are_the_tokens_of_nchw(kind, memory_format, device):
    conv = nn.Conv2d(6, 8, 1, device=device, dtype=torch.float64)
    linear = nn.Linear(6, 8, device=device, dtype=torch.float64)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    forms = {"stacked_nonlinear": ae.modules.affine.StackedForm, "rep_adapter": ae.modules.affine.GroupedForm}
    shapes = {
        "stacked_nonlinear": ((3, 8, 2), (3, 2), (3, 2, 8), (3, 8)),
        "rep_adapter": ((8, 4), (4,), (2, 2, 4), (8,)),
    }
    factors = {
        key: nn.Parameter(torch.randn(shape, device=device, dtype=torch.float64))
        for key, shape in zip(("down", "down_bias", "up", "up_bias"), shapes[kind], strict=True)
    }
    for layer, axis in ((conv, 1), (linear, -1)):
        form = forms[kind](axis, gelu=kind == "stacked_nonlinear")
        ae.modules.attach(layer, ae.modules.AffineBehind, factors, {"_affine_form": form})
    x = torch.randn(2, 6, 5, 3, device=device, dtype=torch.float64).contiguous(memory_format=memory_format)
    y = conv(x)
    # Whatever the convolution itself gives: cuDNN has no channels_last in float64.
    assert y.stride() == nn.functional.conv2d(x, conv.weight, conv.bias).stride()
    assert relative_error(y, linear(x.movedim(1, -1)).movedim(-1, 1)) < 1e-12


REFUSED = {
    "beit": (BACKBONES["beit"], "blocks.0.attn.qkv cannot take one: it has no bias"),
    "eva02_base": (BACKBONES["eva02_base"], "blocks.0.attn.k_proj cannot take one: it has no bias"),
    "no_qkv_bias": (BACKBONES["vit_gated_rmsnorm"], "blocks.0.attn.gate cannot take one: it has no bias"),
    "swin_v2": (partial(SwinTransformerV2, img_size=48, window_size=3, **_SWIN), "attn.qkv cannot take one"),
    "torchvision_swin_v2": (partial(tv_swin.SwinTransformer, **_TV_SWIN, **_TV_SWIN_V2), "sets the keys' third"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["stacked_linear", "rep_adapter"])
def test_linears_that_take_no_bias_are_refused(name, kind):
    make, text = REFUSED[name]
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"before_attn has biases to merge, but .*{text}"):
        ae.patch(model, CONFIGS[kind]())
    assert_unchanged(model, before)
    ae.patch(model, CONFIGS["stacked_nonlinear"]())  # never merged, and so asks for no bias


def test_a_stacked_config_needs_no_divisible_width_and_no_shared_scale():
    model = ae.patch(
        BACKBONES["vit"](), [STACKED(locations=("before_attn",)), ae.AloreConfig(locations=("after_ffn",))]
    )
    assert model.alore_scale.shape == (4, 4, 4)
    assert model.blocks[0].norm1.down.shape == (3, 32, 2) and model.blocks[0].norm1.up_bias.shape == (3, 32)


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match="groups must divide the width of blocks.0.norm1, 32, got 3"):
        ae.patch(BACKBONES["vit"](), ae.RepAdapterConfig(rank=6, groups=3))


def test_dropout_is_on_in_training_alone(device):
    model = train_(ae.patch(BACKBONES["vit"]().to(device), ae.AloreConfig(dropout=0.5, structure="stacked_linear")))
    x = images(device)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
