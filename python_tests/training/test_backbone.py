"""Backbones by name, their input, and weights from files."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from alore_ext.training.backbone import build_backbone, input_spec, load_weights
from alore_ext.training.errors import InputError

VIT = "test_vit"  # timm's own test model: 0.4 M parameters, patch 16


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model(VIT, num_classes=7, img_size=64).state_dict()


def file_of(tmp_path, state, suffix=".safetensors"):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 3}, file)
    return str(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_load_and_the_head_is_new(tmp_path, state, suffix):
    model = build_backbone(VIT, 5, img_size=64, weights=file_of(tmp_path, state, suffix))
    assert model.head.weight.shape[0] == 5
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, state[name]), name


def test_position_embedding_is_resized(tmp_path, state):
    model = build_backbone(VIT, 5, img_size=96, weights=file_of(tmp_path, state))
    assert model.pos_embed.shape[1] == 1 + 36
    assert torch.equal(model.pos_embed[:, :1], state["pos_embed"][:, :1])
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert input_spec(model, 96).size == 96


def test_half_precision_weights_fill_a_float_model(tmp_path, state):
    half = {name: value.half() for name, value in state.items()}
    model = build_backbone(VIT, 5, img_size=64, weights=file_of(tmp_path, half))
    assert model.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert torch.equal(model.blocks[0].attn.qkv.weight, half["blocks.0.attn.qkv.weight"].float())


def test_classifier_is_fresh_unless_asked_for(tmp_path, state):
    file = file_of(tmp_path, state)
    fresh = build_backbone(VIT, 7, img_size=64, weights=file)
    assert fresh.head.weight.shape == state["head.weight"].shape
    assert not torch.equal(fresh.head.weight, state["head.weight"])
    kept = build_backbone(VIT, 7, img_size=64, weights=file, keep_classifier=True)
    assert torch.equal(kept.head.weight, state["head.weight"])
    with pytest.raises(InputError, match=r"head\.weight is \[7, 64\], expected \[5, 64\]"):
        build_backbone(VIT, 5, img_size=64, weights=file, keep_classifier=True)


def test_layer_scale_of_the_original_deit3_files(tmp_path):
    name = "deit3_small_patch16_224"
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=0).state_dict()
    original = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value + 1 for key, value in state.items()
    }
    model = build_backbone(name, 3, weights=file_of(tmp_path, original))
    assert torch.equal(model.blocks[0].ls1.gamma, state["blocks.0.ls1.gamma"] + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("blocks.0.attn.qkv.weight"), r"lacks blocks\.0\.attn\.qkv\.weight$"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), r"has unknown extra\.weight$"),
        (lambda s: s.update({"norm.weight": torch.zeros(3)}), r"norm\.weight is \[3\], expected \[64\]$"),
        (lambda s: s.update({"norm.weight": torch.full((64,), float("nan"))}), "NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, state, change, message):
    broken = dict(state)
    change(broken)
    model = build_backbone(VIT, 5, img_size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_weights(model, file_of(tmp_path, broken))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_of_another_model(tmp_path):
    other = timm.create_model("test_convnext", num_classes=3).state_dict()
    with pytest.raises(InputError, match="is not for this VisionTransformer: lacks cls_token.* more$"):
        build_backbone(VIT, 5, weights=file_of(tmp_path, other))


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_unreadable_weights(tmp_path, content, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match="cannot read") as raised:
        build_backbone(VIT, 5, weights=str(file))
    assert "\n" not in str(raised.value)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickles_with_code_are_refused(tmp_path, capsys):
    file = tmp_path / "evil.pth"
    torch.save({"a": Evil()}, file)
    with pytest.raises(InputError, match="cannot read"):
        build_backbone(VIT, 5, weights=str(file))
    assert "code ran" not in capsys.readouterr().out


def test_names_and_sizes_that_do_not_work(tmp_path):
    with pytest.raises(InputError, match=r"has no model 'vit_smal_x'|has no model 'vit_smal_x'; close names"):
        build_backbone("vit_smal_x", 5)
    with pytest.raises(InputError, match="close names: vit_small_patch"):
        build_backbone("vit_small_patch", 5)
    with pytest.raises(InputError, match="does not exist"):
        build_backbone(VIT, 5, weights=str(tmp_path / "none.pth"))
    with pytest.raises(InputError, match="takes 32, got 64"):
        build_backbone("tiny_vit", 5, img_size=64)


def test_models_of_any_size_ignore_the_size_when_built():
    model = build_backbone("test_convnext", 5, img_size=64)
    assert input_spec(model, 64).size == 64
    assert input_spec(model, None).size == model.pretrained_cfg["input_size"][-1]
