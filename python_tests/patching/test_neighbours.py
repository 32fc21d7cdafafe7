"""LoRA, SSF and BitFit on backbones of every library: exact at the start, trainable, merged and back."""

import copy
import pickle

import pytest
import timm
import torch
from backbones import (
    assert_same_bits,
    assert_unchanged,
    build,
    images,
    randomise_,
    relative_error,
    snapshot,
)
from torch import nn
from torchvision.models import swin_transformer as tv_swin
from torchvision.models import vision_transformer as tv_vit

import alore_ext as ae


def swin(kind):
    return kind(img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5)


def torchvision_swin(**kwargs):
    return tv_swin.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [3, 3], stochastic_depth_prob=0.0, num_classes=5, **kwargs
    )


def convnext(**kwargs):
    return timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5, **kwargs)


def transformers_vit():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    return transformers.ViTForImageClassification(config)


MODELS = {
    "vit": lambda: build("vit"),
    "beit": lambda: build("beit"),
    "swin": lambda: swin(timm.models.swin_transformer.SwinTransformer),
    "swin_v2": lambda: swin(timm.models.swin_transformer_v2.SwinTransformerV2),
    "convnext": convnext,
    "convnext_conv": lambda: convnext(conv_mlp=True),
    "torchvision_vit": lambda: tv_vit.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5),
    "torchvision_swin": torchvision_swin,
    "torchvision_swin_v2": lambda: torchvision_swin(
        block=tv_swin.SwinTransformerBlockV2, downsample_layer=tv_swin.PatchMergingV2
    ),
    "transformers_vit": transformers_vit,
}
models = pytest.mark.parametrize("name", MODELS)
methods = pytest.mark.parametrize("method", ["lora", "ssf", "bitfit"])


def make(name, device="cpu", dtype=torch.float64):
    model = randomise_(MODELS[name]()).to(device=device, dtype=dtype).eval()
    for module in model.modules():  # stochastic depth would make every training forward another
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def config_for(method, name):
    roles = ("fc1", "fc2") if "convnext" in name else ("qkv", "proj", "fc1", "fc2")
    if method == "lora":
        return ae.LoraConfig(rank=4, alpha=8, targets=roles)
    if method == "ssf":
        # These two keep the bias of qkv where beta cannot be merged.
        return ae.SsfConfig(targets=roles[1:] if name in ("beit", "swin_v2") else None)
    return ae.BitFitConfig()


def logits(model, x):
    y = model(x)
    return getattr(y, "logits", y)


@torch.no_grad()
def train_(model):
    for name, value in ae.adapter_state_dict(model, include_head=False).items():
        if not name.endswith("lora_a"):
            value.add_(torch.randn_like(value) * 0.2)
    return model


@methods
@models
def test_life_of_a_patched_model(name, method, device):
    model = make(name, device)
    x = images(device, torch.float64)
    plain = snapshot(model)
    with torch.no_grad():
        expected = logits(model, x)
    assert ae.patch(model, config_for(method, name)) is model
    with torch.no_grad():
        assert relative_error(logits(model, x), expected) < 1e-14  # the identity at start

    train_(model).train()
    logits(model, x).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), key
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, key
    model.zero_grad()
    model.eval()

    patched = snapshot(model)
    with torch.no_grad():
        unmerged = logits(model, x)
        assert relative_error(unmerged, expected) > 1e-3
        ae.merge_(model)
        assert relative_error(logits(model, x), unmerged) < 1e-12
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, patched["tensors"][n])}
        assert changed == set(model.__dict__["_alore_state"].merged.weights)
    ae.unmerge_(model)
    assert_unchanged(model, patched)
    ae.unpatch(model)
    assert_unchanged(model, plain)


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "convnext", "torchvision_vit"])
def test_sixteen_bit(name, method, dtype, device):
    """Merged and unmerged are both within 16-bit rounding of float64, and the way back is exact."""
    model = train_(ae.patch(make(name, device, torch.float32), config_for(method, name)))
    x = images(device, torch.float64)
    with torch.no_grad():
        exact = logits(copy.deepcopy(model).double(), x)
        model = model.to(dtype)
        before = snapshot(model)
        bound = 16 * torch.finfo(dtype).eps
        assert relative_error(logits(model, x.to(dtype)), exact) < bound
        ae.merge_(model)
        assert relative_error(logits(model, x.to(dtype)), exact) < bound
        ae.unmerge_(model)
    assert_unchanged(model, before)


@methods
@models
def test_files_and_copies(name, method, device, tmp_path):
    base = make(name, device)
    model = train_(ae.patch(copy.deepcopy(base), config_for(method, name)))
    x = images(device, torch.float64)
    loaded = ae.load_adapter(copy.deepcopy(base), ae.save_adapter(model, tmp_path / "adapter.safetensors"))
    copies = [loaded, copy.deepcopy(model)]
    if name != "convnext_conv":  # timm's ConvMlp holds a lambda
        copies.append(pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        expected = logits(model, x)
        for other in copies:
            assert torch.equal(logits(other, x), expected)
            for key, value in ae.adapter_state_dict(model).items():
                assert_same_bits(ae.adapter_state_dict(other)[key], value, key)


@methods
def test_only_the_methods_own_parameters(method, device):
    model = ae.patch(make("vit", device), config_for(method, "vit"))
    added = {n.rpartition(".")[2] for n, _ in model.named_parameters()} - {"weight", "bias", "cls_token", "pos_embed"}
    assert added == {"lora": {"lora_a", "lora_b"}, "ssf": {"gamma", "beta"}, "bitfit": {"bias_delta"}}[method]
    assert not list(model.named_buffers())
    widths = {"qkv": 96, "proj": 32, "fc1": 128, "fc2": 32}
    summary = ae.trainable_summary(model)
    per_block = {
        "lora": {role: 4 * (out + (128 if role == "fc2" else 32)) for role, out in widths.items()},
        "ssf": {"norm": 2 * 64, **{role: 2 * out for role, out in widths.items()}},
        "bitfit": {"norm": 64, "bias": sum(widths.values())},
    }[method]
    assert summary.by_role == {role: 3 * count for role, count in per_block.items()}


def test_lora_follows_the_model_and_draws_nothing(device):
    model = train_(ae.patch(make("vit", dtype=torch.float32), config_for("lora", "vit"))).to(device)
    x = images(device)
    state = torch.get_rng_state()
    with torch.autocast(device.type, torch.bfloat16):
        low = model.train()(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative_error(low, model(x)) < 0.05
    assert copy.deepcopy(model).to("meta")(x.to("meta")).is_meta
    assert "lora: rank=4, scaling=2" in repr(model.blocks[0].attn.qkv)


@methods
def test_compiled_without_a_graph_break(method, device):
    model = train_(ae.patch(make("vit", device, torch.float32), config_for(method, "vit")))
    x = images(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), model(x)) < 1e-5


def test_lora_by_module_names(device):
    model = make("transformers_vit", device)
    names = [f"vit.layers.{i}.attention.{which}_proj" for i in range(2) for which in "qv"]
    ae.patch(model, ae.LoraConfig(2, modules=names))
    adapted = {n.rpartition(".")[0] for n in ae.adapter_state_dict(model, include_head=False)}
    assert adapted == set(names)
    with pytest.raises(ValueError, match="modules must name linears of the model's blocks .* got 'vit.nothing'"):
        ae.patch(make("transformers_vit"), ae.LoraConfig(modules=["vit.nothing"]))


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("beit", ae.SsfConfig(), r"blocks.0.attn.qkv has its bias in blocks.0.attn, as q_bias, k_bias and v_bias"),
        ("vit_glu", ae.SsfConfig(), "blocks.0.attn.proj has no bias that is a parameter"),
        ("vit_gated_rmsnorm", ae.SsfConfig(("fc1",)), "blocks.0.norm1 must be a layer or group norm .* got RmsNorm"),
        ("vit", ae.BitFitConfig(layers=[7]), "layers must be in 0..2 for 3 blocks, got 7"),
    ],
)
def test_what_cannot_be_merged_is_refused(name, config, text):
    model = build(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        ae.patch(model, config)
    assert_unchanged(model, before)


def test_bitfit_skips_what_has_no_bias():
    model = ae.patch(build("vit_gated_rmsnorm"), ae.BitFitConfig())
    assert "blocks.0.attn.proj.bias_delta" in model.state_dict()
    assert not any("qkv.bias" in name or "norm1" in name and "delta" in name for name in model.state_dict())
    model = build("vit")
    for module in model.blocks.modules():
        if getattr(module, "bias", None) is not None:
            module.bias = None
    with pytest.raises(ValueError, match="no layer of the 3 blocks has a bias"):
        ae.patch(model, ae.BitFitConfig())


def test_a_computed_or_shared_bias_is_refused():
    model = build("vit")
    nn.utils.parametrize.register_parametrization(model.blocks[1].mlp.fc1, "bias", nn.Identity())
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1 must store its bias"):
        ae.patch(model, ae.BitFitConfig())
    for config in (ae.BitFitConfig(), ae.SsfConfig()):
        model = build("vit")
        model.blocks[1].norm2.bias = model.blocks[0].norm1.bias
        with pytest.raises(ValueError, match=r"blocks.0.norm1.bias is used in several places"):
            ae.patch(model, config)


@pytest.mark.parametrize(
    ("first", "second", "layer"),
    [
        (ae.AloreConfig(), ae.SsfConfig(("proj",)), "blocks.0.norm1"),
        (ae.SsfConfig(("proj",)), ae.BitFitConfig(), "blocks.0.norm1"),
        (ae.LoraConfig(), ae.MlaeConfig(), "blocks.0.attn.qkv"),
        (ae.LoraConfig(), ae.SsfConfig(("qkv",), norms=False), "blocks.0.attn.qkv"),
        (ae.SsfConfig(("proj",), norms=False), ae.BitFitConfig(), "blocks.0.attn.proj"),
        (ae.AloreConfig(locations=["before_ffn"]), ae.BitFitConfig(norms=False), "blocks.0.mlp.fc1"),
    ],
    ids=lambda value: getattr(value, "method", value),
)
def test_methods_on_one_layer_collide(first, second, layer):
    model = build("vit")
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"patch: {layer} is adapted twice, by .* must touch different layers"):
        ae.patch(model, [first, second])
    assert_unchanged(model, before)


def test_methods_side_by_side(device):
    model = make("vit", device)
    before = snapshot(model)
    x = images(device, torch.float64)
    configs = [
        ae.AloreConfig(locations=["before_ffn"], layers=[0, 1]),
        ae.MlaeConfig(layers=[0]),
        ae.LoraConfig(4, layers=[1]),
        ae.SsfConfig(("proj",), norms=False, layers=[0, 1]),
        ae.BitFitConfig(layers=[2]),
    ]
    train_(ae.patch(model, configs))
    with torch.no_grad():
        unmerged = model(x)
        assert relative_error(ae.merge_(model)(x), unmerged) < 1e-12
        assert torch.equal(ae.unmerge_(model)(x), unmerged)
    ae.unpatch(model)
    assert_unchanged(model, before)
