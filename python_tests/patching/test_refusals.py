"""What cannot be patched is refused with the layer's name and the reason, and the model is left as it was."""

from functools import partial

import pytest
import torch
from backbones import _TINY, assert_unchanged, build, snapshot
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn

import alore_ext as ae
from alore_ext.patching import apply

VIT = partial(VisionTransformer, patch_size=8, **_TINY)


def refused(model, config, text, error=ValueError, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=text):
        ae.patch(model, config, **kwargs)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (ae.AloreConfig(num_experts=5), r"num_experts must divide the width of blocks.0.norm1, 32, got 5"),
        (ae.AloreConfig(num_experts=64), "num_experts must divide the width of blocks.0.norm1"),
        (ae.AloreConfig(layers=[0, 3]), r"layers must be in 0..2 for 3 blocks, got 3"),
        (ae.MlaeConfig(layers=[12]), r"MlaeConfig: layers must be in 0..2"),
        ([], "got an empty one"),
        (
            [ae.AloreConfig(locations=("before_attn",)), ae.MlaeConfig()],
            r"blocks.0.attn.qkv is adapted twice, by alore before_attn .config 0. and mlae qkv .config 1.",
        ),
        ([ae.MlaeConfig(layers=[1, 2]), ae.MlaeConfig(4, layers=[2])], "blocks.2.attn.qkv is adapted twice"),
        ([ae.AloreConfig(locations=("after_ffn",)), ae.MlaeConfig(targets=("fc2",))], "blocks.0.mlp.fc2"),
        (
            [ae.AloreConfig(2, locations=("after_ffn",)), ae.AloreConfig(4, locations=("before_ffn",))],
            r"one set of shared scale matrices, .* num_experts \[2, 4\]",
        ),
    ],
)
def test_configs_that_do_not_fit(config, text):
    refused(build("vit"), config, text)


@pytest.mark.parametrize("config", [None, "alore", {"num_experts": 4}, [ae.AloreConfig(), None], ae.AloreConfig])
def test_what_is_no_config(config):
    refused(build("vit"), config, "config must be one of AloreConfig, MlaeConfig, .*, or a list of them", TypeError)


def test_what_is_no_model():
    for call in (ae.patch, ae.patch_vit):
        with pytest.raises(TypeError, match="expected an nn.Module, got dict"):
            call({}, ae.AloreConfig())


def test_two_configs_with_their_own_scales_may_differ():
    model = build("vit")
    own = ae.AloreConfig(2, locations=("after_ffn",), share_scale=False)
    ae.patch(model, [own, ae.AloreConfig(4, locations=("before_ffn",))])
    assert model.alore_scale.shape == (4, 4, 4) and model.blocks[0].mlp.fc2.scale.shape == (2, 2, 2)


def test_patching_twice():
    model = ae.patch(build("vit"), ae.AloreConfig())
    refused(model, ae.MlaeConfig(), "VisionTransformer is already patched")
    refused(model, "nonsense", "already patched")
    wrapper = nn.Sequential(model)
    refused(wrapper, ae.MlaeConfig(), "Sequential holds '0', which is already patched")


def test_no_known_family():
    resnet = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    refused(
        resnet,
        ae.AloreConfig(),
        r"Sequential is of no known family. .*vit: expected one list of blocks .* found none",
    )
    two = nn.ModuleDict({"a": build("vit"), "b": build("vit")})
    refused(two, ae.AloreConfig(), "found 2: a.blocks, b.blocks")
    before = snapshot(resnet)
    with pytest.raises(ValueError, match="is not of family 'vit'"):
        ae.patch_vit(resnet, ae.AloreConfig())
    assert_unchanged(resnet, before)
    refused(VIT(block_fn=ParallelScalingBlock), ae.AloreConfig(), "of no known family")


@pytest.mark.parametrize(
    "model",
    [VIT(block_fn=ResPostBlock), Eva(patch_size=8, use_post_norm=True, **_TINY)],
    ids=["ResPostBlock", "EvaBlockPostNorm"],
)
def test_post_norm_blocks(model):
    """They have norm1, attn, norm2 and mlp as well; only their data flow tells."""
    refused(model, ae.AloreConfig(), r"before_attn is not possible: blocks.0 does not feed norm1 into its attn")
    refused(model, ae.AloreConfig(locations=("before_ffn",)), "blocks.0 does not feed norm2 into its mlp")


class TwoReaders(nn.Module):
    """A pre-norm block whose first norm also feeds the residual: no merge into qkv could follow."""

    def __init__(self, **kwargs):
        super().__init__()
        from timm.models.vision_transformer import Block

        inner = Block(**kwargs)
        self.norm1, self.attn, self.norm2, self.mlp = inner.norm1, inner.attn, inner.norm2, inner.mlp

    def forward(self, x):
        y = self.norm1(x)
        x = y + self.attn(y)
        return x + self.mlp(self.norm2(x))


class ScaledQuery(TwoReaders):
    """Feeds the norm through something that is not linear in any weight."""

    def forward(self, x):
        x = x + self.attn(torch.relu(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class Unrolled(TwoReaders):
    """Uses the norm's parameters, never the norm."""

    def forward(self, x):
        normed = nn.functional.layer_norm(x, (32,), self.norm1.weight, self.norm1.bias)
        x = x + self.attn(normed)
        return x + self.mlp(self.norm2(x))


class Untraceable(TwoReaders):
    def forward(self, x):
        if x.sum() > 0:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TwiceFc2(TwoReaders):
    """Applies the FFN's output layer to two inputs' worth of tokens."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        h = self.mlp.act(self.mlp.fc1(self.norm2(x)))
        return x + self.mlp.fc2(h) + self.mlp.fc2(h * h)


@pytest.mark.parametrize(
    ("block", "place", "text"),
    [
        (TwoReaders, "before_attn", "blocks.0 feeds its norm1 into an addition: no linear map can be merged"),
        (ScaledQuery, "before_attn", "blocks.0 does not feed norm1 into its attn"),
        (Unrolled, "before_attn", "blocks.0 does not feed norm1 into its attn"),
        (Untraceable, "before_ffn", "blocks.0 has a forward that cannot be traced"),
        (TwiceFc2, "after_ffn", "blocks.0 does not call mlp.fc2 exactly once"),
        (TwiceFc2, "before_ffn", "blocks.0 never calls its mlp"),
    ],
)
def test_blocks_that_cannot_be_merged(block, place, text):
    refused(VIT(block_fn=block), ae.AloreConfig(locations=(place,)), f"{place} is not possible: {text}")


def test_other_places_of_such_blocks_still_work():
    model = VIT(block_fn=TwoReaders)
    ae.patch(model, ae.AloreConfig(locations=("before_ffn", "after_attn")))
    assert "blocks.0.norm2.down" in model.state_dict()


class Reweighted(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_layers_that_are_not_what_their_name_says():
    model = build("vit")
    model.blocks[1].attn.qkv = Reweighted(32, 96)
    refused(model, ae.MlaeConfig(), "blocks.1.attn.qkv must be an nn.Linear, got a Reweighted")
    refused(model, ae.AloreConfig(), "blocks.1.attn.qkv must be an nn.Linear, got a Reweighted")

    model = build("vit")
    nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc1)
    refused(model, ae.AloreConfig(), "blocks.1.mlp.fc1 must store its weight")

    model = build("vit")
    model.blocks[2].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    refused(model, ae.AloreConfig(layers=[0]), "the weight of blocks.0.mlp.fc1 is used in several places")

    model = build("vit")
    model.blocks[2].norm1 = model.blocks[0].norm1
    refused(model, ae.AloreConfig(), "blocks.0.norm1 is registered in several places")

    model = build("vit")
    norm = model.blocks[0].norm2
    norm.forward = partial(type(norm).forward, norm)
    refused(model, ae.AloreConfig(), "blocks.0.norm2 has its own forward")

    model = build("vit")
    model.blocks[0].norm1.register_parameter("up", nn.Parameter(torch.zeros(1)))
    refused(model, ae.AloreConfig(), "blocks.0.norm1 already has up")


@pytest.mark.parametrize(
    ("head", "text", "error"),
    [
        ("classifier", "head 'classifier' is no module of VisionTransformer", ValueError),
        ("blocks", "head 'blocks' contains the adapted layer blocks.0.norm1", ValueError),
        ("", "head '' is no module", ValueError),
        ((3,), "head must be a module's name or several, got 3", TypeError),
    ],
)
def test_heads_that_are_none(head, text, error):
    refused(build("vit"), ae.AloreConfig(), text, error, head=head)


def test_data_parallel_wrappers():
    refused(nn.DataParallel(build("vit")), ae.AloreConfig(), "use DistributedDataParallel around the patched model")


@pytest.mark.parametrize("config", [ae.AloreConfig(), ae.MlaeConfig()], ids=["alore", "mlae"])
@pytest.mark.parametrize("name", ["vit", "beit"])
@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_failure_midway_is_undone(name, config, failing_call, monkeypatch):
    """Whatever fails while layers are being changed (here: the n-th of them), all are put back."""
    from alore_ext.patching import attaching
    from alore_ext.patching.methods import alore, mlae

    real, calls = attaching.attach, []

    def flaky(*args):
        calls.append(1)
        if len(calls) == failing_call:
            raise MemoryError("no room")
        real(*args)

    for module in (attaching, alore, mlae):
        monkeypatch.setattr(module, "attach", flaky)
    refused(build(name), config, "no room", MemoryError)


def test_failure_while_freezing_is_undone(monkeypatch):
    def broken(self, name):
        if name == "head.weight":  # by then the rest of the backbone is frozen
            raise RuntimeError("broken")
        return False

    monkeypatch.setattr(apply.PatchState, "is_head", broken)
    refused(build("vit"), ae.AloreConfig(), "broken", RuntimeError)


@pytest.mark.parametrize("call", [ae.unpatch, ae.merge_, ae.unmerge_, ae.merge_and_unload, ae.adapter_state_dict])
def test_calls_on_a_plain_model(call):
    model = build("vit")
    before = snapshot(model)
    with pytest.raises(ValueError, match="VisionTransformer is not patched"):
        call(model)
    assert_unchanged(model, before)
    wrapper = nn.Sequential(ae.patch(model, ae.AloreConfig()))
    with pytest.raises(ValueError, match="Sequential is not patched; its submodule '0' is"):
        call(wrapper)


def test_a_layer_replaced_after_patch_is_noticed():
    model = ae.patch(build("vit"), ae.AloreConfig())
    model.blocks[1].norm1 = nn.LayerNorm(32)
    before = snapshot(model)
    for call in (ae.unpatch, ae.merge_):
        with pytest.raises(ValueError, match="blocks.1.norm1 is no longer the layer that was patched"):
            call(model)
        assert_unchanged(model, before)


@pytest.mark.parametrize("failing_call", [4, 5, 6])
def test_failure_at_an_attention_that_changes_with_its_linear_is_undone(failing_call, monkeypatch):
    """In a BEiT of three blocks the first three layers are the qkvs, the next three their attentions."""
    from alore_ext.patching import attaching
    from alore_ext.patching.methods import mlae

    real, calls = attaching.attach, []

    def flaky(*args):
        calls.append(1)
        if len(calls) == failing_call:
            raise MemoryError("no room")
        real(*args)

    for module in (attaching, mlae):
        monkeypatch.setattr(module, "attach", flaky)
    refused(build("beit"), ae.MlaeConfig(), "no room", MemoryError)
    assert len(calls) == failing_call


def test_a_convolution_that_is_no_map_of_pixels():
    from alore_ext.models import AsMlp

    model = AsMlp(16, (1,))
    conv = model.layers[0].blocks[0].mlp.fc1
    for field, value in (("padding", (1, 1)), ("stride", (2, 2))):
        before = getattr(conv, field)
        setattr(conv, field, value)
        refused(model, ae.AloreConfig(), r"layers.0.blocks.0.mlp.fc1 must be a 1x1 convolution of stride 1, padding 0")
        setattr(conv, field, before)
    ae.patch(model, ae.AloreConfig())
