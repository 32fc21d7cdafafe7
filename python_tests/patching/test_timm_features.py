"""What people do with timm models keeps working on a patched one."""

import copy
import pickle

import pytest
import torch
from backbones import BACKBONES, build, images, relative_error, train_adapters_
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

import alore_ext as ae

METHODS = {"alore": ae.AloreConfig(), "mlae": ae.MlaeConfig(dropout=0.0)}
methods = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
BYPASSING = ["vit", "eva02_tiny", "beit"]


def patched(name, config, device="cpu", dtype=torch.float32):
    return train_adapters_(ae.patch(build(name, device, dtype), config))


@methods
@pytest.mark.parametrize("name", BACKBONES)
def test_layer_decay_groups_of_the_base_are_unchanged(name, config):
    """A wrapper that renames parameters makes these silently collapse; here the base's do not move."""
    model = build(name)
    if name == "deit_distilled":
        assert model.group_matcher()["stem"]

    def layer_of(model):
        groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        return {name: layer for name, layer in groups.items()}

    before, num_groups = layer_of(model), len(param_groups_layer_decay(model))
    ae.patch(model, config)
    after = layer_of(model)
    assert {name: after[name] for name in before} == before
    for key in after.keys() - before.keys() - {"alore_scale"}:
        block = key.split(".")[1]
        assert after[key] == before[f"blocks.{block}.mlp.fc2.weight"], key  # an adapter decays with its block
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert len(param_groups_layer_decay(model)) == num_groups


@methods
@pytest.mark.parametrize("name", BYPASSING)
def test_gradient_checkpointing_is_exact(name, config, device):
    """With dropout on: recomputation must draw the same masks."""
    import dataclasses

    config = dataclasses.replace(config, dropout=0.4)
    model = patched(name, config, device).train()
    x = images(device)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        model(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@methods
def test_reset_classifier(config, device):
    model = patched("vit", config, device)
    model.reset_classifier(7)
    model.train()
    model(images(device)).sum().backward()
    assert model.head.weight.shape[0] == 7 and model.head.weight.grad is not None
    ae.unpatch(model)
    assert model.head.weight.shape[0] == 7 and model.head.weight.requires_grad


@methods
@pytest.mark.parametrize("name", BYPASSING)
def test_features(name, config, device):
    """forward_features and forward_intermediates run through the adapters, merged or not."""
    plain = build(name, device)
    model = patched(name, config, device)
    x = images(device)
    with torch.no_grad():
        features = model.forward_features(x)
        final, intermediates = model.forward_intermediates(x, indices=[0, 2])
        torch.testing.assert_close(final, features)
        assert relative_error(intermediates[0], plain.forward_intermediates(x, indices=[0])[1][0]) > 1e-3
        ae.merge_(model)
        assert relative_error(model.forward_features(x), features) < 1e-5
        assert relative_error(model.forward_intermediates(x, indices=[0])[1][0], intermediates[0]) < 1e-5


@methods
@pytest.mark.parametrize("name", BYPASSING)
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_stand_alone(name, config, merged, copier, device):
    model = patched(name, config, device)
    x = images(device)
    with torch.no_grad():
        unmerged = model(x)
    if merged:
        ae.merge_(model)
    twin = copier(model)
    del model
    if merged:
        with pytest.raises(ValueError, match="merged"):
            twin.train()
        ae.unmerge_(twin)
    assert {type(m).__name__ for m in twin.modules()} & {"AloreLayerNorm", "MlaeLinear"}
    with torch.no_grad():
        assert torch.equal(twin(x), unmerged)
        for parameter in (p for n, p in twin.named_parameters() if n == "alore_scale" or n.endswith("coeff")):
            parameter.zero_()
        assert relative_error(twin(x), build_again(name, device)(x)) < 1e-5  # its own scale, not the first model's
    ae.unpatch(twin)


def build_again(name, device):
    torch.manual_seed(0)  # the seed that the fixture set before `patched` built its base
    return build(name, device)


@methods
def test_averaged_models(config, device):
    model = patched("vit", config, device)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    first = {name: p.clone() for name, p in model.named_parameters()}
    x = images(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
        average.update_parameters(model)
        assert relative_error(average(x), model(x)) > 1e-4
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, (first[name] + model.get_parameter(name)) / 2)


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", BYPASSING)
def test_to_dtype(name, config, dtype, device):
    model = patched(name, config, device)
    x = images(device)
    with torch.no_grad():
        expected = model(x)
        model.to(dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        y = model(x.to(dtype))
        assert y.dtype == dtype
        assert relative_error(y, expected) < max(16 * torch.finfo(dtype).eps, 1e-5)


@methods
def test_state_dict_round_trip(config, device):
    model = patched("vit", config, device)
    other = ae.patch(build("vit", device), config)
    other.load_state_dict(model.state_dict(), assign=True)
    x = images(device)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))  # assign=True replaces the very parameters that adapters read


def test_functional_call_reaches_the_shared_scale(device):
    model = patched("vit", METHODS["alore"], device)
    x = images(device)
    zero = {"alore_scale": torch.zeros_like(model.alore_scale)}
    with torch.no_grad():
        y = torch.func.functional_call(model, zero, (x,))
        assert relative_error(y, ae.unpatch(model)(x)) < 1e-5


@methods
def test_autocast(config, device):
    model = patched("vit", config, device).train()
    x = images(device)
    with torch.no_grad():
        expected = model(x)
    with torch.autocast(device.type, torch.bfloat16):
        y = model(x)
    assert relative_error(y, expected) < 0.05
    y.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@methods
def test_a_step_trains_adapters_and_head_alone(config, device):
    model = patched("vit", config, device).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(images(device)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (None, {"head.weight", "head.bias"}),
        ("norm", {"norm.weight", "norm.bias"}),
        (["norm", "head"], {"norm.weight", "norm.bias", "head.weight", "head.bias"}),
        ((), set()),
    ],
)
def test_head_names(head, expected):
    model = ae.patch(build("vit"), ae.AloreConfig(), head=head)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if not name.endswith(("down", "up", "alore_scale"))} == expected


def test_both_heads_of_distilled_deit():
    model = ae.patch(build("deit_distilled"), ae.AloreConfig())
    assert model.head.weight.requires_grad and model.head_dist.weight.requires_grad


def test_unpatch_restores_the_flags_it_found():
    model = build("vit")
    model.patch_embed.requires_grad_(False)
    ae.patch(model, ae.AloreConfig())
    ae.unpatch(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_hooks_stay():
    model = build("vit")
    seen = []
    model.blocks[1].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.blocks[1].attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ae.patch(model, ae.AloreConfig())
    assert seen == []  # looking at the data flow runs nobody's hooks
    train_adapters_(model)(images())
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [("vit", ae.AloreConfig(dropout=0.1)), ("beit", ae.MlaeConfig()), ("eva02_base", METHODS["alore"])],
    ids=["alore", "mlae", "alore_swiglu"],
)
def test_compile_whole_graph(name, config, device):
    model = patched(name, config, device)
    x = images(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(x)
        assert relative_error(compiled(x), expected) < 1e-5
    model.train()
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    ae.merge_(model)
    with torch.no_grad():
        assert relative_error(compiled(x), expected) < 1e-5


@pytest.mark.slow
@methods
def test_export(config):
    model = patched("vit", config)
    x = images()
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        assert relative_error(program.module()(x), model(x)) < 1e-6
    assert program.state_dict.keys() == model.state_dict().keys()
