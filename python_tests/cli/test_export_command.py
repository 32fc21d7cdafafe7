"""alore-ext export: graphs that need nothing of this package, with what a server has to know in their metadata."""

import json
import sys

import numpy
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import result_of

from alore_ext.cli import main
from alore_ext.training.data import load_data
from alore_ext.training.images import normalize


@pytest.fixture
def adapter(finished):
    return finished / "alore" / "adapter.safetensors"


def test_onnx_agrees_with_the_run(finished, adapter, task, tmp_path, capsys):
    file = tmp_path / "bars.onnx"
    assert main(["export", "--adapter", str(adapter), "--format", "onnx", "--opset", "18", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"exported {file}" in out and "3 classes" in out
    graph = onnx.load(file)
    entries = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(entries["class_names"]) == ["0", "1", "2"] and entries["model"] == "test_vit"
    assert [entry.version for entry in graph.opset_import] == [18]
    spec, test = json.loads(entries["input"]), load_data(task).splits["test"]
    assert spec["size"] == 32
    images = normalize(test.images.float(), tuple(spec["mean"]), tuple(spec["std"]))
    logits = onnxruntime.InferenceSession(file).run(["logits"], {"images": images.numpy()})[0]
    accuracy = (logits.argmax(1) == numpy.asarray(test.labels)).mean()
    assert accuracy == result_of(finished / "alore")["accuracy"]


@pytest.mark.parametrize(("options", "batch"), [((), 3), (("--batch-size", "1", "--dtype", "bf16"), 1)])
def test_torch_export_is_the_default(adapter, tmp_path, options, batch):
    file, extra = tmp_path / "bars.pt2", {"class_names": ""}
    assert main(["export", "--adapter", str(adapter), "--output", str(file), *options]) == 0
    program = torch.export.load(file, extra_files=extra)
    assert json.loads(extra["class_names"]) == ["0", "1", "2"]
    dtype = torch.bfloat16 if options else torch.float32
    assert program.module()(torch.randn(batch, 3, 32, 32, dtype=dtype)).shape == (batch, 3)
    if options:
        with pytest.raises(AssertionError, match="Guard failed"):
            program.module()(torch.randn(2, 3, 32, 32, dtype=dtype))


def test_state_dict_is_what_merge_writes(adapter, tmp_path):
    files = [tmp_path / "exported.safetensors", tmp_path / "merged.safetensors"]
    assert main(["export", "--adapter", str(adapter), "--format", "state-dict", "--output", str(files[0])]) == 0
    assert main(["merge", "--adapter", str(adapter), "--output", str(files[1])]) == 0
    exported, merged = map(load_file, files)
    assert exported.keys() == merged.keys() and all(torch.equal(exported[name], merged[name]) for name in merged)


def test_errors(adapter, tmp_path, fails):
    source = ("export", "--adapter", adapter)
    out = tmp_path / "bars.onnx"
    assert fails(*source, "--output", out) == f"--output must end in .pt2, got {out}"
    line = fails(*source, "--format", "onnx", "--dtype", "bf16", "--output", out)
    assert "onnxruntime's CPU kernels take float32 and float16" in line
    assert "opset must be from 1 to" in fails(*source, "--format", "onnx", "--opset", "99", "--output", out)
    line = fails(*source, "--opset", "18", "--output", tmp_path / "bars.pt2")
    assert "opset is for format 'onnx'" in line
    assert "at least 1, got 0" in fails(*source, "--batch-size", "0", "--output", tmp_path / "bars.pt2")
    line = fails(*source, "--format", "state-dict", "--batch-size", "2", "--output", tmp_path / "bars.safetensors")
    assert line == "--batch-size is for graphs, and a state dict is none"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_onnxruntime(adapter, tmp_path, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = fails("export", "--adapter", adapter, "--format", "onnx", "--output", tmp_path / "bars.onnx")
    assert "needs onnxruntime: pip install 'alore_ext[export]', or check=False" in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_exits_with_1(adapter, tmp_path, capsys, monkeypatch):
    load = torch.export.load

    def broken(file):
        program = load(file)
        program.state_dict["head.weight"].data.neg_()
        return program

    monkeypatch.setattr(torch.export, "load", broken)
    assert main(["export", "--adapter", str(adapter), "--output", str(tmp_path / "bars.pt2")]) == 1
    captured = capsys.readouterr()
    assert "differ from the model's by" in captured.err and captured.out == "" and list(tmp_path.iterdir()) == []
