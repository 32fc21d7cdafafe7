"""Adapters on the norms and 1x1 convolutions of NCHW backbones."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from alore_ext import reference
from alore_ext.modules import AloreChannelsNorm, AloreConv, AloreLayerNorm2d, MlaeConv, attach, detach

WIDTH = 24
FORMATS = [
    pytest.param(torch.contiguous_format, id="nchw"),
    pytest.param(torch.channels_last, id="nhwc"),
]


def timm_norm(channels):
    return pytest.importorskip("timm.layers").LayerNorm2d(channels)


def torchvision_norm(channels):
    return pytest.importorskip("torchvision.models.convnext").LayerNorm2d(channels, eps=1e-6)


def group_norm(channels):
    return nn.GroupNorm(1, channels)


def pointwise(channels, **options):
    return nn.Conv2d(channels, channels, 1, **options)


ALORE_LAYERS = [
    pytest.param(timm_norm, AloreLayerNorm2d, id="timm"),
    pytest.param(torchvision_norm, AloreLayerNorm2d, id="torchvision"),
    pytest.param(group_norm, AloreChannelsNorm, id="GroupNorm"),
    pytest.param(nn.BatchNorm2d, AloreChannelsNorm, id="BatchNorm2d"),
    pytest.param(pointwise, AloreConv, id="Conv2d"),
]


def with_alore(layer, adapter, channels=WIDTH, num_experts=4, rank=2, dropout=0.0, root=None):
    p = channels // num_experts
    parameters = {
        "down": nn.Parameter(torch.randn(num_experts, p, rank) / p**0.5),
        "up": nn.Parameter(torch.randn(num_experts, rank, p) / rank),
    }
    if root is None:
        parameters["scale"] = nn.Parameter(torch.randn(num_experts, num_experts, num_experts) / num_experts**0.5)
    attach(layer, adapter, parameters, {"_alore_root": root, "_alore_dropout": dropout})
    return layer


def with_mlae(layer, num_experts=4, expert_rank=2, mask_p=0.5):
    rank = num_experts * expert_rank
    parameters = {
        "lora_a": nn.Parameter(torch.randn(rank, layer.in_channels) / layer.in_channels**0.5),
        "lora_b": nn.Parameter(torch.randn(layer.out_channels, rank) / rank),
        "coeff": nn.Parameter(torch.rand(num_experts) + 0.5),
    }
    attach(layer, MlaeConv, parameters, {"_mlae_mask_p": mask_p, "_mlae_expert_rank": expert_rank})
    return layer


def images(memory_format, device, channels=WIDTH, size=(7, 5)):
    return torch.randn(2, channels, *size, device=device).contiguous(memory_format=memory_format)


def randomised(layer):
    """An affine that does something."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("make", "adapter"), ALORE_LAYERS)
def test_is_the_layer_then_alore(make, adapter, memory_format, device):
    layer = randomised(make(WIDTH)).to(device)
    x = images(memory_format, device)
    plain = layer(x)
    with_alore(layer, adapter).to(device)
    y = layer(x)
    torch.testing.assert_close(y, reference.alore_channels(plain, layer.scale, layer.down, layer.up))
    assert y.stride() == plain.stride()
    assert isinstance(layer, adapter) and isinstance(layer, type(make(WIDTH)))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("make", "adapter"), ALORE_LAYERS)
def test_zero_init_is_the_plain_layer(make, adapter, memory_format, device):
    layer = randomised(make(WIDTH)).to(device)
    x = images(memory_format, device)
    plain = layer(x)
    with_alore(layer, adapter).to(device).up.data.zero_()
    if adapter is AloreLayerNorm2d:  # another kernel than torch's norm
        torch.testing.assert_close(layer(x), plain)
    else:
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_timms_fast_norm_makes_no_difference_beyond_rounding(memory_format, low, fast, device):
    layer = randomised(timm_norm(WIDTH)).to(device)
    layer._fast_norm = fast
    x = images(memory_format, device)
    with torch.autocast(device.type, low, enabled=low is not None):
        plain = layer(x)
        with_alore(layer, AloreLayerNorm2d).to(device).up.data.zero_()
        y = layer(x)
    assert y.dtype == (low or torch.float32)
    tolerance = 2e-2 if low else 1e-5
    torch.testing.assert_close(y, plain, rtol=tolerance, atol=tolerance, check_dtype=False)
    exact = F.layer_norm(x.double().movedim(1, -1), (WIDTH,), layer.weight.double(), layer.bias.double(), layer.eps)
    ours, timms = ((each.double() - exact.movedim(-1, 1)).square().mean() for each in (y, plain))
    assert not fast or ours <= 4 * timms  # twice the rounding error


@pytest.mark.parametrize("stride_of_weight", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_mlae_without_its_mask(bias, memory_format, stride_of_weight, device):
    conv = nn.Conv2d(WIDTH, 40, 1, bias=bias).to(device=device, memory_format=stride_of_weight)
    layer = with_mlae(conv).to(device).eval()
    x = images(memory_format, device)
    coeff = layer.coeff.repeat_interleave(2)
    rest = layer.weight.flatten(1), layer.bias, layer.lora_a, layer.lora_b, coeff
    expected = reference.masked_lora_linear(x.movedim(1, -1), *rest).movedim(-1, 1)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=memory_format)


def test_mlae_at_zero_init_is_the_plain_convolution(device):
    layer = nn.Conv2d(WIDTH, 40, 1).to(device)
    x = images(torch.contiguous_format, device)
    plain = layer(x)
    with_mlae(layer).to(device).lora_b.data.zero_()
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_mlae_masks_in_training_and_is_reproducible(memory_format, device):
    layer, x = with_mlae(pointwise(WIDTH)).to(device), images(memory_format, device)

    def outputs():
        torch.manual_seed(4)
        return [layer(x) for _ in range(8)]

    first = outputs()
    assert all(map(torch.equal, first, outputs()))
    assert any(not torch.equal(first[0], other) for other in first[1:])


def network(device, memory_format):
    norm = with_alore(group_norm(WIDTH), AloreChannelsNorm, dropout=0.2)
    after = with_alore(pointwise(WIDTH), AloreConv, dropout=0.2)
    norm2d = with_alore(timm_norm(WIDTH), AloreLayerNorm2d, dropout=0.2)
    model = nn.Sequential(norm, with_mlae(pointwise(WIDTH)), nn.GELU(), after, norm2d)
    return model.to(device=device, memory_format=memory_format)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_checkpointing_changes_nothing(memory_format, use_reentrant, device):
    model = network(device, memory_format)
    x = images(memory_format, device).requires_grad_()

    def step(run):
        model.zero_grad()
        torch.manual_seed(2)
        y = run(x)
        y.square().mean().backward()
        return [y.detach(), *(parameter.grad for parameter in model.parameters())]

    plain = step(model)
    assert all(value.count_nonzero() for value in plain)
    for a, b in zip(plain, step(lambda x: checkpoint(model, x, use_reentrant=use_reentrant)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_compiles_without_a_break(memory_format, device):
    model = network(device, memory_format).eval()
    x = images(memory_format, device)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_autocast_trains_float32_parameters(memory_format, device):
    model = network(device, memory_format)
    with torch.autocast(device.type, torch.bfloat16):
        y = model(images(memory_format, device))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_adapted_and_apart(copier, device):
    model = network(device, torch.contiguous_format).eval()
    twin, x = copier(model), images(torch.contiguous_format, device)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[1].coeff.zero_()
    assert not torch.equal(twin(x), model(x))


def test_detach_gives_back_the_plain_layers():
    plain = [group_norm(WIDTH), pointwise(WIDTH), timm_norm(WIDTH), pointwise(WIDTH)]
    kinds, keys = [type(layer) for layer in plain], [vars(layer).keys() for layer in plain]
    names = [list(layer.state_dict()) for layer in plain]
    for layer, adapter in zip(plain[:3], (AloreChannelsNorm, AloreConv, AloreLayerNorm2d), strict=True):
        with_alore(layer, adapter)
    with_mlae(plain[3])
    for layer in plain:
        assert type(layer) not in kinds
        detach(layer)
    assert [type(layer) for layer in plain] == kinds
    assert [vars(layer).keys() for layer in plain] == keys
    assert [list(layer.state_dict()) for layer in plain] == names


def test_shared_scale_is_read_from_the_root(device):
    root = nn.Module()
    root.alore_scale = nn.Parameter(torch.randn(4, 4, 4))
    layer = with_alore(pointwise(WIDTH), AloreConv, root=root)
    x = images(torch.contiguous_format, "cpu")
    before = layer(x)
    root.alore_scale = nn.Parameter(torch.zeros(4, 4, 4))
    assert not torch.equal(layer(x), before)
    assert "scale" not in layer.state_dict()


def test_repr_tells_the_adapter():
    assert "mlae: experts=4, expert_rank=2, mask_p=0.5" in repr(with_mlae(pointwise(WIDTH)))
    assert "alore: experts=4, rank=2, dropout=0.0, own scale" in repr(with_alore(pointwise(WIDTH), AloreConv))


@pytest.mark.parametrize(
    "options", [{"kernel_size": 3, "padding": 1}, {"stride": 2}, {"padding": 1}, {"groups": 4}], ids=str
)
def test_mlae_refuses_other_convolutions(options):
    layer = with_mlae(nn.Conv2d(WIDTH, WIDTH, **{"kernel_size": 1, **options}))
    with pytest.raises(ValueError, match="MlaeConv: the convolution must have kernel_size 1, stride 1"):
        layer(torch.randn(1, WIDTH, 4, 4))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_mlae_takes_paddings_by_name(padding):
    layer = nn.Conv2d(WIDTH, WIDTH, 1, padding=padding)
    x = torch.randn(1, WIDTH, 4, 4)
    plain = layer(x)
    with_mlae(layer).lora_b.data.zero_()
    assert torch.equal(layer(x), plain)
