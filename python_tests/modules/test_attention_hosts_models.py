"""Hosted attentions inside torchvision's models: odd windows, padding, several stages, feature extraction."""

import copy

import pytest
import torch
from torch import nn

from alore_ext.modules import CalledMultiheadAttention, CalledWindowAttention, attach

pytest.importorskip("torchvision")

from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlockV2,
)


def swin(window):
    return SwinTransformer([4, 4], 32, [2, 2], [2, 4], [window] * 2, num_classes=10)


def swin_v2(window):
    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer([4, 4], 32, [2, 2], [2, 4], [window] * 2, num_classes=10, **parts)


def vit():
    return VisionTransformer(60, 12, 2, 4, 32, 64, num_classes=10)


MODELS = {
    "swin": (lambda: swin(7), "features.3.1"),
    "swin padded": (lambda: swin(4), "features.3.1"),
    "swin v2": (lambda: swin_v2(5), "features.3.1"),
    "swin v2 padded": (lambda: swin_v2(8), "features.3.1"),
    "vit": (vit, "encoder.layers.encoder_layer_1"),
}


@pytest.fixture(params=MODELS)
def models(request, device):
    """The plain model, its hosted twin, and the name of a block."""
    make, block = MODELS[request.param]
    plain = make().eval()
    with torch.no_grad():
        for module in plain.modules():  # torchvision's head and biases begin at 0
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.weight.normal_(std=module.in_features**-0.5)
                module.bias.normal_(std=0.2)
    hosted = copy.deepcopy(plain)
    attentions = 0
    for module in list(hosted.modules()):
        for kind, host in (
            (ShiftedWindowAttention, CalledWindowAttention),
            (nn.MultiheadAttention, CalledMultiheadAttention),
        ):
            if isinstance(module, kind):
                attach(module, host, {}, {})
                attentions += 1
    assert attentions == (2 if block.startswith("encoder") else 4)
    return plain.to(device), hosted.to(device), block


def images(device):
    return torch.randn(2, 3, 60, 60, device=device)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_hosted_model_is_the_plain_one(models, channels_last, device):
    plain, hosted, _ = models
    x = images(device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y, expected = hosted(x), plain.double()(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    largest = max(parameter.grad.abs().max().item() for parameter in plain.parameters())
    for ours, theirs in zip(hosted.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_hosted_model_is_no_less_precise_under_autocast(models, frozen, device):
    plain, hosted, _ = models
    x = images(device)
    for model in models[:2]:
        model.requires_grad_(not frozen)
    with torch.autocast(device.type, torch.bfloat16):
        y, as_plain = hosted(x), plain(x)
    exact = plain(x)
    error, plain_error = ((value.float() - exact).norm().item() for value in (y, as_plain))
    assert error < 2 * plain_error
    if not frozen:
        y.float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in hosted.parameters())


@torch.no_grad()
def test_feature_extraction_traces_a_hosted_model(models, device):
    plain, hosted, block = models
    x = images(device)
    features, expected = (create_feature_extractor(model, [block])(x) for model in (hosted, plain))
    torch.testing.assert_close(features[block], expected[block], rtol=1e-4, atol=1e-4)
