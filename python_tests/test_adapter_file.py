"""What an adapter file may say of its classes."""

import pytest
import torch
from backbones import build
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alore_ext as ae
from alore_ext.adapter_file import read_adapter


def test_labels_that_utf_8_cannot_hold_are_refused(tmp_path):
    """JSON lets half of a surrogate pair through; an answer that holds one cannot be sent."""
    model = ae.patch(build("vit"), ae.AloreConfig())
    names = [f"class {i}" for i in range(model.num_classes)]
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"save_adapter: labels must be text that UTF-8 can hold, got '\\ud800'"):
        ae.save_adapter(model, path, labels=["\ud800", *names[1:]])
    assert not path.exists()
    ae.save_adapter(model, path, labels=["ü 😀", *names[1:]])
    assert read_adapter(path).labels == ("ü 😀", *names[1:])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["labels"] = metadata["labels"].replace("class 1", "\\ud800")
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match=r"a.safetensors: damaged metadata: .*UTF-8 can hold, got '.*ud800'"):
        read_adapter(path)
    assert torch.equal(load_file(path)["head.bias"], model.head.bias)
