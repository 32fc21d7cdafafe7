"""Exported files compute what the merged model computes, need nothing of this package, and leave the model alone."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import timm
import torch
from backbones import CLASSES, assert_same_bits, assert_unchanged, build, relative_error, snapshot, train_adapters_
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from zoo import ZOO, Row, every_row, logits

import alore_ext as ae
from alore_ext import exporting
from alore_ext._example_images import example_images

# Together one of each way to compute attention, of each library, and of each family: a graph takes seconds. That every
# row can be traced at all is tested in patching/test_library_features.py.
ONNX_ROWS = ("eva02_base", "beit", "swin", "convnextv2", "as_mlp", "torchvision_vit", "hf_dinov2_swiglu")
PROGRAM_ROWS = (
    "vit",
    "deit_distilled",
    "swinv2",
    "torchvision_swin_v2",
    "torchvision_convnext",
    "hf_vit",
    "hf_deit_distilled",
    "hf_beit",
    "hf_swin",
    "hf_convnextv2",
)


def merged(row: Row, device="cpu", dtype=torch.float32, config=None) -> nn.Module:
    model = train_adapters_(ae.patch(row.build(device, dtype), config or ae.AloreConfig()))
    return ae.merge_(model)


def run_onnx(file: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.cpu().numpy()})[0]).to(x.device)


@pytest.mark.parametrize("name", PROGRAM_ROWS)
def test_torch_export(name, tmp_path, device):
    row = ZOO[name]
    model = merged(row, device)
    x = row.images(device)
    before, generator = snapshot(model), torch.get_rng_state()
    path = ae.export(model, tmp_path / "m.pt2", example_input=x, check=False)  # the check is below
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(tmp_path.iterdir()) == [path]
    program = torch.export.load(path)
    assert not any("alore_ext" in str(node.target) for node in program.graph.nodes)
    network = program.module()
    with torch.no_grad():
        for batch in (1, 5):
            x = row.images(device, batch=batch)
            assert relative_error(network(x), logits(model, x)) < 1e-5


@pytest.mark.parametrize("name", ONNX_ROWS)
def test_onnx(name, tmp_path, device):
    row = ZOO[name]
    model = merged(row, device, config=ae.MlaeConfig())
    before = snapshot(model)
    path = ae.export(model, tmp_path / "m.onnx", "onnx", example_input=row.images(device))
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == [path]
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    with torch.no_grad():
        for batch in (1, 5):
            x = row.images(device, batch=batch)
            assert relative_error(run_onnx(path, x), logits(model, x)) < 1e-5


@every_row
def test_state_dict_loads_into_the_original_class(row: Row, tmp_path, device):
    model = merged(row, device)
    before = snapshot(model)
    path = ae.export(model, tmp_path / "m.safetensors", "state-dict")
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == [path]
    fresh = row.make(CLASSES).to(device).eval()
    fresh.load_state_dict(load_file(path), strict=True)
    for (key, buffer), (_, old) in zip(fresh.named_buffers(), model.named_buffers(), strict=True):
        buffer.copy_(old) if key.endswith("k_bias") else None  # not persistent, and randomised by the test
    x = row.images(device)
    with torch.no_grad():
        assert torch.equal(logits(fresh, x), logits(model, x))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["alore_ext"] == ae.__version__
    assert metadata["class"] == f"{type(model).__module__}.{type(model).__qualname__}"


_ELSEWHERE = """
import sys
for package in ("alore_ext", "timm", "transformers", "torchvision"):
    sys.modules[package] = None
import torch
torch.backends.cudnn.allow_tf32 = False
for name in sys.argv[1:]:
    images, logits = torch.load(f"{name}.pt")
    extra = {"class": ""}
    network = torch.export.load(f"{name}.pt2", extra_files=extra).module()
    assert extra["class"], name
    torch.testing.assert_close(network(images), logits, rtol=0, atol=1e-5)
print("agree", *sys.argv[1:])
"""


def test_a_program_needs_torch_alone(tmp_path, device):
    names = ["as_mlp", "hf_vit"]
    for name in names:
        row = ZOO[name]
        model, x = merged(row, device), row.images(device, batch=5)
        ae.export(model, tmp_path / f"{name}.pt2", example_input=row.images(device), check=False)
        with torch.no_grad():
            torch.save((x, logits(model, x)), tmp_path / f"{name}.pt")
    command = [sys.executable, "-I", "-c", _ELSEWHERE, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["agree", *names], done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_program_keeps_the_dtype(dtype, tmp_path, device):
    row = ZOO["vit"]
    model = merged(row, device, dtype)
    network = torch.export.load(ae.export(model, tmp_path / "m.pt2")).module()
    x = row.images(device, dtype, batch=3)
    with torch.no_grad():
        assert network(x).dtype == dtype and relative_error(network(x), model(x)) < 1e-2


def test_onnx_in_float16(tmp_path):
    model = merged(ZOO["vit"], dtype=torch.float16)
    path = ae.export(model, tmp_path / "m.onnx", "onnx")
    x = ZOO["vit"].images(dtype=torch.float16, batch=3)
    with torch.no_grad():
        assert run_onnx(path, x).dtype == torch.float16 and relative_error(run_onnx(path, x), model(x)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_onnx_that_cannot_be_checked(dtype, tmp_path):
    model = merged(ZOO["vit"], dtype=dtype)
    with pytest.raises(ValueError, match="onnxruntime's CPU kernels take float32 and float16, so the file cannot be"):
        ae.export(model, tmp_path / "m.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []
    if dtype is torch.bfloat16:
        path = ae.export(model, tmp_path / "m.onnx", "onnx", check=False)
        assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_onnx_weights_beside_the_model(tmp_path, monkeypatch):
    """As for a model of over 1.5 GiB, in a file that exists already and one that does not."""
    monkeypatch.setattr(exporting, "ONNX_ONE_FILE", 0)
    row = ZOO["vit"]
    model = merged(row)
    (tmp_path / "m.onnx").write_text("of before")
    path = ae.export(model, tmp_path / "m.onnx", "onnx", opset=18)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx.data").stat().st_size > 100_000
    x = row.images()
    with torch.no_grad():
        assert relative_error(run_onnx(path, x), model(x)) < 1e-5
    assert [entry.version for entry in onnx.load(path).opset_import] == [18]


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_example_of_one_image(dynamic, tmp_path):
    """torch takes a size of 1 for a constant, so that the batch would not be free."""
    model = Returns(lambda x, w: x @ w)
    path = ae.export(model, tmp_path / "m.pt2", example_input=IMAGES[:1], dynamic_batch=dynamic)
    network = torch.export.load(path).module()
    assert network(IMAGES[:1]).shape == (1, CLASSES)
    if dynamic:
        assert network(IMAGES).shape == (2, CLASSES)
    else:
        with pytest.raises(AssertionError, match="Guard failed"):
            network(IMAGES)


class Normalised(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.inner(self.drop(x) / 0.25 - 2.0)


@pytest.mark.parametrize("fold", [ae.merge_, ae.merge_and_unload])
def test_within_another_module_in_training_mode(fold, tmp_path, device):
    """Graphs are of eval mode, whatever mode the model is in, under no_grad or inference_mode; gradients survive."""
    row = ZOO["vit_drop_path"]
    inner = train_adapters_(ae.patch(row.build(device).train(), ae.AloreConfig()))
    model = Normalised(fold(inner))
    model.training = model.drop.training = True
    assert inner.training is (fold is ae.merge_and_unload)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = snapshot(model)
    with torch.inference_mode():
        path = ae.export(model, tmp_path / "m.pt2", example_input=row.images(device))
    assert_unchanged(model, before)
    assert next(model.parameters()).grad.sum() > 0
    network, x = torch.export.load(path).module(), row.images(device)
    assert not network(x).requires_grad
    with torch.no_grad():
        assert relative_error(network(x), inner.eval()(x / 0.25 - 2.0)) < 1e-5


def test_a_model_without_adapters(tmp_path):
    row = ZOO["torchvision_vit"]
    model = row.build()
    assert ae.export(model, str(tmp_path / "m.pt2")) == tmp_path / "m.pt2"


class Tied(nn.Module):
    """What safetensors refuses as it is: tied, strided and shared tensors; and a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("view", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_tied_and_strided_tensors_in_a_state_dict(tmp_path):
    model = Tied()
    assert not model.conv.weight.is_contiguous() and not model.view.is_contiguous()
    state = load_file(ae.export(model, tmp_path / "m.safetensors", "state-dict", metadata={"task": "pets"}))
    assert state.keys() == model.state_dict().keys() and "scratch" not in state
    for name, value in model.state_dict().items():
        assert_same_bits(state[name], value, name)
    Tied().load_state_dict(state, strict=True)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["task"] == "pets"


@pytest.mark.parametrize("format", exporting.SUFFIXES)
@pytest.mark.parametrize("kept", [False, True], ids=["patched", "retained"])
def test_an_unmerged_model_is_refused(format, kept, tmp_path):
    model = train_adapters_(ae.patch(build("vit"), ae.AloreConfig()))
    if kept:
        ae.retain_experts(model, keep=[0])
    before = snapshot(model)
    path = tmp_path / f"m{exporting.SUFFIXES[format]}"
    with pytest.raises(ValueError, match="VisionTransformer is patched and not merged; call merge_ or merge_and_unl"):
        ae.export(model, path, format)
    with pytest.raises(ValueError, match=r"the submodule 'inner' \(VisionTransformer\) is patched and not merged"):
        ae.export(Normalised(model), path, format)
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


class Returns(nn.Module):
    """A model whose forward is the given function of its images and its weight."""

    def __init__(self, function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.function = function

    def forward(self, x):
        return self.function(x.mean((2, 3)), self.weight)


def _with_own_operator(x, weight):
    return ae.ops.kron_linear(x @ weight, torch.ones(1, 1, 1), torch.ones(1, 5, 2), torch.ones(1, 2, 5))


def _by_value(x, weight):
    return x @ weight if x.sum() > 0 else x @ weight * 2


IMAGES = torch.ones(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("function", "options", "error", "text"),
    [
        (lambda x, w: (x @ w, x), {}, ValueError, "Returns returns a tuple; expected a tensor, or an output with lo"),
        (lambda x, w: SimpleNamespace(logits=None), {}, ValueError, "returns a SimpleNamespace; expected a tensor"),
        (lambda x, w: x @ w.T, {}, ValueError, r"Returns does not take an example_input of \[2, 3, 8, 8\]: mat1"),
        (lambda x, w: (x @ w).reshape(2, 5), {}, ValueError, "torch.export cannot trace Returns.*dynamic_batch=False"),
        (_by_value, {}, ValueError, "torch.export cannot trace Returns: .*data-dependent"),
        (_with_own_operator, {}, ValueError, "the graph holds alore_ext.kron_linear.default, which only alore_ext can"),
        (lambda x, w: x @ w * float("nan"), {}, ae.VerificationError, "differ from the model's by nan"),
        (lambda x, w: x @ w, {"tolerance": -1.0}, ValueError, "tolerance must be None or at least 0, got -1.0"),
        (lambda x, w: x @ w, {"opset": 18}, ValueError, "opset is for format 'onnx', got 18 with 'torch-export'"),
        (lambda x, w: x @ w, {"metadata": {"epoch": 3}}, TypeError, "metadata must be strings by strings, got 'epoch'"),
        (lambda x, w: x @ w, {"metadata": {"format": "np"}}, ValueError, "metadata: the key 'format' is reserved, as"),
        (lambda x, w: x @ w, {"metadata": {"class": "x"}}, ValueError, "metadata: the key 'class' is reserved, as"),
        (lambda x, w: x @ w, {"example_input": [1, 2]}, TypeError, "example_input must be a tensor of images, got lis"),
        (lambda x, w: x @ w, {"example_input": IMAGES[0]}, ValueError, r"\[batch, channels, height, width\], got \[3,"),
        (lambda x, w: x @ w, {"example_input": IMAGES[:0]}, ValueError, r"width\], got \[0, 3, 8, 8\]"),
        (lambda x, w: x @ w, {"example_input": None}, ValueError, "Returns does not say what size of image it takes"),
    ],
    ids=lambda value: None,
)
def test_what_is_refused(function, options, error, text, tmp_path):
    model = Returns(function)
    before = snapshot(model)
    with pytest.raises(error, match=f"^export: .*{text}"):
        ae.export(model, tmp_path / "m.pt2", **{"example_input": IMAGES, **options})
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_all_zero(tmp_path, monkeypatch):
    """As those of timm's models before their classifiers are trained."""
    model = Returns(lambda x, weight: x @ weight).eval()
    nn.init.zeros_(model.weight)
    path = ae.export(model, tmp_path / "m.pt2", example_input=IMAGES)
    assert not torch.export.load(path).module()(IMAGES).any()
    monkeypatch.setattr(torch.export, "load", lambda path: SimpleNamespace(module=lambda: lambda x: x.new_ones(2, 5)))
    with pytest.raises(ae.VerificationError, match="differ from the model's by inf of the largest"):
        ae.export(model, path, example_input=IMAGES, dynamic_batch=False)


@pytest.mark.parametrize(
    ("name", "format", "error", "text"),
    [
        ("m.pt2", "torchscript", ValueError, "format must be one of 'torch-export', 'onnx', 'state-dict', got 'torch"),
        ("m.onnx", "torch-export", ValueError, "a file of format 'torch-export' ends in .pt2, got .*m.onnx"),
        ("m.pth", "state-dict", ValueError, "a file of format 'state-dict' ends in .safetensors, got .*m.pth"),
        ("no/m.pt2", "torch-export", FileNotFoundError, "there is no folder .*no to write m.pt2 to"),
        ("folder.pt2", "torch-export", IsADirectoryError, "folder.pt2 is a folder"),
    ],
    ids=lambda value: None,
)
def test_where_it_cannot_be_written(name, format, error, text, tmp_path):
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(error, match=text):
        ae.export(build("vit"), tmp_path / name, format)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.pt2"] and not any((tmp_path / "folder.pt2").iterdir())


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: torch.compile(build("vit")), "OptimizedModule is a wrapper; export the model inside, model._orig_mod"),
        (lambda: nn.DataParallel(build("vit")), "DataParallel is a wrapper; export the model inside, model.module"),
        (lambda: build("vit", "meta"), "cls_token is on the meta device"),
    ],
    ids=["compiled", "parallel", "meta"],
)
def test_models_that_are_none(model, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        ae.export(model(), tmp_path / "m.safetensors", "state-dict")
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        ae.export("vit", tmp_path / "m.safetensors", "state-dict")


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_a_failed_check_keeps_the_file_of_before(format, tmp_path, monkeypatch):
    path = tmp_path / f"m{exporting.SUFFIXES[format]}"
    path.write_text("of before")
    model = Returns(lambda x, w: (x @ w).softmax(1))
    monkeypatch.setattr(torch.export, "load", lambda *args: SimpleNamespace(module=lambda: wrong))
    monkeypatch.setattr(exporting, "_onnxruntime", lambda *args: wrong)
    before = snapshot(model)
    with pytest.raises(ae.VerificationError, match=r"differ from the model's by [\d.e+-]+ of the largest, more than"):
        ae.export(model, path, format, example_input=IMAGES)
    assert_unchanged(model, before)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_text() == "of before"


def wrong(x: torch.Tensor) -> torch.Tensor:
    return torch.full((len(x), 5), 0.2)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"format 'onnx' needs {package}: pip install 'alore_ext\[export\]'"):
        ae.export(build("vit"), tmp_path / "m.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []
    if package == "onnxruntime":
        assert ae.export(Returns(torch.matmul), tmp_path / "m.onnx", "onnx", example_input=IMAGES, check=False).exists()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: timm.create_model("test_vit", img_size=64), [2, 3, 64, 64]),  # its weights were trained at 160
        (lambda: timm.create_model("test_vit"), [2, 3, 160, 160]),
        (lambda: timm.create_model("test_convnext", in_chans=1), [2, 1, 160, 160]),
        (lambda: ZOO["vit"].make(3).to(torch.bfloat16), [2, 3, 32, 32]),
        (lambda: ZOO["torchvision_vit"].make(3), [2, 3, 32, 32]),
        (lambda: ZOO["hf_swin"].make(3), [2, 3, 48, 48]),
        (lambda: ZOO["hf_convnext"].make(3), [2, 3, 224, 224]),
    ],
    ids=["timm built for", "timm", "timm channels", "timm class", "torchvision", "transformers", "transformers conv"],
)
def test_the_size_that_a_model_names(model, shape):
    model = model()
    images = example_images(model, None, "export")
    assert list(images.shape) == shape and images.dtype == next(model.parameters()).dtype
    assert torch.equal(images, example_images(model, None, "export"))
