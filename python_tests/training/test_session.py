"""What a run sets up around itself: device, determinism, and results on disk."""

import json
import os

import pytest
import torch

import alore_ext
from alore_ext.training.errors import InputError, require
from alore_ext.training.recipe import default_recipe
from alore_ext.training.session import MergeCheck, Result, Settings, deterministic, pick_device


def test_auto_takes_cuda_only_with_kernels(monkeypatch):
    for gpu, kernels, expected in ((True, True, "cuda"), (True, False, "cpu"), (False, True, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(alore_ext, "build_info", lambda kernels=kernels: {"cuda_kernels": kernels})
        assert pick_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["tpu0", "", "cuda:99", "meta"])
def test_device_that_is_not_there(name):
    with pytest.raises(InputError, match="^--device"):
        pick_device(name)


def test_deterministic_is_undone():
    before = torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
        raise KeyError
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_settings_round_trip_through_json():
    settings = Settings("alore", "m", "d", default_recipe("alore"), locations=("before_attn",), rank=3)
    stored = json.loads(json.dumps(settings.to_dict() | {"class_names": ["a"]}))
    assert Settings.from_dict(stored) == settings


def test_result_is_read_back(tmp_path):
    assert Result.read(tmp_path) is None
    values = {
        "method": "alore",
        "trainable": 5,
        "trainable_head": 2,
        "total": 9,
        "accuracy": 0.5,
        "split": "test",
        "seconds": 1.0,
        "file": "adapter.safetensors",
        "file_bytes": 7,
        "merge": {
            "max_logit_difference": 0.0,
            "max_logit": 1.0,
            "accuracy_unmerged": 0.5,
            "accuracy_merged": 0.5,
            "changed_predictions": 0,
        },
    }
    (tmp_path / "result.json").write_text(json.dumps(values))
    assert Result.read(tmp_path).merge == MergeCheck(0.0, 1.0, 0.5, 0.5, 0)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(InputError, match=r"result\.json is damaged"):
        Result.read(tmp_path)


def test_require_names_the_extra_and_passes_other_failures_on(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"needs not_a_package: pip install 'alore_ext\[demo\]'"):
        require("not_a_package.part")
    (tmp_path / "broken_package.py").write_text("import something_it_lacks")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_lacks"):
        require("broken_package")
