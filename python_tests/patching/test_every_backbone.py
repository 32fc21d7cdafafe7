"""Every backbone, every place: the adapter is really in the forward, trains, and folds away exactly."""

import pytest
import torch
from backbones import assert_unchanged, relative_error, snapshot, train_adapters_
from zoo import ZOO, Row, every_row, logits

import alore_ext as ae
from alore_ext.modules.adapter import Adapter

CONFIGS = {
    "default": lambda row: ae.AloreConfig(),
    "everywhere": lambda row: ae.AloreConfig(2, 3, dropout=0.1, locations=row.locations, layers=(0, 2)),
    "after": lambda row: ae.AloreConfig(
        8, 1, locations=[name for name in row.locations if name.startswith("after")], share_scale=False
    ),
    "mlae": lambda row: ae.MlaeConfig(),
    "mlae_everywhere": lambda row: ae.MlaeConfig(4, 2, 0.3, 0.5, targets=row.targets, layers=(1, 2)),
    "both": lambda row: [
        ae.AloreConfig(locations=("before_ffn",)),
        ae.MlaeConfig(targets=[role for role in row.targets if role != "fc1"]),
    ],
}
every_config = pytest.mark.parametrize("config", CONFIGS)
methods = pytest.mark.parametrize("config", [ae.AloreConfig(), ae.MlaeConfig()], ids=["alore", "mlae"])


def adapters(model):
    """The adapted layers, without the hosts that only call them."""
    return [m for m in model.modules() if isinstance(m, Adapter) and m.adapter_parameters]


def own_parameters(layer):
    return [getattr(layer, name) for name in layer.adapter_parameters if name in layer._parameters]


def without_randomness_(model):
    """Training mode, in which nothing is drawn: what stands on a dropped path rightly gets no gradient."""
    model.train()
    for module in model.modules():
        if hasattr(module, "_mlae_mask_p"):
            module._mlae_mask_p = 0.0
        if hasattr(module, "drop_prob") or type(module).__name__ == "StochasticDepth":
            module.eval()
    return model


@every_row
@every_config
def test_life_of_an_adapter(row: Row, config, device):
    """From patch to a plain backbone again, in float64: what is exact has to be exact."""
    model = row.build(device, torch.float64)
    x = row.images(device, torch.float64)
    with torch.no_grad():
        expected = logits(model, x)
    plain = snapshot(model)

    assert ae.patch(model, CONFIGS[config](row)) is model
    names_at_start = [name for name, _ in model.named_parameters()]
    assert set(plain["tensors"]) <= set(model.state_dict())
    with torch.no_grad():
        assert relative_error(logits(model, x), expected) < 1e-12  # the adapters start as the identity

    # Each adapter by itself is in the forward: its own change changes the output.
    assert adapters(model)
    for layer in adapters(model):
        factor = layer.lora_b if hasattr(layer, "lora_b") else layer.up
        with torch.no_grad():
            factor.normal_(0.0, 0.2)
            changed = relative_error(logits(model, x), expected)
            factor.zero_()
        assert changed > 1e-6, layer

    # Every trainable gets a gradient once no factor is zero, and nothing else does.
    train_adapters_(model)
    masks = {module: module._mlae_mask_p for module in model.modules() if hasattr(module, "_mlae_mask_p")}
    logits(without_randomness_(model), x).square().sum().backward()
    for key, parameter in model.named_parameters():
        is_trained = key not in plain["tensors"] or key.startswith(tuple(f"{head}." for head in row.heads))
        assert parameter.requires_grad is is_trained, key
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) is is_trained, key
    model.eval()
    for module, probability in masks.items():
        module._mlae_mask_p = probability

    with torch.no_grad():
        unmerged = logits(model, x)
        assert relative_error(unmerged, expected) > 1e-3
        ae.merge_(model)
        assert list(model.state_dict()) == list(plain["tensors"])
        assert {k: type(m) for k, m in model.named_modules()} == {k: t for k, (_, t) in plain["modules"].items()}
        assert relative_error(logits(model, x), unmerged) < 1e-12
        ae.unmerge_(model)
        assert [name for name, _ in model.named_parameters()] == names_at_start
        assert torch.equal(logits(model, x), unmerged)

    model.zero_grad(set_to_none=True)
    assert ae.unpatch(model) is model
    assert_unchanged(model, plain)


@every_row
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_other_dtypes(row: Row, config, dtype, device):
    model = row.build(device, dtype)
    x = row.images(device, dtype)
    with torch.no_grad():
        expected = logits(model, x)
        ae.patch(model, config)
        assert all(p.dtype == torch.float32 for layer in adapters(model) for p in own_parameters(layer))
        epsilon = torch.finfo(dtype).eps
        # The adapted norm is fused, and rounds where the plain one does not.
        assert relative_error(logits(model, x), expected) < 20 * epsilon
        train_adapters_(model)
        unmerged = logits(model, x)
        assert unmerged.dtype == dtype
        assert relative_error(unmerged, expected) > 0.01
        ae.merge_(model)
        assert relative_error(logits(model, x), unmerged) < 20 * epsilon


@every_row
def test_families(row: Row):
    """Each family's own function takes the model, the others refuse it; the classifier is found."""
    functions = {
        "vit": ae.patch_vit,
        "swin": ae.patch_swin,
        "convnext": ae.patch_convnext,
        "as_mlp": ae.patch_as_mlp,
    }
    model = row.build()
    before = snapshot(model)
    for family, function in functions.items():
        if family != row.family:
            with pytest.raises(ValueError, match=f"is not of family '{family}'"):
                function(model, ae.AloreConfig())
            assert_unchanged(model, before)
    functions[row.family](model, ae.AloreConfig())
    assert model.__dict__["_alore_state"].head_names == row.heads


@pytest.mark.parametrize("name", [name for name, row in ZOO.items() if row.family == "convnext"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            ae.AloreConfig(locations=("before_attn",)),
            "before_attn is not possible: .*a dense map does not fold into one",
        ),
        (ae.AloreConfig(locations=("after_attn",)), "after_attn is not possible: .*has no attention"),
        (ae.MlaeConfig(targets=("qkv",)), "qkv is not possible: .*has no attention"),
        (ae.MlaeConfig(targets=("proj",)), "proj is not possible: .*has no attention"),
    ],
    ids=["before_attn", "after_attn", "qkv", "proj"],
)
def test_what_convnext_refuses(name, config, reason):
    model = ZOO[name].build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=reason):
        ae.patch(model, config)
    assert_unchanged(model, before)
