"""What is the ViT family's alone: consumers, attentions that go around qkv, heads. The rest: test_every_backbone.py."""

import pytest
import torch
from backbones import build, images, relative_error, train_adapters_

import alore_ext as ae
from alore_ext.modules import AloreLayerNorm, AloreNorm, FusedBiasAttention, MlaeLinear


@pytest.mark.parametrize(
    ("name", "module", "folds_into"),
    [
        ("vit", "norm1", ["attn.qkv"]),
        ("vit_gated_rmsnorm", "norm1", ["attn.gate", "attn.qkv"]),
        ("eva02_tiny", "norm1", ["attn.qkv"]),
        ("eva02_base", "norm1", ["attn.k_proj", "attn.q_proj", "attn.v_proj"]),
        ("eva02_base", "norm2", ["mlp.fc1_g", "mlp.fc1_x"]),
        ("vit_glu", "norm2", ["mlp.fc1"]),
        ("beit", "norm2", ["mlp.fc1"]),
    ],
)
def test_consumers(name, module, folds_into):
    """A merge changes the weights of exactly the linears that read the adapted norm, and no bias."""
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    location = {"norm1": "before_attn", "norm2": "before_ffn"}[module]
    ae.patch(model, ae.AloreConfig(locations=(location,), layers=[1]))
    train_adapters_(model)
    ae.merge_and_unload(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"blocks.1.{linear}.weight" for linear in folds_into}


@pytest.mark.parametrize(
    ("name", "targets", "adapted"),
    [
        ("vit", ("qkv",), ["attn.qkv"]),
        ("vit_gated_rmsnorm", ("qkv",), ["attn.qkv"]),
        (
            "eva02_base",
            ("qkv", "fc1"),
            ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1_g", "mlp.fc1_x"],
        ),
        ("beit_swiglu", ("fc1", "fc2"), ["mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"]),
    ],
)
def test_mlae_targets(name, targets, adapted):
    model = ae.patch(build(name), ae.MlaeConfig(targets=targets, layers=[0]))
    found = {name for name, module in model.named_modules() if isinstance(module, MlaeLinear)}
    assert found == {f"blocks.0.{linear}" for linear in adapted}


@pytest.mark.parametrize("name", ["eva02_tiny", "beit"])
def test_attentions_that_go_around_qkv(name, device):
    """timm's F.linear(x, qkv.weight, cat(q_bias, k_bias, v_bias)): adapted with keys and all three biases
    kept.
    """
    model = build(name, device)
    x = images(device)
    attention = model.blocks[0].attn
    kind = type(attention)
    ae.patch(model, ae.MlaeConfig())
    assert isinstance(attention, FusedBiasAttention) and isinstance(attention, kind)
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= set(model.state_dict())
    with torch.no_grad():
        before = model(x)
        attention._buffers["k_bias"].add_(1.0)  # the scores of a query all move alike: softmax does not see it
        attention._parameters["q_bias"].add_(1.0)
        assert relative_error(model(x), before) > 1e-4
    ae.unpatch(model)
    assert type(attention) is kind


def test_norm_classes():
    from timm.layers import LayerNorm

    model = ae.patch(build("vit"), ae.AloreConfig())
    assert isinstance(model.blocks[0].norm1, AloreLayerNorm) and isinstance(model.blocks[0].norm1, LayerNorm)
    model = ae.patch(build("vit_gated_rmsnorm"), ae.AloreConfig())
    assert isinstance(model.blocks[0].norm1, AloreNorm) and not isinstance(model.blocks[0].norm1, AloreLayerNorm)


@pytest.mark.parametrize("name", ["vit", "eva02_base", "beit"])
def test_patch_vit(name):
    model = build(name)
    assert ae.patch_vit(model, ae.AloreConfig()) is model
    assert isinstance(model.blocks[2].norm2, AloreLayerNorm)


def test_only_the_layers_asked_for():
    model = ae.patch(build("vit"), ae.AloreConfig(layers=(n for n in (2, 0))))
    adapted = [i for i, block in enumerate(model.blocks) if isinstance(block.norm1, AloreLayerNorm)]
    assert adapted == [0, 2]


def test_start_values(device):
    model = build("vit", device)
    torch.manual_seed(3)
    ae.patch(model, ae.AloreConfig(num_experts=2, rank=4))
    first = {name: p.clone() for name, p in model.named_parameters()}
    down, up = model.blocks[0].norm1.down, model.blocks[0].norm1.up
    assert down.shape == (2, 16, 4) and up.shape == (2, 4, 16) and model.alore_scale.shape == (2, 2, 2)
    assert not up.any() and down.device == model.blocks[0].norm1.weight.device
    bound = (6 / (16 + 4)) ** 0.5
    assert 0.9 * bound < down.abs().max() <= bound
    ae.unpatch(model)
    torch.manual_seed(3)
    ae.patch(model, ae.AloreConfig(num_experts=2, rank=4))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, first[name]), name
    ae.unpatch(model)

    ae.patch(model, ae.AloreConfig(num_experts=16, rank=1))
    assert 0.9 < model.alore_scale.var().item() * 16 < 1.1
    ae.unpatch(model)

    ae.patch(model, ae.MlaeConfig(num_experts=8, expert_rank=2, coeff_init=0.25))
    qkv = model.blocks[0].attn.qkv
    assert qkv.lora_a.shape == (16, 32) and qkv.lora_b.shape == (96, 16) and qkv.coeff.shape == (8,)
    assert not qkv.lora_b.any() and (qkv.coeff == 0.25).all()
    assert 0.9 * 32**-0.5 < qkv.lora_a.abs().max() <= 32**-0.5


@pytest.mark.parametrize("location", ["before_attn", "after_attn", "before_ffn", "after_ffn"])
@pytest.mark.parametrize("name", ["vit", "vit_gated_rmsnorm"])
def test_dropout_in_training_alone(name, location, device):
    model = build(name, device)
    train_adapters_(ae.patch(model, ae.AloreConfig(dropout=0.5, locations=(location,))))
    x = images(device)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert relative_error(model(x), model(x)) > 1e-3


def test_patch_under_inference_mode(device):
    model = build("vit", device)
    with torch.inference_mode():
        ae.patch(model, ae.AloreConfig())
    assert not model.alore_scale.is_inference() and not model.blocks[0].norm1.up.is_inference()


def test_fixed_patterns_change_the_experts_of_each_block():
    model = ae.patch(build("vit"), ae.MlaeConfig(masking="mixed", pattern="incremental", dropout=0.3))
    assert [block.attn.qkv.coeff.numel() for block in model.blocks] == [2, 6, 10]
    assert {block.attn.qkv._mlae_mask_p for block in model.blocks} == {0.3}


def test_a_backbone_inside_another_module(device):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = build("vit")
            self.backbone.reset_classifier(0)
            self.out = torch.nn.Linear(32, 3)

        def forward(self, x):
            return self.out(self.backbone(x))

    model = Classifier().to(device).eval()
    with pytest.raises(ValueError, match="name the classifier with head="):
        ae.patch(model, ae.AloreConfig())
    ae.patch(model, ae.AloreConfig(), head="out")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"out.weight", "out.bias", "alore_scale", "backbone.blocks.0.norm1.down"} <= trainable
    assert not any(name.startswith("backbone.") and not name.endswith(("down", "up")) for name in trainable)
    train_adapters_(model)
    with torch.no_grad():
        x = images(device)
        unmerged = model(x)
        assert relative_error(ae.merge_(model)(x), unmerged) < 1e-5
