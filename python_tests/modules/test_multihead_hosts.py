"""`nn.MultiheadAttention` that calls its output projection, against torch's; MLAE on its input projection."""

import copy

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
    AloreLinear,
    CalledMultiheadAttention,
    MlaeLinear,
    MlaeMultiheadAttention,
    attach,
    check_multihead_attention,
    detach,
)


def multihead(device, dtype=torch.float64, **options):
    module = nn.MultiheadAttention(32, 4, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return module.to(device, dtype)


@pytest.fixture(params=["self", "encoder-decoder", "three"])
def inputs(request, device):
    """Makes query, key and value in a layout, with S = 5 keys to L = 7 queries unless it is self-attention."""

    def make(batch_first=True, batch=3, dtype=torch.float64):
        def tokens(length):
            shape = (length, 32) if batch is None else (batch, length, 32) if batch_first else (length, batch, 32)
            return torch.randn(shape, device=device, dtype=dtype)

        query = tokens(7)
        if request.param == "self":
            return query, query, query
        key = tokens(5)
        return query, key, key if request.param == "encoder-decoder" else tokens(5)

    return make


def masks(kind, length, num_keys, batch, heads, device):
    """key_padding_mask and attn_mask, "+"-joined in `kind`; no row is masked whole."""
    given = {}
    if "padding" in kind:
        mask = torch.zeros(batch or 1, num_keys, dtype=torch.bool, device=device)
        mask[-1, -2:] = True
        given["key_padding_mask"] = mask if batch else mask[0]
    if "shared" in kind:
        given["attn_mask"] = torch.ones(length, num_keys, dtype=torch.bool, device=device).triu(1)
    if "apart" in kind:
        given["attn_mask"] = torch.rand((batch or 1) * heads, length, num_keys, device=device) < 0.4
        given["attn_mask"][..., 0] = False
    if "numbers" in kind:
        given = {
            name: torch.zeros(mask.shape, device=device, dtype=torch.float64).masked_fill(mask, -2.0)
            for name, mask in given.items()
        }
    return given


MASKS = ["none", "padding", "shared", "apart", "padding+shared", "padding+apart", "padding+shared+numbers"]


@pytest.mark.parametrize("layout", ["batch first", "batch second", "unbatched"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("training", [True, False])
def test_multihead_is_the_plain_one(layout, mask, training, inputs, device):
    batch = None if layout == "unbatched" else 3
    plain = multihead(device, batch_first=layout != "batch second").train(training)
    ours = hosted(plain, CalledMultiheadAttention)
    query, key, value = inputs(plain.batch_first, batch)
    num_keys = 7 if key is query else 5
    given = masks(mask, 7, num_keys, batch, 4, device)
    for need in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        y, weights = ours(query, key, value, **given, **need)
        expected, expected_weights = plain(query, key, value, **given, **need)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        if expected_weights is None:
            assert weights is None
        else:
            torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_has_the_plain_gradients(options, need_weights, inputs, device):
    plain = multihead(device, **options)
    results = []
    query, key, value = inputs(plain.batch_first)
    for module in (hosted(plain, CalledMultiheadAttention), plain):

        def run(x, module=module):
            return module(x, *((x, x) if key is query else (key, value)), need_weights=need_weights)[0]

        results.append(grads(module, query, run))
    assert_same(*results, 1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_multihead_in_other_dtypes(dtype, tolerance, need_weights, inputs, device):
    plain = multihead(device, dtype)
    given = inputs(False, dtype=dtype)
    y, _ = hosted(plain, CalledMultiheadAttention)(*given, need_weights=need_weights)
    assert y.dtype == dtype
    expected, _ = plain.double()(*(x.double() for x in given), need_weights=need_weights)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_multihead_takes_the_causal_hint(need_weights, padded, device):
    plain = multihead(device, batch_first=True)
    x = torch.randn(3, 7, 32, device=device, dtype=torch.float64)
    given = masks("padding+shared" if padded else "shared", 7, 7, 3, 4, device)
    arguments = {**given, "need_weights": need_weights, "is_causal": True}
    ours = hosted(plain, CalledMultiheadAttention)
    torch.testing.assert_close(ours(x, x, x, **arguments), plain(x, x, x, **arguments), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="is_causal is a hint about attn_mask, which is None"):
        ours(x, x, x, is_causal=True)


def test_multihead_drops_attention_weights_in_training(device):
    ours = hosted(multihead(device, dropout=0.25, batch_first=True), CalledMultiheadAttention)
    x = torch.randn(64, 20, 32, device=device, dtype=torch.float64)
    _, weights = ours(x, x, x, average_attn_weights=False)
    assert abs((weights == 0).double().mean().item() - 0.25) < 0.01
    for need_weights in (True, False):
        first, second = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.allclose(first, second)
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.parametrize(
    ("shapes", "given", "message"),
    [
        (((3, 7, 32), (7, 32), (7, 32)), {}, "both with a batch dimension"),
        (((3, 7, 32), (3, 5, 32), (3, 6, 32)), {}, r"got \[3, 5, 32\] and \[3, 6, 32\]"),
        (((3, 7, 32),) * 3, {"key_padding_mask": (3, 6)}, r"expected key_padding_mask \[3, 7\], got \[3, 6\]"),
        (((3, 7, 32),) * 3, {"attn_mask": (3, 7, 7)}, r"expected attn_mask \[7, 7\] or \[12, 7, 7\], got \[3, 7, 7\]"),
    ],
)
def test_multihead_says_which_shape_does_not_fit(shapes, given, message):
    ours = hosted(multihead("cpu", torch.float32, batch_first=True), CalledMultiheadAttention)
    given = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in given.items()}
    with pytest.raises(ValueError, match=message):
        ours(*(torch.zeros(shape) for shape in shapes), **given)


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.MultiheadAttention(8, 2, bias=False, batch_first=True), None),
        (nn.Linear(8, 8), "expected nn.MultiheadAttention, got Linear"),
        (OwnForward(8, 2), "OwnForward replaces the forward"),
        (nn.MultiheadAttention(8, 2, kdim=4), "kdim=4, vdim=8, embed_dim=8"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv=True"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn=True"),
    ],
)
def test_check_says_which_multihead_cannot_be_adapted(module, reason):
    found = check_multihead_attention(module)
    assert found is None if reason is None else reason in found


@torch.no_grad()
@pytest.mark.parametrize("stack", [False, True])
def test_the_fast_path_of_an_encoder_does_not_go_around(stack, device):
    """nn.TransformerEncoderLayer would pass all weights to one fused operator."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, device=device).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval() if stack else layer
    x = torch.randn(3, 7, 32, device=device)
    expected = model(x)
    calls = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            attach(module, CalledMultiheadAttention, {}, {})
            # Not a hook, which would turn the fast path off by itself.
            module.out_proj.forward = lambda x, linear=module.out_proj: (
                calls.append(1),
                type(linear).forward(linear, x),
            )[1]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (2 if stack else 1)


@torch.no_grad()
def test_nested_tensors_are_refused(device):
    ours = hosted(multihead(device, torch.float32, batch_first=True), CalledMultiheadAttention).eval()
    x = torch.nested.nested_tensor([torch.randn(n, 32, device=device) for n in (3, 5)])
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        ours(x, x, x)


@pytest.mark.parametrize("training", [True, False])
def test_multihead_calls_its_output_projection(training, inputs, device):
    plain = multihead(device, batch_first=True).train(training)
    ours = hosted(plain, CalledMultiheadAttention)
    attach(ours.out_proj, MlaeLinear, mlae_factors(32, 32), mlae_attributes(_mlae_bias_owner=None))
    ours.to(device, torch.float64)
    given = inputs()
    with torch.no_grad():
        y, _ = ours(*given)
        assert not torch.allclose(y, plain(*given)[0])
        merged_(plain.out_proj.weight.data, ours.out_proj)
        torch.testing.assert_close(y, plain(*given)[0], rtol=1e-10, atol=1e-10)


def mlae_multihead(device, mask_p=0.0, dtype=torch.float64, **options):
    plain = multihead(device, dtype, batch_first=True, **options)
    ours = copy.deepcopy(plain)
    attach(ours, MlaeMultiheadAttention, mlae_factors(32, 96), mlae_attributes(mask_p))
    return plain, ours.to(device, dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_mlae_merges_into_the_joint_projection(bias, inputs, device):
    plain, ours = mlae_multihead(device, mask_p=0.5, bias=bias)
    ours.eval()
    given = inputs()
    y, weights = ours(*given)
    assert not torch.allclose(y, plain(*given)[0])
    merged_(plain.in_proj_weight.data, ours)
    torch.testing.assert_close((y, weights), plain(*given), rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    assert all(getattr(ours, name).grad.abs().max() > 0 for name in ours.adapter_parameters)


def test_mlae_masks_the_three_inputs_alike(inputs, device):
    """Every training forward is that of some one subset of experts, the same for queries, keys and values."""
    plain, ours = mlae_multihead(device, mask_p=0.5)
    query, key, value = inputs()
    subsets = {}
    with torch.no_grad():
        for subset in range(8):
            kept = torch.tensor([subset >> i & 1 for i in range(3)], device=device)
            merged = copy.deepcopy(plain)
            coeff = (ours.coeff * kept / 0.5).repeat_interleave(2)
            reference.merge_lora_(merged.in_proj_weight.data, ours.lora_a, ours.lora_b, coeff)
            subsets[subset] = merged(query, key, value)[0]
    seen = set()
    for _ in range(40):
        y = ours(query, key, value)[0]
        matches = [subset for subset, expected in subsets.items() if torch.allclose(y, expected, rtol=1e-9, atol=1e-9)]
        assert len(matches) == 1
        seen.add(matches[0])
        coeff_grad = torch.autograd.grad(y.square().sum(), ours.coeff)[0]
        assert [bool(g) for g in coeff_grad] == [bool(matches[0] >> i & 1) for i in range(3)]
    assert len(seen) > 4


def test_mlae_multihead_under_autocast(inputs, device):
    plain, ours = mlae_multihead(device, dtype=torch.float32)
    given = inputs(dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        y, _ = ours(*given, need_weights=False)
    assert y.dtype == torch.bfloat16
    merged_(plain.in_proj_weight.data, ours)
    expected, _ = plain(*given, need_weights=False)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    y.float().square().sum().backward()
    assert all(getattr(ours, name).grad.dtype == torch.float32 for name in ours.adapter_parameters)


def test_mlae_multihead_repr_and_detach():
    plain, ours = mlae_multihead("cpu", mask_p=0.5)
    assert "mlae: experts=3, expert_rank=2, mask_p=0.5" in repr(ours)
    taken = detach(ours)
    assert list(taken) == ["lora_a", "lora_b", "coeff"]
    assert type(ours) is nn.MultiheadAttention and vars(ours).keys() == vars(plain).keys()
    assert list(ours.state_dict()) == list(plain.state_dict())


@copiers
@pytest.mark.parametrize("mlae", [True, False])
def test_multihead_copies(copier, mlae, device):
    plain, ours = mlae_multihead(device)
    ours = ours if mlae else hosted(plain, CalledMultiheadAttention)
    x = torch.randn(3, 7, 32, device=device, dtype=torch.float64)
    twin = copier(ours)
    assert type(twin) is type(ours) and torch.equal(twin(x, x, x)[0], ours(x, x, x)[0])
    detach(twin)
    assert type(twin) is nn.MultiheadAttention and torch.equal(twin(x, x, x)[0], plain(x, x, x)[0])
    assert twin._qkv_same_embed_dim is True


class SelfAttention(nn.Module):
    """As torchvision's encoder block calls it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        y, _ = self.attention(x, x, x, need_weights=False)
        return y


@pytest.mark.parametrize("mlae", [True, False])
def test_multihead_compiles_exports_and_traces(mlae, device):
    plain, ours = mlae_multihead(device)
    ours = ours if mlae else hosted(plain, CalledMultiheadAttention)
    model = SelfAttention(ours).eval()
    x = torch.randn(3, 7, 32, device=device, dtype=torch.float64)
    expected = grads(model, x)
    torch._dynamo.reset()
    assert_same(grads(model, x, torch.compile(model, fullgraph=True, backend="eager")), expected, 1e-12)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    larger = torch.cat([x, x.flip(1)])
    torch.testing.assert_close(exported(larger), model(larger), rtol=1e-12, atol=1e-12)
    assert_same(grads(model, x, torch.fx.symbolic_trace(model)), expected, 1e-12)


def test_alore_behind_adapts_the_first_of_a_tuple(device):
    plain = multihead(device, batch_first=True)
    ours = copy.deepcopy(plain)
    attach(ours, AloreLinear, alore_parameters(32), OWN_SCALE)
    ours.to(device, torch.float64)
    x = torch.randn(3, 7, 32, device=device, dtype=torch.float64)
    y, weights = ours(x, x, x, average_attn_weights=False)
    expected, expected_weights = plain(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(y, reference.alore(expected, ours.scale, ours.down, ours.up), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights, expected_weights)
