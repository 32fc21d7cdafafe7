"""What people do with the models of each library keeps working on a patched one."""

import dataclasses

import pytest
import torch
from backbones import assert_same_bits, assert_unchanged, relative_error, snapshot, train_adapters_
from safetensors.torch import load_file
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from zoo import TIMM, ZOO, Row, every_row, logits, rows_that_can

import alore_ext as ae

METHODS = {"alore": ae.AloreConfig(), "mlae": ae.MlaeConfig(dropout=0.0)}
methods = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)


def same_base(row: Row, device="cpu", classes: int = 5):
    """The same backbone whatever the number of classes."""
    torch.manual_seed(0)
    model = row.build(device)
    if classes != 5:
        other = row.build(device, classes=classes)
        weights = model.state_dict()
        weights = {k: weights[k] if weights[k].shape == v.shape else v for k, v in other.state_dict().items()}
        other.load_state_dict(weights)
        for (_, buffer), (_, old) in zip(other.named_buffers(), model.named_buffers(), strict=True):
            buffer.copy_(old)
        return other
    return model


@every_row
@methods
def test_round_trip_through_a_file(row: Row, config, tmp_path, device):
    model = train_adapters_(ae.patch(same_base(row, device), config))
    path = ae.save_adapter(model, tmp_path / "adapter.safetensors")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert load_file(path).keys() == trainable
    fresh = ae.load_adapter(same_base(row, device), path)
    x = row.images(device)
    with torch.no_grad():
        assert torch.equal(logits(fresh, x), logits(model, x))
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trainable
    for name, value in model.state_dict().items():
        assert_same_bits(fresh.state_dict()[name], value, name)


@every_row
def test_heads_of_another_size_are_replaced(row: Row, tmp_path, device):
    model = train_adapters_(ae.patch(same_base(row, device), ae.AloreConfig()))
    path = ae.save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = ae.load_adapter(same_base(row, device, classes=9), path)
    x = row.images(device)
    with torch.no_grad():
        assert torch.equal(logits(fresh, x), logits(model, x))
    if row.library == "transformers":
        assert fresh.num_labels == fresh.config.num_labels == len(fresh.config.id2label) == 5
        if len(row.heads) == 1:  # the distilled model takes no labels
            assert fresh(x, labels=torch.tensor([0, 4], device=device)).loss.isfinite()
    elif hasattr(model, "num_classes"):
        assert fresh.num_classes == 5
    ae.unpatch(fresh)


@pytest.mark.parametrize("name", [name for name in ("hf_vit", "torchvision_convnext", "swin") if name in ZOO])
def test_a_head_whose_load_fails_is_back(name, tmp_path, monkeypatch):
    from alore_ext import checkpoint

    row = ZOO[name]
    path = ae.save_adapter(ae.patch(same_base(row), ae.AloreConfig()), tmp_path / "adapter.safetensors")
    model = same_base(row, classes=9)
    labels = getattr(getattr(model, "config", None), "id2label", None)
    before = snapshot(model)

    def broken(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(checkpoint, "apply_plan", broken)
    with pytest.raises(MemoryError):
        ae.load_adapter(model, path)
    assert_unchanged(model, before)
    if labels is not None:
        assert model.config.id2label is labels and model.config.num_labels == model.num_labels == 9


@rows_that_can("checkpointing")
@methods
def test_gradient_checkpointing_is_exact(row: Row, config, device):
    """With dropout on: recomputation must draw the same masks."""
    model = train_adapters_(ae.patch(row.build(device), dataclasses.replace(config, dropout=0.4))).train()
    x, gradients = row.images(device), []
    for checkpointing in (False, True):
        if checkpointing:
            switch = "gradient_checkpointing_enable" if row.library == "transformers" else "set_grad_checkpointing"
            getattr(model, switch)()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        logits(model, x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("name", [name for name, row in TIMM.items() if row.family != "vit"])
@methods
def test_layer_decay_groups_of_the_base_are_unchanged(name, config):
    model = TIMM[name].build()

    def layer_of(model):
        return group_parameters(model, model.group_matcher(coarse=False), reverse=True)

    before, num_groups = layer_of(model), len(param_groups_layer_decay(model))
    ae.patch(model, config)
    after = layer_of(model)
    assert {key: after[key] for key in before} == before
    for key in after.keys() - before.keys() - {"alore_scale"}:
        neighbours = {before[other] for other in before if other.startswith(f"{key.rpartition('.')[0]}.")}
        assert neighbours == {after[key]}, key  # an adapter decays with its layer
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert len(param_groups_layer_decay(model)) == num_groups


@rows_that_can("export")
@pytest.mark.parametrize("method", ["alore", "mlae"])
def test_export_of_patched_and_merged_models(row: Row, method):
    model = train_adapters_(ae.patch(row.build(), METHODS[method]))
    x = row.images()
    for fold in (None, ae.merge_) if method == "alore" else (None,):  # merged, they are the same plain backbone
        if fold is not None:
            fold(model)
        program = torch.export.export(model, (x,))
        with torch.no_grad():
            assert relative_error(logits(program.module(), x), logits(model, x)) < 1e-6


@rows_that_can("compile")
def test_compile_whole_graph(row: Row, device):
    torch._dynamo.reset()
    model = train_adapters_(ae.patch(row.build(device), ae.AloreConfig()))
    x = row.images(device)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(logits(compiled, x), logits(model, x)) < 1e-5
