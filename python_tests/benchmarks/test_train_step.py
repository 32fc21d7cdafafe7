"""benchmarks/train_step.py: what it times is what it says, for each family of models."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import alore_ext as ae

timm = pytest.importorskip("timm")
pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not (BENCHMARKS / "train_step.py").is_file():
    pytest.skip("the script is in benchmarks/ of a checkout, and runs from there", allow_module_level=True)

TINY = {
    "vit": ["test_vit", "--img-size", "32", "--model-kwargs", "depth=2"],
    "swin": ["swin_tiny_patch4_window7_224", "--img-size", "56", "--model-kwargs", "embed_dim=16", "depths=(2,1,1,1)"],
    # At its own start, 1e-6, layer scale would hide whatever an adapter does.
    "convnext": ["test_convnext", "--img-size", "32", "--model-kwargs", "ls_init_value=1.0"],
    "convnext_conv": ["test_convnext", "--img-size", "32", "--model-kwargs", "ls_init_value=1.0", "conv_mlp=True"],
    "as_mlp": ["as_mlp_tiny", "--img-size", "32"],
}
METHODS = ["floor", "full", "alore", "alore_einsum", "alore_built", "mlae", "mlae_torch", "peft_lora", "peft_lokr"]
ADAPTERS = METHODS[2:]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("train_step")
        for name in [name for name in sys.modules if name == "train_step" or name.partition(".")[0] == "steps"]:
            del sys.modules[name]


def make(script, family):
    args = script.parse_args(["--model", *TINY[family], "--dtype", "fp32"])
    return args, script.make_model(args)


def build(script, base, method):
    if method.startswith("peft"):
        pytest.importorskip("peft")
    return script.METHODS[method].build(copy.deepcopy(base), script.find_places(base))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "alore", "mlae"),
    [
        # The paper's ALoRE counts. MLAE: 8 experts, each one row of A, one column of B and a coefficient.
        ("vit_base_patch16_224", 147_520, 12 * 8 * (768 * 4 + 1)),
        (
            "swin_base_patch4_window7_224",
            192_576,
            sum(d * 8 * (w * 4 + 1) for d, w in zip((2, 2, 18, 2), (128, 256, 512, 1024), strict=True)),
        ),
        (
            "convnext_base",
            288_832,
            sum(d * 8 * (w * 5 + 1) for d, w in zip((3, 3, 27, 3), (128, 256, 512, 1024), strict=True)),
        ),
    ],
)
def test_parameter_counts_are_the_papers(script, name, alore, mlae):
    with torch.device("meta"):
        base = timm.create_model(name, num_classes=10)
    head = sum(p.numel() for p in base.get_classifier().parameters())
    expected = {"alore": alore, "alore_einsum": alore, "alore_built": alore, "mlae": mlae, "mlae_torch": mlae}
    for method, count in expected.items():
        adapted = build(script, base, method)
        assert sum(p.numel() for p in trainable(adapted).values()) - head == count, method


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", ADAPTERS)
def test_adapter_starts_as_the_plain_model_and_every_trainable_learns(script, family, method):
    args, base = make(script, family)
    images, labels = script.make_batch(args, base, 2, torch.device("cpu"))
    plain = base.eval()(images)
    model = build(script, base, method).eval()
    torch.testing.assert_close(model(images), plain, rtol=1e-4, atol=1e-5)

    adapters = {name: p for name, p in trainable(model).items() if "head" not in name}
    assert adapters
    with torch.no_grad():
        for parameter in adapters.values():  # off the zero start, at which the other factors have no gradient
            parameter.add_(torch.randn_like(parameter) * 0.1)
    changed = model(images)
    assert not torch.allclose(changed, plain, atol=1e-3)
    torch.nn.functional.cross_entropy(changed, labels).backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", TINY)
def test_plain_forms_compute_what_the_library_does(script, family):
    """The three forms of ALoRE, and both of MLAE, with one set of values."""
    args, base = make(script, family)
    images, _ = script.make_batch(args, base, 2, torch.device("cpu"))
    for forms in (("alore", "alore_einsum", "alore_built"), ("mlae", "mlae_torch")):
        generator, outputs, values = torch.Generator().manual_seed(3), [], None
        for method in forms:
            model = build(script, base, method).eval()
            adapters = {name: p for name, p in trainable(model).items() if "head" not in name}
            if values is None:
                values = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in adapters.items()}
            assert adapters.keys() == values.keys()
            with torch.no_grad():
                for name, parameter in adapters.items():
                    parameter.copy_(values[name])
            outputs.append(model(images))
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", TINY)
def test_floor_runs_backward_to_the_first_blocks_input(script, family):
    args, base = make(script, family)
    images, labels = script.make_batch(args, base, 2, torch.device("cpu"))
    model, first_block, inputs = build(script, base, "floor"), script.find_places(base).first_block, []
    model.get_submodule(first_block).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    assert inputs[0].grad.abs().sum() > 0
    assert all(name.startswith("head") for name in trainable(model))
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("head"))


@pytest.mark.parametrize(("family", "how"), [("vit", []), ("swin", ["--interleave"]), ("convnext", ["--autocast"])])
def test_rows_of_a_run(script, family, how, tmp_path, monkeypatch, capsys):
    methods = METHODS if importlib.util.find_spec("peft") else [name for name in METHODS if "peft" not in name]
    dtype = ["--dtype", "bf16" if "--autocast" in how else "fp32"]
    argv = ["--model", *TINY[family], *how, *dtype, "--batch", "1", "--seconds", "0.01", "--device", "cpu"]
    monkeypatch.setattr(importlib.import_module("steps.timing"), "GROUP_SECONDS", 0.0)
    assert script.main([*argv, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "train_step.json").read_text())
    assert [row["method"] for row in report["rows"]] == methods and report["failures"] == []
    assert report["interleaved"] == ("--interleave" in how) and report["autocast"] == ("--autocast" in how)
    assert report["torch"] == torch.__version__ and report["commit"] and report["command"]
    floor = report["rows"][0]
    assert floor["ratio"] == 1.0 and floor["trainable_without_head"] == 0
    for row in report["rows"]:
        assert 0 < row["ms_min"] <= row["ms"] and row["ratio"] == pytest.approx(row["ms"] / floor["ms"])
    assert (tmp_path / "train_step.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in methods)
    assert ("peft is not installed" in printed) == (methods != METHODS)


def test_without_peft_its_methods_are_skipped_with_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find_spec(name))
    argv = ["--model", *TINY["vit"], "--dtype", "fp32", "--batch", "1", "--seconds", "0.01", "--device", "cpu"]
    assert script.main([*argv, "--methods", "peft_lora", "floor", "peft_lokr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "peft is not installed: peft_lora, peft_lokr skipped" and len(lines) == 3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (run: benchmarks/device_check.sh tests)")
@pytest.mark.parametrize("family", TINY)
def test_graph_mode_and_kernel_profile(script, family, tmp_path):
    argv = ["--model", *TINY[family], "--batch", "2", "--mode", "graph", "--seconds", "0.01", "--out", str(tmp_path)]
    assert script.main([*argv, "--methods", "floor", "alore", "alore_built", "mlae", "mlae_torch"]) == 0
    rows = json.loads((tmp_path / "train_step.json").read_text())["rows"]
    assert len(rows) == 5 and all(row["peak_mib"] > 0 for row in rows)
    assert script.main([*argv, "--profile", "alore"]) == 0
    assert "GPU busy" in (tmp_path / "profile_alore_2_graph.txt").read_text()


def test_a_failing_method_is_told_and_the_others_go_on(script, tmp_path, monkeypatch, capsys):
    def fail(model, places):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(script.METHODS, "full", script.METHODS["full"].__class__("full fine-tuning", fail))
    argv = ["--model", *TINY["vit"], "--dtype", "fp32", "--batch", "1", "--seconds", "0.01", "--device", "cpu"]
    assert script.main([*argv, "--methods", "full", "alore", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "train_step.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["alore"]
    assert report["rows"][0]["ratio"] is None, "a ratio to anything but the floor would mislead"
    assert "no such luck" in report["failures"][0]["error"] and "no such luck" in capsys.readouterr().out


def test_profile_of_a_method(script, tmp_path):
    argv = ["--model", *TINY["vit"], "--dtype", "fp32", "--batch", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert script.main([*argv, "--profile", "alore"]) == 0
    text = (tmp_path / "profile_alore_1_eager.txt").read_text()
    assert "ms a step" in text and "alore_ext::layer_norm_alore_backward" in text


def test_profile_counts_what_a_trace_of_a_gpu_holds(script):
    profiling = importlib.import_module("steps.profiling")
    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "dur": 10.0},
        {"ph": "X", "cat": "kernel", "name": "gemm", "dur": 14.0},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "dur": 1.0},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW.step", "dur": 50.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 3.0},
        {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx", "dur": 3.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemsetAsync", "dur": 3.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "dur": 90.0},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "dur": 8.0},
        {"ph": "f", "cat": "ac2g", "name": "ac2g"},
        {"ph": "M", "name": "process_name"},
    ]
    assert profiling.gpu_events(events) == ([("gemm", 2, 24.0), ("Memset (Device)", 1, 1.0)], 3)


def test_swin_takes_the_librarys_own_patch(script):
    _, base = make(script, "swin")
    patched = build(script, base, "alore")
    assert ae.trainable_summary(patched).by_role["alore_scale"] == 64


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--autocast", "--dtype", "fp32"], "--autocast needs"),
        (["--mode", "graph", "--device", "cpu"], "--mode graph needs a CUDA device"),
    ],
)
def test_arguments_that_contradict_each_other(script, argv, text, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(argv)
    assert text in capsys.readouterr().err
