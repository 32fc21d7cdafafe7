"""alore-ext merge: a plain state dict that needs nothing but timm."""

import json
import re

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import accuracy_printed, result_of

from alore_ext.cli import main
from alore_ext.training.data import load_data
from alore_ext.training.images import normalize


@pytest.mark.parametrize("method", ["alore", "mlae"])
def test_merged_file_loads_in_timm_and_agrees(finished, task, tmp_path, capsys, method):
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", "--adapter", str(finished / method / "adapter.safetensors"), "--output", str(merged)]) == 0
    out = capsys.readouterr().out
    assert "3 classes" in out
    assert float(re.search(r"largest logit difference ([\d.e+-]+)", out)[1]) < 1e-4
    with safe_open(merged, "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == ["0", "1", "2"]

    plain = timm.create_model("test_vit", num_classes=3, img_size=32)
    assert load_file(merged).keys() == plain.state_dict().keys()
    plain = timm.create_model("test_vit", num_classes=3, img_size=32, checkpoint_path=str(merged)).eval()
    test = load_data(task).splits["test"]
    config = json.loads((finished / method / "config.json").read_text())["input"]
    with torch.no_grad():
        logits = plain(normalize(test.images.float(), tuple(config["mean"]), tuple(config["std"])))
    accuracy = (logits.argmax(1) == test.labels).sum().item() / len(test)
    assert accuracy == result_of(finished / method)["accuracy"]

    capsys.readouterr()
    assert main(["evaluate", "--model", "test_vit", "--weights", str(merged), "--img-size", "32", "--data", task]) == 0
    assert accuracy_printed(capsys) == round(100 * accuracy, 2)


def test_merge_in_half_precision(moved, tmp_path):
    adapter, base = moved
    merged = tmp_path / "half.safetensors"
    assert (
        main(
            [
                "merge",
                "--adapter",
                str(adapter),
                "--model",
                "test_vit",
                "--weights",
                str(base),
                "--img-size",
                "32",
                "--output",
                str(merged),
                "--dtype",
                "bf16",
            ]
        )
        == 0
    )
    state = load_file(merged)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert state["head.weight"].shape == (3, 64)


def test_merge_errors(moved, finished, tmp_path, fails):
    adapter, base = moved
    known = ("--model", "test_vit", "--weights", base, "--img-size", "32")
    run = finished / "alore" / "adapter.safetensors"
    out = tmp_path / "m.safetensors"
    assert "must end in .safetensors" in fails("merge", "--adapter", run, "--output", tmp_path / "m.pth")
    assert "there is no folder" in fails("merge", "--adapter", run, "--output", tmp_path / "no" / out.name)
    assert "does not exist" in fails("merge", "--adapter", tmp_path / "none", "--output", out)
    assert "--model NAME is needed" in fails("merge", "--adapter", adapter, "--output", out)
    line = fails("merge", "--adapter", adapter, "--model", "test_vit", "--output", out)
    assert line == "--model test_vit: give --pretrained or --weights FILE"
    assert "not an adapter file" in fails("merge", "--adapter", base, *known, "--output", out)
    truncated = tmp_path / "half.safetensors"
    truncated.write_bytes(adapter.read_bytes()[:-100])
    assert "truncated" in fails("merge", "--adapter", truncated, *known, "--output", out)
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(base).items()}, other)
    line = fails(
        "merge",
        "--adapter",
        adapter,
        "--model",
        "test_vit",
        "--weights",
        other,
        "--img-size",
        "32",
        "--output",
        out,
    )
    assert "trained on another base" in line
    assert not out.exists()
    out.write_text("precious")
    assert "exists (--overwrite replaces it)" in fails("merge", "--adapter", run, "--output", out)
    assert out.read_text() == "precious"
