"""`verify`: passes what is right, names what is wrong, and leaves no trace of either."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from backbones import assert_unchanged, build, images, snapshot, train_adapters_
from zoo import ZOO, Row, every_row

import alore_ext as ae
from alore_ext.modules import Adapter
from alore_ext.patching.state import get_state

ALL = ("before_attn", "after_attn", "before_ffn", "after_ffn")
CONFIGS = {
    "alore": ae.AloreConfig(dropout=0.3, locations=ALL),
    "mlae": ae.MlaeConfig(targets=("qkv", "proj", "fc1", "fc2")),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IDENTITY = "at its start an adapter changes nothing"
CHANGES = "other values of the adapters change it"
ADAPTERS = "every adapter parameter gets a gradient"
OTHERS = "every other trainable parameter gets a gradient"
MERGED = "merged = unmerged"
UNMERGED = "unmerge restores every bit"


def patched(config=CONFIGS["alore"], name="vit", **kwargs):
    return ae.patch(build(name, **kwargs), config)


def failures(report):
    return [check.name for check in report.checks if not check.passed]


def traces(model):
    """What `snapshot` does not hold: gradients, and what torch would draw next."""
    gradients = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    generators = [torch.get_rng_state()]
    if torch.cuda.is_available():
        generators += torch.cuda.get_rng_state_all()
    return gradients, generators


def assert_same_traces(model, before):
    gradients, generators = traces(model)
    for name, (grad, copy) in before[0].items():
        assert gradients[name][0] is grad, name
        assert copy is None or torch.equal(grad, copy), name
    assert all(torch.equal(a, b) for a, b in zip(generators, before[1], strict=True))


@every_row
@pytest.mark.parametrize("method", ["alore", "mlae"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_backbone_is_verified(row: Row, method, dtype, device):
    config = ae.AloreConfig(locations=row.locations) if method == "alore" else ae.MlaeConfig(targets=row.targets)
    model = ae.patch(row.build(device, dtype), config)
    report = ae.verify(model, row.images(device, dtype))
    assert report, report
    assert [check.name for check in report.checks] == [IDENTITY, CHANGES, ADAPTERS, OTHERS, MERGED, UNMERGED]


@configs
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_the_model_is_left_as_it_was(config, trained, device):
    model = patched(config, "vit_drop_path", device=device)
    if trained:
        train_adapters_(model)
    model.train()
    model.blocks[1].eval()  # a mixture, in which each flag has to come back
    model(images(device)).sum().backward()
    model.blocks[0].norm1.bias.requires_grad_(True)
    model.blocks[2].mlp.fc1.bias.grad = torch.ones_like(model.blocks[2].mlp.fc1.bias)
    before, left = snapshot(model), traces(model)
    report = ae.verify(model, torch.ones(2, 3, 32, 32, device=device))
    assert report, report
    assert_unchanged(model, before)
    assert_same_traces(model, left)


@pytest.mark.parametrize("calls", range(1, 11))
def test_a_forward_that_raises_leaves_no_trace(calls, device):
    """Whichever forward it is: with adapters off, while merged, with moved weights, in training mode."""
    model = patched(device=device).train()
    x, count = torch.ones(2, 3, 32, 32, device=device), []

    def fails(module, inputs):
        count.append(1)
        if len(count) == calls:
            raise MemoryError("no room")

    hook = model.register_forward_pre_hook(fails)
    before, left = snapshot(model), traces(model)
    with pytest.raises(MemoryError, match="no room"):
        ae.verify(model, x)
    assert_unchanged(model, before)
    assert_same_traces(model, left)
    hook.remove()


def test_the_report(device):
    model = patched(device=device)
    report = ae.verify(model, images(device))
    assert isinstance(report, ae.VerificationReport) and bool(report) is True
    lines = str(report).splitlines()
    assert lines[0] == "VisionTransformer: 6 of 6 checks passed" and len(lines) == 7
    assert all(line.startswith("ok  ") for line in lines[1:])
    report.raise_for_failures()
    merged = next(check for check in report.checks if check.name == MERGED)
    assert 0 < merged.measured <= merged.bound < 1e-4
    failed = dataclasses.replace(report, checks=(dataclasses.replace(merged, passed=False), *report.checks[1:]))
    assert not failed and "FAIL  merged = unmerged" in str(failed)
    with pytest.raises(ae.VerificationError, match="VisionTransformer fails 1 checks\nFAIL  merged = unmerged"):
        failed.raise_for_failures()


class BypassedMlp(torch.nn.Module):
    """timm's MLP with a forward that reads fc1's weight, as some libraries' functional code does."""

    def forward(self, x):
        return self.fc2(self.act(F.linear(x, self.fc1.weight, self.fc1.bias)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_bypassed_layer_is_found(dtype, device):
    """One of twelve adapted linears is not called any more: nothing but its own gradient says so."""
    model = patched(ae.MlaeConfig(targets=("qkv", "proj", "fc1", "fc2")), device=device, dtype=dtype)
    mlp = model.blocks[1].mlp
    mlp.__class__ = type("Bypassed", (BypassedMlp, type(mlp)), {})
    report = ae.verify(model, images(device, dtype))
    assert ADAPTERS in failures(report) and OTHERS not in failures(report)
    check = next(check for check in report.checks if check.name == ADAPTERS)
    assert "33 of 36; without: blocks.1.mlp.fc1.lora_a (none: the forward goes around it)" in check.detail
    if dtype == torch.float32:
        assert MERGED in failures(report)


@pytest.mark.parametrize("location", ALL)
@pytest.mark.parametrize("name", ["vit", "swinv2", "convnext_conv_mlp", "torchvision_swin", "hf_vit"])
def test_a_layer_bypassed_without_gradients_is_found(name, location, device):
    """A fused path that is taken at inference alone: every gradient arrives."""
    row = ZOO[name]
    if location not in row.locations:
        location = "after_ffn"
    model = ae.patch(row.build(device), ae.AloreConfig(locations=(location,)))
    record = get_state(model).records[-1]
    layer = model.get_submodule(record.module)
    plain = type(layer).adapter_bases[1]

    def forward(*args, **kwargs):
        return (type(layer) if torch.is_grad_enabled() else plain).forward(layer, *args, **kwargs)

    layer.forward = forward
    assert failures(ae.verify(model, row.images(device))) == [MERGED]


def test_a_layer_bypassed_in_training_is_found(device):
    model = patched(ae.AloreConfig(), device=device)
    block = model.blocks[1]
    kind, norm = type(block), type(block.norm2).adapter_bases[1]

    def forward(self, x, *args, **kwargs):
        if not self.training:
            return kind.forward(self, x, *args, **kwargs)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(norm.forward(self.norm2, x))

    block.__class__ = type("Fused", (kind,), {"forward": forward})
    assert failures(ae.verify(model, images(device))) == [ADAPTERS]


@pytest.mark.parametrize("location", ["after_attn", "before_attn"])
def test_a_wrong_merge_side_is_found(location, device):
    """proj is square: an adapter after it fits on its input side too, and so does the transposed map."""
    model = patched(ae.AloreConfig(locations=(location,)), device=device)
    state = get_state(model)
    wrong = dataclasses.replace(state.records[1], side="before" if location == "after_attn" else "after")
    if location == "before_attn":  # qkv is 3 times as wide as its input: fold into proj instead
        wrong = dataclasses.replace(
            wrong, linears=(dataclasses.replace(wrong.linears[0], module="blocks.1.attn.proj"),)
        )
    state.records = (state.records[0], wrong, *state.records[2:])
    assert failures(ae.verify(model, images(device))) == [MERGED]


def test_a_start_that_is_no_identity_is_found(device):
    model = patched(device=device)
    layer = model.blocks[0].mlp.fc2
    layer.forward = lambda x: type(layer).forward(layer, x) * (1.001 if isinstance(layer, Adapter) else 1.0)
    assert failures(ae.verify(model, images(device))) == [IDENTITY, MERGED]


def test_trainables_without_a_gradient_are_found(device):
    model = patched(device=device)
    model.unused = torch.nn.Parameter(torch.ones(3, device=device))
    report = ae.verify(model, images(device))
    assert failures(report) == [OTHERS]
    assert "2 of 3; without: unused (none: the forward goes around it)" in str(report)


def test_frozen_adapters_are_tried_too(device):
    model = patched(device=device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    report = ae.verify(model, images(device))
    assert report, report
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_that_are_not_finite_fail(value, device):
    model = patched(device=device)
    with torch.no_grad():
        model.blocks[1].norm1.down[0, 0, 0] = value
    before = snapshot(model)
    report = ae.verify(model, images(device))
    assert {CHANGES, ADAPTERS, MERGED} <= set(failures(report)) and IDENTITY not in failures(report)
    assert "blocks.1.norm1.down holds NaN or infinity" in str(report)
    assert_unchanged(model, before)


def test_a_broken_unmerge_is_found(monkeypatch, device):
    from alore_ext import verification

    model = patched(device=device)
    weight = model.blocks[2].attn.qkv.weight
    before = snapshot(model)

    def unmerge_(model):
        ae.unmerge_(model)
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)

    monkeypatch.setattr(verification, "unmerge_", unmerge_)
    report = ae.verify(model, images(device))
    assert failures(report) == [UNMERGED] and "not so: blocks.2.attn.qkv.weight" in str(report)
    assert_unchanged(model, before)


def test_a_failing_unmerge_leaves_no_trace(monkeypatch, device):
    from alore_ext import verification

    model = patched(device=device)
    before = snapshot(model)

    def unmerge_(model):
        raise MemoryError("no room")

    monkeypatch.setattr(verification, "unmerge_", unmerge_)
    with pytest.raises(MemoryError):
        ae.verify(model, images(device))
    assert_unchanged(model, before)
    assert model.train() is model


class TwoInputs(torch.nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.backbone = build("vit")
        self.returns = returns

    def forward(self, left, right, factor=1.0):
        return self.returns(self.backbone(left) * factor, self.backbone(right))


@pytest.mark.parametrize(
    "returns",
    [
        lambda a, b: a + b,
        lambda a, b: (a, {"b": b, "index": torch.arange(2)}),
        lambda a, b: {"logits": a + b, "other": torch.full((1,), float("nan"))},
    ],
    ids=["tensor", "nested", "logits"],
)
def test_inputs_and_outputs(returns, device):
    model = ae.patch(TwoInputs(returns).to(device).eval(), ae.AloreConfig(), head="backbone.head")
    left, right = images(device), images(device)
    for example in ((left, right, 2.0), [left, right], {"right": right, "left": left, "factor": 0.5}):
        report = ae.verify(model, example)
        assert report, report


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_where_gradients_are_off(mode, device):
    model = patched(device=device)
    with mode():
        report = ae.verify(model, images(device))
    assert report, report


def test_gradient_checkpointing(device):
    model = patched(device=device)
    model.set_grad_checkpointing(True)
    report = ae.verify(model, images(device))
    assert report, report


def test_batch_norm_keeps_its_statistics(device):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), build("vit")).to(device).train()
    ae.patch(model, ae.AloreConfig(), head="1.head")
    before = snapshot(model)
    report = ae.verify(model, images(device, batch=1))
    assert report, report
    assert_unchanged(model, before)


def test_what_is_refused(device):
    plain = build("vit", device)
    with pytest.raises(ValueError, match="verify: VisionTransformer is not patched"):
        ae.verify(plain, images(device))
    merged = ae.merge_(patched(device=device))
    with pytest.raises(ValueError, match="verify: VisionTransformer is merged; call unmerge_ first"):
        ae.verify(merged, images(device))
    ae.unmerge_(merged)
    with pytest.raises(TypeError, match="example_input must be a tensor, a tuple or list of arguments, or a dict, got"):
        ae.verify(merged, 3)
    merged.blocks[0].norm1 = torch.nn.LayerNorm(32)
    with pytest.raises(ValueError, match="verify: blocks.0.norm1 is no longer the layer that was patched"):
        ae.verify(merged, images(device))
    model = patched(device=device)
    model.register_forward_hook(lambda module, inputs, output: output.argmax(-1))
    with pytest.raises(ValueError, match="returned no floating-point tensor"):
        ae.verify(model, images(device))


def test_a_method_without_a_merge_has_to_refuse_it(device, monkeypatch):
    model = ae.patch(build("vit", device), ae.AloreConfig(structure="stacked_nonlinear"))
    report = ae.verify(model, images(device))
    assert report, report
    last = report.checks[-1]
    assert last.name == "cannot be merged, and refuses to be" and "GELU" in last.detail

    def merges_all_the_same(model):
        monkeypatch.setattr(type(model.__dict__["_alore_state"].records[0]), "merge_refusal", lambda self: None)
        return ae.merge_(model)

    monkeypatch.setattr("alore_ext.verification.merge_", merges_all_the_same)
    report = ae.verify(model, images(device))
    assert not report and not report.checks[-1].passed


def test_settings_of_tf32_come_back(device):
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert ae.verify(patched(device=device), images(device))
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = False
