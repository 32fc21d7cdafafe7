"""Merging: exact to a rounding, undone to the bit, refused before anything changes."""

import pytest
import torch
from backbones import (
    BACKBONES,
    assert_same_bits,
    assert_unchanged,
    build,
    images,
    relative_error,
    snapshot,
    train_adapters_,
)

import alore_ext as ae
from alore_ext.patching.grouping import KronMerge, LoraMerge, ScaleShiftMerge, run_merges_

ALL = ("before_attn", "after_attn", "before_ffn", "after_ffn")
METHODS = {
    "alore": ae.AloreConfig(locations=ALL),
    "mlae": ae.MlaeConfig(4, 2, targets=("qkv", "proj", "fc1", "fc2")),
    "both": [ae.AloreConfig(locations=("before_ffn", "after_attn"), share_scale=False), ae.MlaeConfig()],
}
methods = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)


def patched(name, config, device="cpu", dtype=torch.float32):
    return train_adapters_(ae.patch(build(name, device, dtype), config))


@methods
@pytest.mark.parametrize("name", ["vit", "eva02_base", "beit", "vit_gated_rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep_base", ["device", "cpu"])
def test_unmerge_restores_every_bit(name, config, dtype, keep_base, device):
    model = patched(name, config, device, dtype)
    before = snapshot(model)
    for _ in range(3):
        assert ae.merge_(model, keep_base=keep_base) is model
        changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before["tensors"][n])]
        assert any(name.endswith("qkv.weight") or "_proj.weight" in name for name in changed)
        assert ae.unmerge_(model) is model
        assert_unchanged(model, before)


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
def test_where_the_base_is_kept(keep_base, device):
    model = ae.merge_(patched("vit", METHODS["both"], device), keep_base=keep_base)
    kept = model.__dict__["_alore_state"].merged.weights
    assert {tensor.device.type for tensor in kept.values()} == {"cpu" if keep_base == "cpu" else device.type}
    # Only what a merge changes is kept: qkv, fc1, and proj with its bias.
    assert sorted(name for name in kept if name.startswith("blocks.0.")) == [
        "blocks.0.attn.proj.bias",
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
    ]


@methods
@pytest.mark.parametrize("name", BACKBONES)
def test_merge_and_unload_gives_a_plain_backbone(name, config, device):
    plain = build(name, device)
    kinds = {n: type(m) for n, m in plain.named_modules()}
    attributes = {n: sorted(m.__dict__) for n, m in plain.named_modules()}
    flags = {n: p.requires_grad for n, p in plain.named_parameters()}
    model = train_adapters_(ae.patch(plain, config))
    x = images(device)
    with torch.no_grad():
        unmerged = model(x)
        assert ae.merge_and_unload(model) is model
        assert relative_error(model(x), unmerged) < 1e-5
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == attributes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    fresh = BACKBONES[name]().to(device).eval()
    fresh.load_state_dict(model.state_dict())  # the backbone's own keys, no more and no fewer
    for (key, buffer), (_, old) in zip(fresh.named_buffers(), model.named_buffers(), strict=True):
        buffer.copy_(old) if key.endswith("k_bias") else None  # not persistent
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    ae.patch(model, config)  # and it can be patched anew


def test_merge_and_unload_from_merged(device):
    model = patched("vit", METHODS["alore"], device).train()
    ae.merge_(model)
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    ae.merge_and_unload(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value, merged[name], name)
    assert model.training and model.train() is model  # the flag that it had before the merge


def test_adapters_keep_their_identity_and_gradients(device):
    """An optimizer made before the merge still steps the same parameters after unmerge."""
    model = patched("vit", METHODS["both"], device)
    model(images(device)).square().sum().backward()
    before = {name: (id(p), p.grad.clone()) for name, p in model.named_parameters() if p.requires_grad}
    ae.unmerge_(ae.merge_(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert id(parameter) == before[name][0] and torch.equal(parameter.grad, before[name][1])


def test_training_while_merged_raises(device):
    model = patched("vit", METHODS["alore"], device).train()
    model.blocks[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    ae.merge_(model)
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="train: VisionTransformer is merged"):
        model.train()
    with pytest.raises(ValueError, match="merged"):
        torch.nn.Sequential(model).train()
    assert model.eval() is model and model.train(False) is model
    assert not any(module.training for module in model.modules())
    ae.unmerge_(model)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert model.train() is model and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (ae.merge_, "merge_: VisionTransformer is already merged"),
        (
            lambda model: ae.save_adapter(model, "unused.safetensors"),
            "save_adapter: VisionTransformer is merged",
        ),
        (lambda model: ae.patch(model, ae.MlaeConfig()), "already patched"),
    ],
    ids=["merge_", "save_adapter", "patch"],
)
def test_what_a_merged_model_refuses(call, text):
    model = ae.merge_(patched("vit", METHODS["alore"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        call(model)
    assert_unchanged(model, before)
    ae.unmerge_(model)


def test_unmerging_what_is_not_merged():
    model = patched("vit", METHODS["alore"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="unmerge_: VisionTransformer is not merged"):
        ae.unmerge_(model)
    assert_unchanged(model, before)


def test_without_the_base_there_is_no_way_back(device):
    model = patched("vit", METHODS["mlae"], device)
    x = images(device)
    with torch.no_grad():
        unmerged = model(x)
        ae.merge_(model, keep_base=None)
        assert relative_error(model(x), unmerged) < 1e-5
    before = snapshot(model)
    for call in (ae.unmerge_, ae.unpatch):
        with pytest.raises(ValueError, match="merged with keep_base=None, so its base weights are gone"):
            call(model)
        assert_unchanged(model, before)
    ae.merge_and_unload(model)


@pytest.mark.parametrize("keep_base", ["gpu", True, 0, ""])
def test_keep_base_of_another_kind(keep_base):
    model = patched("vit", METHODS["alore"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"keep_base must be one of \('device', 'cpu', None\), got "):
        ae.merge_(model, keep_base=keep_base)
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", [ae.merge_, ae.merge_and_unload])
@pytest.mark.parametrize("keep_base", ["device", None])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("alore", "alore_scale"),
        ("alore", "blocks.2.mlp.fc2.up"),
        ("both", "blocks.1.norm2.scale"),
        ("mlae", "blocks.2.attn.qkv.lora_a"),
        ("mlae", "blocks.0.mlp.fc1.coeff"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_that_are_not_finite(call, keep_base, config, name, value, device):
    model = patched("vit", METHODS[config], device)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"merge_: {name} holds NaN or infinity"):
        call(model, keep_base=keep_base) if call is ae.merge_ else call(model)
    assert_unchanged(model, before)


@methods
@pytest.mark.parametrize("keep_base", ["device", "cpu", None])
def test_a_merge_that_overflows_is_undone(config, keep_base, device):
    """Finite factors, finite float16 weights, and a product that is not: found in the last block."""
    model = patched("vit", config, device, torch.float16).train()
    last = model.blocks[2]
    with torch.no_grad():
        if config is METHODS["alore"]:
            last.mlp.fc2.up.fill_(3e7)
        else:
            last.attn.qkv.lora_b.fill_(3e5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merge_: blocks.2\.\S+weight holds NaN or infinity"):
        ae.merge_(model, keep_base=keep_base)
    assert_unchanged(model, before)


@pytest.mark.parametrize("written", [0, 5])
@pytest.mark.parametrize("op", ["merge_kron_grouped_", "merge_lora_grouped_"])
def test_a_merge_that_fails_midway_is_undone(op, written, monkeypatch, device):
    """Some entries written, the others not, and (for lora) all ALoRE adapters merged before."""
    model = patched("vit", METHODS["both"], device)
    before = snapshot(model)
    merge_grouped_ = getattr(ae.ops, op)

    def flaky(*lists):
        merge_grouped_(*(None if values is None else values[:written] for values in lists))
        raise MemoryError("no room")

    monkeypatch.setattr(ae.ops, op, flaky)
    with pytest.raises(MemoryError):
        ae.merge_(model)
    assert_unchanged(model, before)


@methods
@pytest.mark.parametrize("name", ["vit", "eva02_base"])
def test_a_model_is_merged_in_one_call_a_method(name, config, monkeypatch, device):
    model, calls = patched(name, config, device), []
    for op in ("merge_kron_grouped_", "merge_lora_grouped_"):
        grouped = getattr(ae.ops, op)
        monkeypatch.setattr(
            ae.ops, op, lambda *lists, op=op, grouped=grouped: (calls.append((op, len(lists[0]))), grouped(*lists))
        )
    for op in ("merge_kron_", "merge_lora_"):
        monkeypatch.setattr(ae.ops, op, None)
    ae.merge_(model)
    state = model.__dict__["_alore_state"]
    expected = {"alore": ["merge_kron_grouped_"], "mlae": ["merge_lora_grouped_"]}
    expected["both"] = expected["alore"] + expected["mlae"]
    assert [op for op, _ in calls] == next(expected[key] for key in METHODS if METHODS[key] is config)
    assert sum(entries for _, entries in calls) == sum(len(record.linears) for record in state.records)


def adapter_factors(width, device):
    make = {"device": device, "dtype": torch.float64}
    return (
        torch.randn(4, 4, 4, **make) / 4,
        torch.randn(4, width // 4, 2, **make),
        torch.randn(4, 2, width // 4, **make),
    )


def test_merges_of_one_weight_keep_their_order(device):
    """before and after a linear, then low-rank, and a weight's rows apart (q, k, v) after the whole: as one by one."""
    weights = [torch.randn(24, 16, device=device, dtype=torch.float64) for _ in range(2)]
    bias = torch.randn(24, device=device, dtype=torch.float64)
    low_rank = [torch.randn(*shape, device=device, dtype=torch.float64) for shape in ((3, 16), (24, 3), (3,))]
    merges = [
        KronMerge(weights[0], None, *adapter_factors(16, device), "before"),
        KronMerge(weights[1], None, *adapter_factors(16, device), "before"),
        KronMerge(weights[0], bias, *adapter_factors(24, device), "after"),
        LoraMerge(weights[0], *low_rank),
        KronMerge(weights[0][:8], None, *adapter_factors(16, device), "before"),
        KronMerge(weights[0][8:16], None, *adapter_factors(16, device), "before"),
        KronMerge(weights[0][8:], bias[8:], *adapter_factors(16, device), "after"),
        LoraMerge(weights[1], *low_rank),
    ]
    written = [*weights, bias]
    before = [tensor.clone() for tensor in written]
    for merge in merges:
        if isinstance(merge, KronMerge):
            ae.ops.merge_kron_(merge.weight, merge.bias, merge.scale, merge.down, merge.up, merge.side)
        else:
            ae.ops.merge_lora_(merge.weight, merge.lora_a, merge.lora_b, merge.coeff)
    expected = [tensor.clone() for tensor in written]
    for tensor, old in zip(written, before, strict=True):
        tensor.copy_(old)
    run_merges_(merges)
    for tensor, one_by_one in zip(written, expected, strict=True):
        assert_same_bits(tensor, one_by_one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1), (6,)], ids=str)
def test_affine_merges_round_once(dtype, shape, device):
    """Twice on one weight and bias, and a bias alone: in order, each from float32 (float64) to the nearest value."""
    weight, bias = (torch.randn(s, device=device).to(dtype) for s in (shape, (6,)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, beta, delta = torch.randn(3, 6, device=device, dtype=wide)
    by_rows = gamma.view(-1, *(1,) * (len(shape) - 1))
    expected_weight, expected_bias = weight, bias
    for _ in range(2):
        expected_weight = (expected_weight.to(wide) * by_rows).to(dtype)
        expected_bias = torch.addcmul(beta, expected_bias.to(wide), gamma).to(dtype)
    expected_bias = (expected_bias.to(wide) + delta).to(dtype)
    twice = [ScaleShiftMerge(weight, bias, gamma, beta) for _ in range(2)]
    run_merges_([*twice, ScaleShiftMerge(None, bias, None, delta)])
    assert_same_bits(weight, expected_weight)
    assert_same_bits(bias, expected_bias)


@pytest.mark.parametrize("config", [ae.SsfConfig(), ae.BitFitConfig()], ids=["ssf", "bitfit"])
@pytest.mark.parametrize("keep_base", ["device", "cpu", None])
def test_an_affine_merge_that_overflows_is_undone(config, keep_base, device):
    model = ae.patch(build("vit", device, torch.float16), config).train()
    with torch.no_grad():
        getattr(model.blocks[2].mlp.fc2, "beta" if config.method == "ssf" else "bias_delta").fill_(1e5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merge_: blocks.2.mlp.fc2.bias holds NaN or infinity"):
        ae.merge_(model, keep_base=keep_base)
    assert_unchanged(model, before)


def test_a_merge_that_fails_at_its_end_is_undone(monkeypatch):
    model = patched("vit", METHODS["both"]).train()
    before = snapshot(model)

    def broken(self, mode=True):
        raise RuntimeError("this block has its own idea of eval")

    monkeypatch.setattr(type(model.blocks[1]), "train", broken)
    with pytest.raises(RuntimeError, match="its own idea"):
        ae.merge_(model)
    assert_unchanged(model, before)


def test_meta_models_hold_nothing_to_merge():
    model = ae.patch(build("vit").to("meta"), ae.AloreConfig())
    assert model.alore_scale.is_meta and model.blocks[0].norm1.up.is_meta
    with pytest.raises(ValueError, match="alore_scale is on the meta device"):
        ae.merge_(model)


def test_a_merge_is_seen_by_autograd(device):
    """Weights that changed between forward and backward: autograd must notice, not use them."""
    model = patched("vit", METHODS["mlae"], device)
    loss = model(images(device)).square().sum()
    ae.merge_(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unpatch_of_a_merged_model(device):
    model = build("vit", device)
    before = snapshot(model)
    train_adapters_(ae.patch(model, METHODS["both"]))
    ae.merge_(model, keep_base="cpu")
    ae.unpatch(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_dtype_while_merged(dtype, device):
    """unmerge_ after .to(): the base as .to() would have made it, and adapters that go with it."""
    model = patched("vit", METHODS["alore"], device)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    x = images(device)
    with torch.no_grad():
        expected = model(x)
        ae.merge_(model).to(dtype)
        ae.unmerge_(model)
        for name in ("blocks.0.attn.qkv.weight", "blocks.2.mlp.fc2.bias"):
            assert_same_bits(model.get_parameter(name).data, base[name].to(dtype), name)
        assert relative_error(model(x.to(dtype)), expected) < max(16 * torch.finfo(dtype).eps, 1e-5)
        assert model.blocks[0].norm1.up.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_head_trained_before_the_merge_stays(device):
    model = patched("vit", METHODS["alore"], device)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    head = model.head.weight.clone()
    ae.merge_and_unload(model)
    assert torch.equal(model.head.weight, head)
