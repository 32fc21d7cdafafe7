"""LoRA folders both ways, against the PEFT that is installed: what one wrote, the other computes."""

import copy
import json

import pytest
import timm
import torch
from backbones import assert_unchanged, build, images, randomise_, relative_error, snapshot
from safetensors.torch import load_file, save_file
from torchvision.models import vision_transformer as tv_vit

import alore_ext as ae

peft = pytest.importorskip("peft")


def transformers_vit():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    return transformers.ViTForImageClassification(config)


def convnext():
    return timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5, conv_mlp=True)


MODELS = {"vit": lambda: build("vit"), "convnext_conv": convnext, "transformers_vit": transformers_vit}


def make(name, device):
    return randomise_(MODELS[name]()).to(device).eval()


def logits(model, x):
    y = model(x)
    return getattr(y, "logits", y)


@torch.no_grad()
def train_(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


CONFIGS = {
    "vit": [ae.LoraConfig(4, 8), ae.LoraConfig(2, targets=["fc1"], layers=[1])],
    "convnext_conv": ae.LoraConfig(4, targets=("fc1", "fc2")),
    "transformers_vit": ae.LoraConfig(4, 0.5, targets=("qkv", "fc2")),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("include_head", [True, False])
def test_peft_loads_what_we_export(name, include_head, device, tmp_path):
    base = make(name, device)
    model = train_(ae.patch(copy.deepcopy(base), CONFIGS[name]))
    if not include_head:
        head = model.__dict__["_alore_state"].head_names[0]
        model.get_submodule(head).load_state_dict(base.get_submodule(head).state_dict())
    folder = ae.export_peft(model, tmp_path / "new" / "adapter", include_head)
    assert folder == tmp_path / "new" / "adapter"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    x = images(device)
    with torch.no_grad():
        expected = logits(model, x)
        assert relative_error(logits(base, x), expected) > 1e-3
        assert relative_error(logits(theirs, x), expected) < 1e-5
        # And back: on the base, with the head of the folder.
        ours = ae.load_peft(copy.deepcopy(base), folder)
        assert relative_error(logits(ours, x), expected) < 1e-6
        assert relative_error(logits(ae.merge_(ours), x), expected) < 1e-5


PEFT_CASES = {
    "vit": ("vit", dict(r=4, lora_alpha=16, target_modules=["qkv", "fc1"], modules_to_save=["head"])),
    "regex": ("vit", dict(r=4, lora_alpha=16, target_modules=r"blocks\.[02]\.attn\.(qkv|proj)")),
    "rslora": ("vit", dict(r=9, lora_alpha=4, target_modules=["qkv"], use_rslora=True)),
    "patterns": (
        "vit",
        dict(
            r=4,
            target_modules=["qkv", "fc2"],
            rank_pattern={"fc2": 2, r"blocks\.1\.attn\.qkv": 3},
            alpha_pattern={"qkv": 5},
        ),
    ),
    "conv": ("convnext_conv", dict(r=4, target_modules=["mlp.fc1", "mlp.fc2"], modules_to_save=["head.fc"])),
    "queries_and_values": (
        "transformers_vit",
        dict(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    ),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_we_load_what_peft_saves(case, device, tmp_path):
    name, fields = PEFT_CASES[case]
    base = make(name, device)
    theirs = train_(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ae.load_peft(copy.deepcopy(base), tmp_path / "theirs")
    x = images(device)
    with torch.no_grad():
        expected = logits(theirs, x)
        assert relative_error(logits(base, x), expected) > 1e-3
        assert relative_error(logits(ours, x), expected) < 1e-5
        again = ae.load_adapter(copy.deepcopy(base), ae.save_adapter(ours, tmp_path / "ours.safetensors"))
        assert relative_error(logits(again, x), expected) < 1e-5
    factors = 2 * sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules())
    assert len(ae.adapter_state_dict(ours, include_head=False)) == factors


def test_a_head_of_another_size(device, tmp_path):
    """The folder's classifier replaces the base's."""
    model = train_(ae.patch(build("vit", device), ae.LoraConfig(2)))
    base = copy.deepcopy(model)
    ae.unpatch(base).reset_classifier(7)
    ae.export_peft(model, tmp_path)
    x = images(device)
    with torch.no_grad():
        assert relative_error(ae.load_peft(base.to(device), tmp_path)(x), model(x)) < 1e-6


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("vit", ae.MlaeConfig(), "blocks.0.attn.qkv has an adapter of method 'mlae'"),
        ("vit", ae.AloreConfig(), "blocks.0.norm1 has an adapter of method 'alore'"),
        ("beit", ae.LoraConfig(), "blocks.0.attn reads the weight of blocks.0.attn.qkv and does not call"),
        ("torchvision", ae.LoraConfig(), "self_attention is an nn.MultiheadAttention"),
        ("torchvision", ae.LoraConfig(targets=["proj"]), "self_attention reads the weight of .*out_proj"),
    ],
)
def test_what_is_not_exported(name, config, text, tmp_path):
    model = tv_vit.VisionTransformer(32, 8, 2, 4, 32, 64) if name == "torchvision" else build(name)
    ae.patch(model, config)
    with pytest.raises(ValueError, match=f"export_peft: .*{text}"):
        ae.export_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_merged_model_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="export_peft: VisionTransformer is merged; call unmerge_ first"):
        ae.export_peft(ae.merge_(ae.patch(build("vit"), ae.LoraConfig())), tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_dora": True}, "use_dora must be unset, got True"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must be a start that leaves the base"),
        ({"r": 8}, "lora_A of blocks.0.attn.qkv must have the config's 8 rows, got 4"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"modules_to_save": None}, "holds head.bias, which is neither lora_A, lora_B nor of modules_to_save"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(changes, text, tmp_path):
    ae.export_peft(ae.patch(build("vit"), ae.LoraConfig(4)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused(build("vit"), tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            "blocks.0.attn.qkv.lora_A.weight",
            "patch_embed.proj.lora_A.weight",
            "adapts patch_embed.proj, which this library cannot adapt",
        ),
        ("blocks.0.attn.qkv.lora_B.weight", None, "misses blocks.0.attn.qkv.lora_b"),
        ("blocks.0.attn.qkv.lora_A.weight", None, "misses lora_A of blocks.0.attn.qkv"),
        (
            "blocks.1.attn.qkv.lora_B.weight",
            "blocks.1.attn.qkv.lora_magnitude_vector",
            "holds blocks.1.attn.qkv.lora_m",
        ),
    ],
)
def test_tensors_that_are_refused(old, new, text, tmp_path):
    ae.export_peft(ae.patch(build("vit"), ae.LoraConfig(4)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    moved = tensors.pop(f"base_model.model.{old}")
    save_file(tensors if new is None else {**tensors, f"base_model.model.{new}": moved}, file)
    refused(build("vit"), tmp_path, text)


def test_adapters_that_peft_never_ran(tmp_path):
    theirs = peft.get_peft_model(build("beit"), peft.LoraConfig(r=2, target_modules=["qkv"]))
    theirs.save_pretrained(tmp_path)
    refused(build("beit"), tmp_path, "adapts blocks.0.attn.qkv, whose attention reads the weight")


def refused(model, folder, text):
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"load_peft: .*{text}"):
        ae.load_peft(model, folder)
    assert_unchanged(model, before)


def test_missing_files_and_patched_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter_config.json in"):
        ae.load_peft(build("vit"), tmp_path)
    model = ae.patch(build("vit"), ae.LoraConfig(4))
    ae.export_peft(model, tmp_path)
    with pytest.raises(ValueError, match="already patched"):
        ae.load_peft(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors in .* is a pickle"):
        ae.load_peft(build("vit"), tmp_path)
