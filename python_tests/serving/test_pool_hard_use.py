"""What demanding users do to an AdapterPool: calls that fail midway, modes that are on around it, hooks, odd files."""

import copy
import json
import shutil
import threading

import pytest
import torch
from backbones import relative_error
from pools import CONFIGS, adapter_file, own_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO

import alore_ext as ae
from alore_ext.serving import AdapterPool
from alore_ext.serving.reload import AdapterDirectory

ROW = ZOO["vit"]


@pytest.fixture
def base(device):
    return ROW.build(device)


@pytest.fixture
def files(base, tmp_path):
    made = {name: adapter_file(base, make(ROW), tmp_path / f"{name}.safetensors") for name, make in CONFIGS.items()}
    return made | {"seven": adapter_file(base, ae.AloreConfig(), tmp_path / "seven.safetensors", classes=7)}


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
