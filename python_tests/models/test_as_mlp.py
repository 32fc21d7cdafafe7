"""AS-MLP: parameters, names and values against the architecture written out once more, and the checkpoints' layout."""

import collections
import copy
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from processes import environment

from alore_ext import reference
from alore_ext.models import AsMlp, as_mlp_base, as_mlp_small, as_mlp_tiny, load_as_mlp_checkpoint

SIZES = {as_mlp_tiny: 28_282_696, as_mlp_small: 49_594_696, as_mlp_base: 87_752_808}
DROP_PATH = {as_mlp_tiny: 0.2, as_mlp_small: 0.3, as_mlp_base: 0.5}


def small(num_classes=5, **options):
    """Two blocks in one stage, an embedding that five groups do not divide, weights away from their start."""
    model = AsMlp(16, (1, 2, 1), num_classes, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.add_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model


def images(device="cpu", dtype=torch.float32, batch=2):
    """For `small`: sides in multiples of 16, not square."""
    return torch.randn(batch, 3, 48, 32, generator=torch.Generator().manual_seed(4)).to(device, dtype)


def plain_forward(state, x, depths):
    """The architecture over a state dict, in functions of torch and the reference's shift."""

    def norm(x, name):
        return F.group_norm(x, 1, state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    x = norm(conv(x, "patch_embed.proj", stride=4), "patch_embed.norm")
    for stage, depth in enumerate(depths):
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            shift = f"{block}.axial_shift"
            y = F.gelu(norm(conv(norm(x, f"{block}.norm1"), f"{shift}.conv1"), f"{shift}.norm1"))
            lr = F.gelu(conv(reference.axial_shift(y, 5, 3), f"{shift}.conv2_1"))
            td = F.gelu(conv(reference.axial_shift(y, 5, 2), f"{shift}.conv2_2"))
            x = x + conv(norm(lr + td, f"{shift}.norm2"), f"{shift}.conv3")
            x = x + conv(F.gelu(conv(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        if stage < len(depths) - 1:
            down = f"layers.{stage}.downsample"
            corners = [x[..., 0::2, 0::2], x[..., 1::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 1::2]]
            x = conv(norm(torch.cat(corners, 1), f"{down}.norm"), f"{down}.reduction")
    return F.linear(norm(x, "norm").mean((2, 3)), state["head.weight"], state["head.bias"])


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("make", SIZES, ids=lambda f: f.__name__)
def test_parameter_counts_and_depth_rates(make):
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == SIZES[make]
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, DROP_PATH[make], len(rates)).tolist(), abs=1e-6)
    with torch.device("meta"):
        assert not any(hasattr(m, "drop_prob") for m in make(drop_path_rate=0.0).modules())


def test_names_and_shapes_are_the_checkpoints():
    """FACTS section 3, name by name."""
    with torch.device("meta"):
        state = {name: list(value.shape) for name, value in as_mlp_tiny().state_dict().items()}
    expected = {"patch_embed.proj.weight": [96, 3, 4, 4], "patch_embed.proj.bias": [96]}
    norms = {"patch_embed.norm": 96, "norm": 768}
    for stage, depth in enumerate((2, 2, 6, 2)):
        d = 96 * 2**stage
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            norms |= {f"{block}.{n}": d for n in ("norm1", "norm2", "axial_shift.norm1", "axial_shift.norm2")}
            convs = {f"axial_shift.{c}": (d, d) for c in ("conv1", "conv2_1", "conv2_2", "conv3")}
            convs |= {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
            for name, (rows, columns) in convs.items():
                expected[f"{block}.{name}.weight"] = [rows, columns, 1, 1]
                expected[f"{block}.{name}.bias"] = [rows]
        if stage < 3:
            norms[f"layers.{stage}.downsample.norm"] = 4 * d
            expected[f"layers.{stage}.downsample.reduction.weight"] = [2 * d, 4 * d, 1, 1]
    expected |= {f"{name}.{kind}": [size] for name, size in norms.items() for kind in ("weight", "bias")}
    expected |= {"head.weight": [1000, 768], "head.bias": [1000]}
    assert state == expected


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_forward_and_gradients_against_plain_torch(memory_format, device):
    model = small().double().to(device, memory_format=memory_format).eval()
    x = images(device, torch.float64).contiguous(memory_format=memory_format)
    plain = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits, expected = model(x), plain_forward(plain, x, (1, 2, 1))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected)
    grad = torch.randn_like(expected)
    logits.backward(grad)
    expected.backward(grad)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name].grad, msg=name)


def test_published_size_runs(device):
    model = as_mlp_tiny(num_classes=7).eval().to(device)
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 32, device=device)
        assert relative_error(model(x), plain_forward(model.state_dict(), x, (2, 2, 6, 2))) < 1e-3


def test_features_head_and_intermediates(device):
    model = small().to(device).eval()
    x = images(device)
    features = model.forward_features(x)
    assert features.shape == (2, 64, 3, 2) and model.num_features == model.head_hidden_size == 64
    torch.testing.assert_close(model.forward_head(features), model(x))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    final, maps = model.forward_intermediates(x, norm=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 12, 8), (32, 6, 4), (64, 3, 2)]
    assert [(m.shape[1], 48 // m.shape[2]) for m in maps] == [
        (info["num_chs"], info["reduction"]) for info in model.feature_info
    ]
    torch.testing.assert_close(final, features)
    torch.testing.assert_close(maps[-1], features)
    for indices, kept in ((1, [2]), (0, []), ([0, -2], [0, 1]), ([-3], [0])):
        for stop_early in (False, True):
            options = {"stop_early": stop_early, "intermediates_only": True}
            some = model.forward_intermediates(x, indices, norm=True, **options)
            assert len(some) == len(kept)
            for got, index in zip(some, kept, strict=True):
                torch.testing.assert_close(got, maps[index])
    last = model.forward_intermediates(x, [0], stop_early=True)[0]
    torch.testing.assert_close(last, maps[0])
    for bad, says in (([3], "there are stages 0 to 2, got index 3"), (4, "at most 3.*got 4"), (-1, "got -1")):
        with pytest.raises(ValueError, match=says):
            model.forward_intermediates(x, bad)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_classifier(device):
    model = small().to(device, torch.bfloat16)
    model.reset_classifier(9)
    assert model.get_classifier().weight.shape == (9, 64) and model.num_classes == 9
    assert model.head.weight.dtype == torch.bfloat16 and model.head.weight.device.type == device.type
    assert model.head.weight.float().std() < 0.03
    assert model(images(device, torch.bfloat16)).shape == (2, 9)
    model.reset_classifier(0)
    assert model(images(device, torch.bfloat16)).shape == (2, 64)
    model.reset_classifier(0, global_pool="")
    assert model(images(device, torch.bfloat16)).shape == (2, 64, 3, 2)
    for arguments, says in (((5,), "no classifier; got num_classes=5"), ((5, "max"), '"avg" or "", got \'max\'')):
        with pytest.raises(ValueError, match=says):
            model.reset_classifier(*arguments)
    assert model.num_classes == 0 and isinstance(model.head, torch.nn.Identity)


@pytest.mark.parametrize("shape", [(1, 3, 48, 40), (1, 3, 50, 32), (3, 48, 32)], ids=str)
def test_images_that_do_not_halve_are_refused(shape):
    with pytest.raises(ValueError, match=r"multiples of 16.*got \["):
        small()(torch.zeros(shape))


def test_bad_arguments():
    for options, says in (
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"drop_rate": -0.1}, r"drop_rate must be in \[0, 1\), got -0.1"),
        ({"shift_size": 0}, "shift_size must be at least 1, got 0"),
        ({"global_pool": "max"}, "global_pool"),
    ):
        with pytest.raises(ValueError, match=says):
            AsMlp(16, (1, 1), **options)


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean(device):
    from alore_ext.models.as_mlp import DropPath

    x = torch.rand(4000, 2, 1, 1, device=device) + 1
    drop = DropPath(0.3)
    y = drop(x)
    kept = y != 0
    assert torch.equal(kept[:, 0], kept[:, 1]) and 0.25 < 1 - kept.float().mean() < 0.35
    torch.testing.assert_close(y[kept], (x / 0.7)[kept])
    assert torch.equal(drop.eval()(x), x)


@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def test_grad_checkpointing_is_exact(device):
    """The same bits, with stochastic depth; and what lies inside the blocks is not kept."""
    results, kept = [], []
    for enable in (False, True):
        torch.manual_seed(6)
        model = small(drop_path_rate=0.5).to(device).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(7)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            loss = model(images(device)).square().sum()
        kept.append(sum(saved))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert kept[1] < kept[0] / 2


def test_compile(device):
    torch._dynamo.reset()
    model = small().to(device).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(device)
    torch.testing.assert_close(compiled(x), model(x))
    model.zero_grad()
    compiled(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for a, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, parameter.grad)


def test_export(device):
    model = small().to(device).eval()
    program = torch.export.export(model, (images(device),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("alore_ext.axial_shift_pair.default") == 4
    x = images(device, batch=3)
    torch.testing.assert_close(program.module()(x), model(x))


def test_autocast(device):
    model, x = small().to(device).eval(), images(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, model(x)) < 0.05
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_timm_groups_layers():
    timm_models = pytest.importorskip("timm.models")
    model = small()
    groups = timm_models.group_parameters(model, model.group_matcher())
    assert list(groups) == [0, 1, 2, 3, 4, 5]  # stem, four blocks, head
    assert {n.split(".")[0] for n in groups[0]} == {"patch_embed"} and set(groups[5]) == {"head.weight", "head.bias"}
    assert "layers.0.downsample.reduction.weight" in groups[1] and "norm.weight" in groups[4]
    assert list(timm_models.group_parameters(model, model.group_matcher(coarse=True))) == [0, 1, 2, 3, 4]
    assert model.no_weight_decay() == set()


def test_deepcopy_and_pickle(device):
    model = small().to(device).eval()
    x = images(device)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))


def test_models_need_no_timm(tmp_path):
    code = "import sys; sys.modules['timm'] = None; from alore_ext.models import AsMlp; AsMlp(8, (1,))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment())


class TestCheckpoints:
    @pytest.fixture
    def trained(self):
        return small().eval()

    @pytest.mark.parametrize("kind", ["model", "plain", "ordered", "safetensors"])
    def test_round_trip(self, kind, trained, tmp_path):
        state, path = trained.state_dict(), tmp_path / "weights.pth"
        if kind == "safetensors":
            path = path.with_suffix(".safetensors")
            safetensors.torch.save_file(state, path)
        else:
            content = {
                "model": {"model": dict(state), "epoch": 299, "lr_scheduler": {"last_epoch": 3}, "max_accuracy": 81.3},
                "plain": dict(state),
                "ordered": collections.OrderedDict(state),
            }[kind]
            torch.save(content, path)
        model = AsMlp(16, (1, 2, 1), 5)
        assert load_as_mlp_checkpoint(model, path) is model
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        load_as_mlp_checkpoint(half := AsMlp(16, (1, 2, 1), 5).bfloat16(), str(path))
        assert torch.equal(half.head.weight, state["head.weight"].bfloat16())

    @staticmethod
    def refused(path, model=None):
        model = model or AsMlp(16, (1, 2, 1), 5)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError) as caught:
            load_as_mlp_checkpoint(model, path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return str(caught.value)

    def test_pickled_config(self, trained, tmp_path):
        """As the training script of the published models saves it: a yacs CfgNode under 'config'."""
        path = tmp_path / "as_mlp.pth"
        torch.save({"model": trained.state_dict(), "config": Config(lr=1.0)}, path)
        message = self.refused(path)
        assert f"a pickled {Config.__module__}.Config" in message and "would run code" in message
        recipe = [line[4:] for line in message.splitlines() if line.startswith("    ")]
        names = {"torch": torch, "safetensors": safetensors}
        exec("\n".join(recipe).replace('"as_mlp.', f'"{tmp_path}/as_mlp.'), names)  # the advice works
        model = load_as_mlp_checkpoint(AsMlp(16, (1, 2, 1), 5), tmp_path / "as_mlp.safetensors")
        assert torch.equal(model.head.weight, trained.head.weight)

    def test_another_number_of_classes(self, trained, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save({"model": trained.state_dict()}, path)
        message = self.refused(path, AsMlp(16, (1, 2, 1), 9))
        assert "has a head of 5 classes, the model a head of 9 classes" in message
        assert "num_classes=5, then call reset_classifier(9)" in message
        assert "the model no head" in self.refused(path, AsMlp(16, (1, 2, 1), 0))

    def test_another_size(self, trained, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save({"model": trained.state_dict()}, path)
        assert "layers.0.blocks.1" in self.refused(path, AsMlp(16, (2, 2, 1), 5))
        message = self.refused(path, AsMlp(24, (1, 2, 1), 5))
        assert "first head.weight: expected [5, 96], got [5, 64]" in message

    def test_not_a_state_dict(self, tmp_path):
        path = tmp_path / "weights.pth"
        for content, says in (
            ({"epoch": 3, "optimizer": {}}, "the entries ['epoch', 'optimizer']"),
            (torch.zeros(3), "a Tensor"),
            ({}, "the entries []"),
        ):
            torch.save(content, path)
            assert says in self.refused(path)

    def test_damaged(self, trained, tmp_path):
        whole = tmp_path / "whole.pth"
        torch.save({"model": trained.state_dict()}, whole)
        for name, content in (
            ("half.pth", whole.read_bytes()[:5000]),
            ("empty.pth", b""),
            ("text.pth", b"not a checkpoint"),
            ("text.safetensors", b"not a checkpoint"),
        ):
            path = tmp_path / name
            path.write_bytes(content)
            assert str(path) in self.refused(path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file .*none.pth"):
            load_as_mlp_checkpoint(small(), tmp_path / "none.pth")


class Config(dict):
    """Stands for yacs' CfgNode: a dict of a class of its own."""

    def __init__(self, **values):
        super().__init__(values)
