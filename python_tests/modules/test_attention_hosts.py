"""Window attention that calls its linears, against torchvision's; ALoRE before a layer."""

import copy
import pickle

import pytest
import torch
from hosting import (
    OWN_SCALE,
    alore_parameters,
    assert_same,
    copiers,
    grads,
    hosted,
    merged_,
    mlae_attributes,
    mlae_factors,
)
from torch import nn

from alore_ext import reference
from alore_ext.modules import (
    AloreInput,
    AloreLinear,
    CalledWindowAttention,
    MlaeLinear,
    attach,
    detach,
)

swin = pytest.importorskip("torchvision.models.swin_transformer")

WINDOW_KINDS = [swin.ShiftedWindowAttention, swin.ShiftedWindowAttentionV2]
kinds = pytest.mark.parametrize("kind", WINDOW_KINDS, ids=["v1", "v2"])
SIZES = [(8, 8), (7, 9), (3, 10), (4, 4), (1, 5)]  # whole windows, padded, one window down, one in all, less than one


def window_attention(kind, device, shift=(2, 2), dtype=torch.float64, **kwargs):
    module = kind(32, [4, 4], list(shift), 4, **kwargs)
    with torch.no_grad():
        for name in ("qkv", "proj"):
            if getattr(module, name).bias is not None:
                getattr(module, name).bias.normal_()  # the key third too, which V2 must ignore
    return module.to(device, dtype)


@kinds
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_window_attention_is_the_plain_one(kind, shift, size, batch, device):
    plain = window_attention(kind, device, shift)
    x = torch.randn(batch, *size, 32, device=device, dtype=torch.float64)
    assert_same(grads(hosted(plain, CalledWindowAttention), x), grads(plain, x), 1e-12)


@kinds
@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"proj_bias": False}], ids=str)
def test_window_attention_without_a_bias(kind, options, device):
    plain = window_attention(kind, device, **options)
    x = torch.randn(2, 7, 9, 32, device=device, dtype=torch.float64)
    assert_same(grads(hosted(plain, CalledWindowAttention), x), grads(plain, x), 1e-12)


@kinds
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06), (torch.float16, 0.01)], ids=str
)
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_window_attention_in_other_dtypes(kind, dtype, tolerance, size, device):
    plain = window_attention(kind, device, dtype=dtype)
    x = torch.randn(2, *size, 32, device=device, dtype=dtype)
    ours = hosted(plain, CalledWindowAttention)
    exact = plain.double()
    if dtype == torch.float16 and kind is WINDOW_KINDS[1] and size == (7, 9):
        # torchvision's own cosine attention is NaN here: the 1e-12 that it divides keys of padding by is 0.
        results, expected = {"y": ours(x)}, {"y": exact(x.double())}
    else:
        results, expected = grads(ours, x), grads(exact, x.double())
    assert all(value.dtype == dtype for value in results.values())
    assert_same({name: value.double() for name, value in results.items()}, expected, tolerance)


@kinds
def test_window_attention_under_autocast(kind, device):
    plain = window_attention(kind, device, dtype=torch.float32)
    x = torch.randn(2, 7, 9, 32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = hosted(plain, CalledWindowAttention)(x)
        as_plain = plain(x)
    assert y.dtype == as_plain.dtype
    exact = plain(x)
    error, plain_error = ((value.float() - exact).norm().item() for value in (y, as_plain))
    assert error < 1.5 * plain_error + 1e-6


@kinds
def test_window_attention_takes_any_layout(kind, device):
    plain = window_attention(kind, device)
    x = torch.randn(2, 32, 7, 9, device=device, dtype=torch.float64).permute(0, 2, 3, 1)
    ours = hosted(plain, CalledWindowAttention)
    for given in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
        assert ours(given).is_contiguous()
        assert_same(grads(ours, given), grads(plain, given), 1e-12)


@kinds
def test_many_windows_broadcast_or_repeat_alike(kind, device, monkeypatch):
    ours = hosted(window_attention(kind, device), CalledWindowAttention)
    x = torch.randn(2, 16, 16, 32, device=device, dtype=torch.float64)
    expected = ours(x)
    monkeypatch.setattr("alore_ext.modules.attention._MOST_HEADS", 63)  # 16 windows of 4 heads
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)


@kinds
@torch.no_grad()
@pytest.mark.parametrize("shift", [(0, 0), (2, 2)], ids=str)
def test_window_attention_runs_fused(kind, shift, device):
    """Masks have a shape that the fused kernels take: else attention falls back on matrix products, silently."""
    ours = hosted(window_attention(kind, device, shift, dtype=torch.float32), CalledWindowAttention)
    x = torch.randn(2, 7, 9, 32, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(x)
    names = {event.name for event in profile.events()}
    assert "aten::scaled_dot_product_attention" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


@kinds
def test_dropout_of_training_has_the_plain_distribution(kind, device):
    plain = window_attention(kind, device, attention_dropout=0.3, dropout=0.2)
    ours = hosted(plain, CalledWindowAttention)
    x = torch.randn(1, 5, 6, 32, device=device, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-11, atol=1e-11)
    samples = [
        torch.cat([module(x.expand(500, -1, -1, -1)) for _ in range(4)]) for module in (ours.train(), plain.train())
    ]
    assert not torch.equal(samples[0][0], samples[0][1])
    for ours_is, plain_is in ((s.mean(0) for s in samples), (s.var(0) for s in samples)):
        spread = samples[1].std(0).mean()
        torch.testing.assert_close(ours_is, plain_is, rtol=0.3, atol=0.2 * spread.item())
    assert torch.isclose((samples[0] == 0).double().mean(), torch.tensor(0.2, device=device).double(), atol=0.01)


def test_v2_leaves_the_key_bias_alone_and_ignores_it(device):
    plain = window_attention(swin.ShiftedWindowAttentionV2, device)
    before = plain.qkv.bias.detach().clone()
    x = torch.randn(2, 7, 9, 32, device=device, dtype=torch.float64)
    ours = hosted(plain, CalledWindowAttention)
    expected = ours(x)
    assert torch.equal(ours.qkv.bias, before)
    with torch.no_grad():
        ours.qkv.bias[32:64] = 0
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
        ours.qkv.bias[64:] += 1
        assert not torch.allclose(ours(x), expected)


@kinds
@pytest.mark.parametrize("name", ["qkv", "proj"])
def test_an_adapted_linear_runs_and_merges_into_the_plain_attention(kind, name, device):
    plain = window_attention(kind, device)
    ours = hosted(plain, CalledWindowAttention)
    linear = getattr(ours, name)
    factors = mlae_factors(32, linear.out_features)
    attach(linear, MlaeLinear, factors, mlae_attributes(_mlae_bias_owner=None))
    ours.to(device, torch.float64)
    x = torch.randn(2, 7, 9, 32, device=device, dtype=torch.float64)
    y = ours(x)
    assert not torch.allclose(y, plain(x))
    merged_(getattr(plain, name).weight.data, linear)
    torch.testing.assert_close(y, plain(x), rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    assert all(factor.grad.abs().max() > 0 for factor in factors.values())


@kinds
def test_window_attention_calls_each_linear_once(kind, device):
    calls = []
    ours = hosted(window_attention(kind, device), CalledWindowAttention)
    for name in ("qkv", "proj"):
        getattr(ours, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    ours(torch.randn(2, 7, 9, 32, device=device, dtype=torch.float64))
    assert calls == ["qkv", "proj"]


@kinds
@copiers
def test_window_attention_copies_and_detaches(kind, copier, device):
    plain = window_attention(kind, device)
    ours = hosted(plain, CalledWindowAttention)
    x = torch.randn(2, 7, 9, 32, device=device, dtype=torch.float64)
    twin = copier(ours)
    assert type(twin) is type(ours) and isinstance(twin, kind) and torch.equal(twin(x), ours(x))
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert detach(twin) == {}
    assert type(twin) is kind and torch.equal(twin(x), plain(x))


@kinds
@pytest.mark.parametrize("size", [(7, 9), (8, 8)], ids=str)
def test_window_attention_compiles_exports_and_traces(kind, size, device):
    ours = hosted(window_attention(kind, device), CalledWindowAttention).eval()
    x = torch.randn(2, *size, 32, device=device, dtype=torch.float64)
    expected = grads(ours, x)
    torch._dynamo.reset()
    assert_same(grads(ours, x, torch.compile(ours, fullgraph=True, backend="eager")), expected, 1e-12)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(ours, (x,), dynamic_shapes=({0: batch},)).module()
    larger = torch.cat([x, x.flip(1)])
    torch.testing.assert_close(exported(larger), ours(larger), rtol=1e-12, atol=1e-12)
    assert_same(grads(ours, x, torch.fx.symbolic_trace(ours)), expected, 1e-12)


def test_alore_before_a_layer(device):
    """Post-norm: the adapter meets the attention's input, under a host, and both come off and copy."""
    plain = window_attention(swin.ShiftedWindowAttentionV2, device)
    ours = hosted(plain, CalledWindowAttention)
    attach(ours, AloreInput, alore_parameters(32), OWN_SCALE)
    ours.to(device, torch.float64)
    x = torch.randn(2, 7, 9, 32, device=device, dtype=torch.float64)
    expected = plain(reference.alore(x, ours.scale, ours.down, ours.up))
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(module) is type(ours)
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    detach(ours)
    assert isinstance(ours, CalledWindowAttention)
    detach(ours)
    assert type(ours) is swin.ShiftedWindowAttentionV2
    assert torch.equal(ours(x), plain(x))


def test_alore_before_and_behind_pass_other_arguments_on(device):
    class Scaled(nn.Linear):
        def forward(self, x, factor, *, shift):
            return super().forward(x) * factor + shift

    x = torch.randn(5, 8, device=device)
    for adapter in (AloreInput, AloreLinear):
        plain = Scaled(8, 8)
        ours = copy.deepcopy(plain)
        attach(ours, adapter, alore_parameters(8), OWN_SCALE)
        plain, ours = plain.to(device), ours.to(device)

        def mix(x, ours=ours):
            return reference.alore(x, ours.scale, ours.down, ours.up)

        before = adapter is AloreInput
        expected = plain(mix(x), 3, shift=1) if before else mix(plain(x, 3, shift=1))
        torch.testing.assert_close(ours(x, 3, shift=1), expected, rtol=1e-4, atol=1e-4)
