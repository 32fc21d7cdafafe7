"""What demanding users do to an AdapterPool: calls that fail midway, modes that are on around it, hooks, odd files."""

import copy
import json
import shutil
import threading

import pytest
import timm
import torch
from backbones import relative_error
from pools import adapter_file, own_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO

import alore_ext as ae
from alore_ext.serving import AdapterPool
from alore_ext.serving.reload import AdapterDirectory

ROW = ZOO["vit"]


@pytest.fixture
def files(files, base, tmp_path):
    return files | {"seven": adapter_file(base, ae.AloreConfig(), tmp_path / "seven.safetensors", classes=7)}


@torch.no_grad()
def assert_serves(pool, base, path, name, x):
    """Both ways of running an adapter give what the adapter's own model gives."""
    expected = own_model(base, path)(x)
    assert relative_error(pool.predict(x, adapters=[name, None])[0], expected[0]) < 1e-5
    pool.activate(name)
    assert relative_error(pool.predict(x), expected) < 1e-5
    pool.deactivate()


class _Full:
    """Captured graphs with no memory left for another."""

    def capture(self, head):
        raise RuntimeError("out of memory")

    def keep(self, heads):
        pass

    def run(self, images, head):
        return None


def _no_factors(*_):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("where", ["graphs", "mixed"])
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replace"])
def test_an_add_that_fails_late_changes_nothing(base, files, where, replace, monkeypatch, device):
    """Neither way of running an adapter may know one that the other does not."""
    pool, x = AdapterPool(copy.deepcopy(base)), ROW.images(device)
    pool.add("a", files["alore"])
    with monkeypatch.context() as patched:
        if where == "graphs":
            patched.setattr(pool, "_graphs", _Full())
        else:
            patched.setattr("alore_ext.serving.mixed._factors", _no_factors)
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.add("a" if replace else "b", files["seven"], replace=replace)
    assert pool.names == ["a"] and pool.num_classes("a") == len(base(x)[0])
    assert_serves(pool, base, files["alore"], "a", x)
    pool.add("b", files["seven"])
    assert_serves(pool, base, files["seven"], "b", x)


def test_made_and_filled_under_inference_mode(base, files, device):
    model, x = copy.deepcopy(base), ROW.images(device)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="cls_token was made under torch.inference_mode"):
            AdapterPool(copy.deepcopy(base))
        pool = AdapterPool(model, dtype=torch.float64)
        for name in ("alore", "seven"):
            pool.add(name, files[name])
        pool.activate("seven")
        inside = pool.predict(x)
    for name in ("alore", "seven"):
        assert_serves(pool, base.double(), files[name], name, x.double())
    pool.activate("seven")
    assert torch.equal(pool.predict(x), inside)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(3, 3)), nn.Identity()], ids=["unknown", "no weights"])
def test_a_model_of_no_known_family_is_refused_at_once(model):
    with pytest.raises(ValueError, match=f"AdapterPool: .*{type(model).__name__}"):
        AdapterPool(model)
    assert model.training


def test_two_pools_on_one_model_are_refused(base, files, device):
    """Each would take the other's merged weights for the base's."""
    model, x = copy.deepcopy(base), ROW.images(device)
    pool = AdapterPool(model)
    with pytest.raises(ValueError, match="this VisionTransformer is in another pool, .* copy.deepcopy of the model"):
        AdapterPool(model)
    AdapterPool(copy.deepcopy(model))
    del pool
    again = AdapterPool(model)
    again.add("a", files["alore"])
    assert_serves(again, base, files["alore"], "a", x)


def test_a_model_put_in_training_mode_gives_no_answers(base, files, device):
    """They would be random where it has dropout."""
    pool, x = AdapterPool(copy.deepcopy(base)), ROW.images(device)
    pool.add("a", files["alore"])
    pool.activate("a")
    pool.model.train()
    with pytest.raises(ValueError, match="AdapterPool.predict: the model was put in training mode; call its eval"):
        pool.predict(x)
    pool.model.eval()
    assert_serves(pool, base, files["alore"], "a", x)


class _Recorder:
    """Has what cannot be copied, as trainers and loggers do."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls = 0

    def record(self, module, inputs, output):
        self.calls += 1


def test_hooks_that_are_methods_of_other_objects(base, files, device):
    recorder, x = _Recorder(), ROW.images(device)
    base.blocks[0].register_forward_hook(recorder.record)
    pool = AdapterPool(base)
    pool.add("a", files["alore"])
    for calls, adapter in enumerate((None, "a"), 1):
        pool.predict(x, adapter=adapter)
        assert recorder.calls == calls


def test_labels_that_are_not_the_classifiers_are_refused(base, files, tmp_path):
    with safe_open(files["seven"], "pt") as file:
        metadata = file.metadata()
    save_file(load_file(files["seven"]), tmp_path / "a.safetensors", {**metadata, "labels": json.dumps(["x", "y"])})
    with pytest.raises(ValueError, match="a.safetensors: labels name 2 classes, expected .* the classifier's 7"):
        AdapterPool(base).add("a", tmp_path / "a.safetensors")


def test_labels_from_a_generator_are_refused(base, tmp_path):
    with pytest.raises(TypeError, match="save_adapter: labels must be a sequence of strings"):
        ae.save_adapter(ae.patch(base, ae.AloreConfig()), tmp_path / "a.safetensors", labels=(str(i) for i in range(5)))


def test_names_of_another_kind_are_named(base, files, device):
    pool, x = AdapterPool(copy.deepcopy(base)), ROW.images(device)
    pool.add("a", files["alore"])
    for call in (
        lambda: pool.predict(x, adapter=["a"]),
        lambda: pool.predict(x, adapters=[["a"], None]),
        lambda: pool.activate(["a"]),
    ):
        with pytest.raises(ValueError, match=r"unknown adapter \['a'\]; the pool has 'a'"):
            call()
    with pytest.raises(ValueError, match="adapters must name one adapter an image, got 5"):
        pool.predict(x, adapters=5)


def test_a_new_file_of_the_active_adapter_that_cannot_be_merged(base, files, tmp_path, device):
    """Its values are finite, the merged weights in float16 are not: the former adapter stays, and stays active."""
    folder, x = tmp_path / "folder", ROW.images(device)
    folder.mkdir()
    shutil.copy(files["seven"], folder / "a.safetensors")
    pool = AdapterPool(copy.deepcopy(base), dtype=torch.float16)
    directory = AdapterDirectory(folder, pool)
    directory.reload()
    pool.activate("a")
    before = pool.predict(x), pool.predict(x, adapters=["a", None])[0]
    model = ae.patch(copy.deepcopy(base), ae.AloreConfig())
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            nn.init.constant_(parameter, 3e4)
    ae.save_adapter(model, folder / "a.safetensors")
    assert "holds NaN or infinity in torch.float16" in directory.reload().failed["a"]
    assert pool.names == ["a"] and pool.active == "a" and pool.num_classes("a") == 7
    after = pool.predict(x), pool.predict(x, adapters=["a", None])[0]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_config_beside_the_metadatas_is_refused(base, device):
    """It would take the place of the fingerprint too, and let an adapter of another base in."""
    torch.manual_seed(77)
    other = ae.adapter_state_dict(ae.patch(ROW.build(device), ae.AloreConfig()))
    own = ae.adapter_state_dict(ae.patch(copy.deepcopy(base), ae.AloreConfig()))
    pool = AdapterPool(base)
    for tensors in (other, own):
        with pytest.raises(ValueError, match="AdapterPool.add: 'a': the state dict's metadata hold its config, .* got"):
            pool.add("a", tensors, config=ae.AloreConfig())
    with pytest.raises(ValueError, match="was trained on another base"):
        pool.add("a", other)
    assert len(pool) == 0
    pool.add("a", dict(other), config=ae.AloreConfig())  # it says nothing of its base


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 32, 32), r"images must be \[batch, 3, height, width\], got \[2, 1, 32, 32\]"),
        ((3, 32, 32), r"images must be \[batch, 3, height, width\], got \[3, 32, 32\]"),
        ((2, 3, 0, 32), r"images must be \[batch, 3, height, width\], got \[2, 3, 0, 32\]"),
        ((2, 3, 64, 64), r"the model does not take images of 64x64: Input height \(64\) doesn't match model"),
    ],
)
def test_images_of_another_shape(base, files, shape, message, device):
    pool, x = AdapterPool(copy.deepcopy(base)), torch.randn(*shape, device=device)
    pool.add("a", files["alore"])
    for call in (
        lambda: pool.predict(x),
        lambda: pool.predict(x, adapter="a"),
        lambda: pool.predict(x, adapters=["a", None][: len(x)] + [None] * (len(x) - 2)),
    ):
        with pytest.raises(ValueError, match=f"AdapterPool.predict: {message}"):
            call()
    with pytest.raises(ValueError, match=f"AdapterPool.merge_report: {message}"):
        pool.merge_report("a", x)
    with pytest.raises(TypeError, match="AdapterPool.merge_report: images must be a floating-point tensor, got list"):
        pool.merge_report("a", [x])
    assert_serves(pool, base, files["alore"], "a", ROW.images(device))


def test_arguments_of_capture_are_named(base, device):
    pool = AdapterPool(base)
    for sizes in (5, "12", [1.0], []):
        with pytest.raises(ValueError, match="batch_sizes must be integers of at least 1, got"):
            pool.capture(sizes)
    with pytest.raises(TypeError, match="AdapterPool.capture: example_image must be a floating-point tensor, got int"):
        pool.capture([1], 5)
    with pytest.raises(ValueError, match=r"AdapterPool.capture: example_image must be \[batch, 3, height, width\]"):
        pool.capture([1], ROW.images(device)[:, :1])
    nameless = ZOO["convnext"].build(device)
    with pytest.raises(ValueError, match="AdapterPool.capture: ConvNeXt does not say .*; give example_image="):
        AdapterPool(nameless).capture([1])


def test_images_of_as_many_channels_as_the_model_takes(device):
    base = timm.create_model("test_vit", img_size=32, in_chans=1, num_classes=3).to(device).eval()
    pool = AdapterPool(base)
    assert pool.predict(torch.randn(2, 1, 32, 32, device=device)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"must be \[batch, 1, height, width\], got \[2, 3, 32, 32\]"):
        pool.predict(ROW.images(device))


def test_answers_under_autocast_are_the_pools(base, files, device):
    pool, x = AdapterPool(copy.deepcopy(base)), ROW.images(device)
    pool.add("a", files["alore"])
    expected = pool.predict(x, adapter="a")
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(pool.predict(x, adapter="a"), expected)
        assert pool.predict(x, adapters=["a", None])[1].dtype == torch.float32
        pool.activate("a")
        assert relative_error(pool.predict(x), expected) < 1e-5
        assert pool.merge_report("a", x).logit_difference < 1e-5
