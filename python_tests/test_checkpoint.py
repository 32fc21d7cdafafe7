"""Adapter files: what is saved comes back, on the right base only, or nothing changes."""

import json
import os

import pytest
import torch
from backbones import BACKBONES, assert_unchanged, build, images, relative_error, snapshot, train_adapters_
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alore_ext as ae

METHODS = {
    "alore": ae.AloreConfig(dropout=0.1, layers=(0, 2)),
    "alore_own_scales": ae.AloreConfig(2, 2, share_scale=False, locations=("after_attn",)),
    "mlae": ae.MlaeConfig(4, 2, targets=("qkv", "fc2")),
    "both": [
        ae.AloreConfig(locations=("before_ffn",)),
        ae.MlaeConfig(masking="fixed", pattern="incremental"),
    ],
}
methods = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)


def base(name="vit", device="cpu", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return build(name, device, dtype)


def trained(name="vit", config=METHODS["alore"], device="cpu", **kwargs):
    model = train_adapters_(ae.patch(base(name, device, **kwargs), config))
    with torch.no_grad():
        model.head.weight.add_(0.1)
    return model


def rewrite(path, metadata=None, tensors=None, remove=()):
    """The same file with some metadata or tensors changed."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    contents = {**load_file(path), **(tensors or {})}
    save_file({k: v for k, v in contents.items() if k not in remove}, path, {**old, **(metadata or {})})


def refused(model, path, text, error=ValueError):
    before, generator = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=text):
        ae.load_adapter(model, path)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), generator)


@methods
@pytest.mark.parametrize("name", BACKBONES)
def test_round_trip(name, config, tmp_path, device):
    model = trained(name, config, device)
    path = tmp_path / "adapter.safetensors"
    before = snapshot(model)
    assert ae.save_adapter(model, path) == path
    assert_unchanged(model, before)
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    fresh = base(name, device)
    generator = torch.get_rng_state()
    assert ae.load_adapter(fresh, path) is fresh
    assert torch.equal(torch.get_rng_state(), generator)
    x = images(device)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == before["requires_grad"]
    assert list(fresh.state_dict()) == list(model.state_dict())
    ae.unpatch(fresh)


def test_what_is_in_the_file(tmp_path):
    model = trained(config=METHODS["both"])
    path = ae.save_adapter(model, str(tmp_path / "a.safetensors"))
    tensors = load_file(path)
    expected = ae.adapter_state_dict(model)
    assert tensors.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "alore_ext_adapter" and metadata["format_version"] == "1"
    assert metadata["family"] == "vit" and json.loads(metadata["head"]) == ["head"]
    assert [c["method"] for c in json.loads(metadata["configs"])] == ["alore", "mlae"]


def test_without_the_head(tmp_path, device):
    model = trained(device=device)
    path = ae.save_adapter(model, tmp_path / "a.safetensors", include_head=False)
    assert not any(name.startswith("head") for name in load_file(path))
    assert ae.adapter_state_dict(model, include_head=False).keys() == load_file(path).keys()
    fresh = base(device=device)
    head = fresh.head.weight.clone()
    ae.load_adapter(fresh, path)
    assert torch.equal(fresh.head.weight, head)
    x = images(device)
    with torch.no_grad():
        torch.testing.assert_close(fresh.forward_features(x), model.forward_features(x), rtol=0, atol=0)


def test_adapter_state_dict_of_a_merged_model():
    model = trained()
    before = {name: value.clone() for name, value in ae.adapter_state_dict(model).items()}
    ae.merge_(model)
    after = ae.adapter_state_dict(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("classes", [0, 2, 9])
@pytest.mark.parametrize("name", ["vit", "deit_distilled"])
def test_heads_of_another_size_are_replaced(name, classes, tmp_path, device):
    model = trained(name, device=device)
    path = ae.save_adapter(model, tmp_path / "a.safetensors")
    fresh = base(name, device)
    fresh.reset_classifier(classes)
    ae.load_adapter(fresh, path)
    x = images(device)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert fresh.num_classes == 5 and fresh.head.weight.requires_grad
    ae.load_adapter(fresh, path)  # once more, on the patched model
    ae.unpatch(fresh)


def test_a_head_without_bias(tmp_path, device):
    model = base(device=device)
    model.head = torch.nn.Linear(32, 5, bias=False, device=device)
    ae.patch(model, ae.AloreConfig())
    fresh = ae.load_adapter(base(device=device), ae.save_adapter(model, tmp_path / "a.safetensors"))
    x = images(device)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x)) and fresh.head.bias is None


def test_a_head_without_classes_can_come_later(tmp_path):
    model = base()
    model.reset_classifier(0)
    ae.patch(model, ae.AloreConfig())
    model.reset_classifier(6)
    assert {"head.weight", "head.bias"} <= load_file(ae.save_adapter(model, tmp_path / "a.safetensors")).keys()


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bases_of_another_dtype_match(saved, loaded, tmp_path, device):
    model = trained(device=device, dtype=saved)
    path = ae.save_adapter(model, tmp_path / "a.safetensors")
    fresh = base(device=device, dtype=saved).to(loaded)
    ae.load_adapter(fresh, path)
    x = images(device)
    with torch.no_grad():
        tolerance = 16 * max(torch.finfo(loaded).eps, torch.finfo(saved).eps)
        assert relative_error(fresh(x.to(loaded)), model(x.to(saved)).double()) < tolerance


def test_loading_on_a_patched_model(tmp_path, device):
    model = trained(device=device)
    path = ae.save_adapter(model, tmp_path / "a.safetensors")
    other = ae.patch(base(device=device), METHODS["alore"])
    identities = {name: id(p) for name, p in other.named_parameters()}
    ae.load_adapter(other, path)
    assert {name: id(p) for name, p in other.named_parameters()} == identities  # an optimizer still holds them
    x = images(device)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_random_patterns_come_back_as_drawn(tmp_path):
    config = ae.MlaeConfig(masking="mixed", pattern="random")
    model = trained(config=config)
    path = ae.save_adapter(model, tmp_path / "a.safetensors")
    counts = [block.attn.qkv.coeff.numel() for block in model.blocks]
    for seed in range(4):
        fresh = base()
        torch.manual_seed(seed)
        generator = torch.get_rng_state()
        ae.load_adapter(fresh, path)
        assert torch.equal(torch.get_rng_state(), generator)
        assert [block.attn.qkv.coeff.numel() for block in fresh.blocks] == counts
        x = images()
        with torch.no_grad():
            assert torch.equal(fresh(x), model(x))


def test_parts_of_the_base_that_train_are_warned_about(tmp_path, recwarn):
    model = trained()
    ae.save_adapter(model, tmp_path / "a.safetensors")
    assert not recwarn.list
    model.blocks[0].norm1.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match="neither adapter nor head, are not saved: blocks.0.norm1.bias"):
        ae.save_adapter(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: base(seed=1), r"another base: .* has the right shape but other values"),
        (lambda: _without_a_block(), "another base: blocks.2.*is missing"),
        (lambda: base("vit_inner_norms"), "another base: .* is unexpected"),
        (lambda: base("dinov2"), "another base"),
    ],
    ids=["other_weights", "shallower", "more_norms", "other_model"],
)
def test_another_base(make, text, tmp_path):
    path = ae.save_adapter(trained(config=ae.AloreConfig(layers=[0])), tmp_path / "a.safetensors")
    refused(make(), path, text)


def _without_a_block():
    model = base()
    model.blocks = model.blocks[:2]
    return model


def test_one_other_tensor_is_another_base(tmp_path):
    path = ae.save_adapter(trained(), tmp_path / "a.safetensors")
    model = base()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.normal_()
    refused(model, path, "blocks.1.mlp.fc2.weight has the right shape but other values")
    model = base()
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 26, 32))
    refused(model, path, r"pos_embed must be of shape \[1, 17, 32\], got \[1, 26, 32\]")


def test_another_config(tmp_path):
    path = ae.save_adapter(trained(), tmp_path / "a.safetensors")
    refused(
        ae.patch(base(), ae.AloreConfig()),
        path,
        r"the model is patched with \[AloreConfig\(.*\], the file has",
    )
    merged = ae.merge_(trained())
    refused(merged, path, "is merged; call unmerge_ first")
    ae.unmerge_(merged)


def test_another_family(tmp_path):
    path = ae.save_adapter(trained(), tmp_path / "a.safetensors")
    resnet = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    refused(resnet, path, "Sequential is not of family 'vit'")
    rewrite(path, {"family": "perceptron"})
    refused(base(), path, "unknown family 'perceptron'; known families: .*vit")
    refused(trained(), path, "family must be 'vit', got 'perceptron'")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(metadata={"format_version": "2"}), "format_version must be 1, got '2'"),
        (dict(metadata={"format": "peft"}), "is not an adapter file: format is 'peft'"),
        (dict(metadata={"configs": "[{]"}), "damaged metadata"),
        (dict(metadata={"configs": '[{"method": "adalora"}]'}), "damaged metadata.*method must be one of"),
        (dict(metadata={"configs": "{}"}), "damaged metadata.*at least one config"),
        (dict(metadata={"configs": "7"}), "damaged metadata"),
        (dict(metadata={"base": "3"}), "damaged metadata"),
        (dict(metadata={"head": "[1]"}), "damaged metadata.*names of modules"),
        (dict(metadata={"base": '{"head": 1}'}), "damaged metadata"),
        (dict(metadata={"base": '{"pos_embed": [[1], [0.5]]}'}), "damaged metadata"),
        (dict(metadata={"base": "{}"}), "another base: .* is unexpected"),
        (
            dict(metadata={"head": '["classifier"]'}),
            "head 'classifier' is no module|holds head.bias, which its config",
        ),
        (dict(remove=["blocks.2.norm1.up"]), r"misses blocks.2.norm1.up \(1 tensors in all\)"),
        (dict(remove=["alore_scale"]), "misses alore_scale"),
        (
            dict(tensors={"blocks.1.norm1.up": torch.zeros(4, 4, 8)}),
            "holds blocks.1.norm1.up, which its config",
        ),
        (
            dict(tensors={"blocks.0.norm1.up": torch.zeros(4, 8, 4)}),
            r"norm1.up must be \[4, 4, 8\], got \[4, 8, 4\]",
        ),
        (dict(tensors={"head.gate": torch.zeros(3)}), "head"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("make", [base, trained], ids=["plain", "patched"])
def test_damaged_files(change, text, make, tmp_path):
    path = ae.save_adapter(trained(), tmp_path / "a.safetensors")
    rewrite(path, **change)
    refused(make(), path, text)


def test_truncated_and_foreign_files(tmp_path):
    path = ae.save_adapter(trained(), tmp_path / "a.safetensors")
    contents = path.read_bytes()
    for size in (0, 7, 100, len(contents) // 2, len(contents) - 1):
        path.write_bytes(contents[:size])
        refused(base(), path, "is not a safetensors file, or is truncated")
    path.write_bytes(b"PK" + os.urandom(200))
    refused(base(), path, "is not a safetensors file, or is truncated")
    save_file({"a": torch.zeros(1)}, path)
    refused(base(), path, "is not an adapter file: format is None")
    refused(base(), tmp_path / "none.safetensors", "no file at", FileNotFoundError)
    refused(base(), tmp_path, "no file at", FileNotFoundError)


@pytest.mark.parametrize("make", [base, trained], ids=["plain", "patched"])
def test_a_load_that_fails_midway_is_undone(make, tmp_path, monkeypatch):
    from alore_ext import checkpoint

    source = trained()
    with torch.no_grad():
        source.alore_scale.add_(1.0)
    source.reset_classifier(9)
    path = ae.save_adapter(source, tmp_path / "a.safetensors")
    model = make()
    before = snapshot(model)

    def broken(*args):
        raise MemoryError("no room")

    if make is base:
        monkeypatch.setattr(checkpoint, "apply_plan", broken)
    else:
        copy_, calls = checkpoint.copy_, []

        def flaky(target, value):
            calls.append(1)
            broken() if len(calls) == 5 else copy_(target, value)

        monkeypatch.setattr(checkpoint, "copy_", flaky)
    with pytest.raises(MemoryError):
        ae.load_adapter(model, path)
    monkeypatch.undo()
    assert_unchanged(model, before)
    assert model.num_classes == 5


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    from alore_ext import checkpoint

    path = ae.save_adapter(trained(), tmp_path / "a.safetensors")
    contents = path.read_bytes()

    def broken(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        ae.save_adapter(trained(), path)
    assert path.read_bytes() == contents and os.listdir(tmp_path) == ["a.safetensors"]


def test_saving_a_plain_model(tmp_path):
    with pytest.raises(ValueError, match="save_adapter: VisionTransformer is not patched"):
        ae.save_adapter(base(), tmp_path / "a.safetensors")
    assert not os.listdir(tmp_path)
