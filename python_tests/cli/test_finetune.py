"""alore-ext finetune: outputs, interruption, and what bad input gets."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import COMMAND, QUICK, VIT, outside

import alore_ext
from alore_ext.cli import main
from alore_ext.training.loop import Trainer

METHODS = ("linear", "alore", "mlae", "full")


def read(file):
    return json.loads(file.read_text())


def log_of(folder, event="epoch"):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_files(finished, method):
    folder = finished / method
    file = "adapter.safetensors" if method in ("alore", "mlae") else "model.safetensors"
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "result.json",
        "log.jsonl",
        "checkpoint.pt",
        file,
    }
    result, config = read(folder / "result.json"), read(folder / "config.json")
    assert result["file"] == file and result["file_bytes"] == (folder / file).stat().st_size
    assert config["class_names"] == ["0", "1", "2"] and config["recipe"]["lr"] == 0.005
    assert [line["epoch"] for line in log_of(folder)] == [1, 2, 3]
    assert log_of(folder, "end")[0]["test_accuracy"] == result["accuracy"]
    assert all("eval_accuracy" in line for line in log_of(folder))


def test_counts_of_trainable_parameters(finished):
    counts = {m: read(finished / m / "result.json") for m in METHODS}
    head = 3 * 64 + 3
    assert all(counts[m]["trainable_head"] == head for m in METHODS)
    assert counts["linear"]["trainable"] == head
    assert counts["full"]["trainable"] == counts["full"]["total"]
    model = alore_ext.patch(timm.create_model("test_vit", num_classes=3, img_size=32), alore_ext.AloreConfig())
    assert counts["alore"]["trainable"] == alore_ext.trainable_summary(model).trainable


@pytest.mark.parametrize("method", ["alore", "mlae"])
def test_merging_changes_nothing(finished, method):
    merge = read(finished / method / "result.json")["merge"]
    assert merge["accuracy_merged"] == merge["accuracy_unmerged"] and merge["changed_predictions"] == 0
    assert merge["max_logit_difference"] <= 1e-4 * max(1, merge["max_logit"])


def test_a_merge_that_changes_the_model_is_a_failure(finetune, tmp_path, monkeypatch, capsys):
    def broken_merge(model):
        alore_ext.merge_(model)
        model.head.bias.data.add_(1)

    monkeypatch.setattr("alore_ext.training.session.alore_ext", FakeLibrary(merge_=broken_merge))
    assert finetune("alore", tmp_path / "a", "--epochs", "1") == 1
    assert "merging changed ALoRE" in capsys.readouterr().err


class FakeLibrary:
    """The package with some functions replaced, for one module alone."""

    def __init__(self, **replaced):
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(alore_ext, name)


def test_methods_train_what_they_say(finished):
    """Linear moves the head alone, full moves everything."""
    torch.manual_seed(0)
    base = load_file(finished / "linear" / "model.safetensors")
    full = load_file(finished / "full" / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], full[name])}
    assert moved == set(base) - {name for name in base if name.endswith("num_batches_tracked")}
    adapter = load_file(finished / "alore" / "adapter.safetensors")
    assert any(name.endswith(".up") and tensor.abs().max() > 0 for name, tensor in adapter.items())


def test_several_methods_are_compared(finished, task, finetune, tmp_path, capsys):
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read(finished / "config.json") == {"runs": list(METHODS)}
    assert main(["finetune", "--resume", "--out", str(finished)]) == 0  # nothing left to do: reports again
    out = capsys.readouterr().out
    for text in (
        "linear probe",
        "ALoRE",
        "MLAE",
        "full fine-tuning",
        "test accuracy",
        "predictions changed",
        "curves.png",
        "alore-ext merge --adapter",
    ):
        assert text in out


def test_with_no_arguments_it_is_the_demonstration(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop_here(settings, folder, **options):
        seen.append((settings, folder))
        raise KeyboardInterrupt

    monkeypatch.setattr("alore_ext.cli.finetune.run_session", stop_here)
    assert main(["finetune"]) == 130
    settings, folder = seen[0]
    assert (settings.model, settings.data, settings.pretrained) == ("tiny_vit", "digits", True)
    assert folder == Path("runs/demo/linear")
    assert read(tmp_path / "runs" / "demo" / "config.json") == {"runs": list(METHODS)}
    assert main(["finetune"]) == 130  # again: its own folder is no obstacle


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_interrupted_and_resumed_is_the_same_run(finetune, tmp_path, monkeypatch, capsys, method, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: benchmarks/device_check.sh runs it on one")
    number = signal.SIGTERM if method == "full" else signal.SIGINT
    options = ("--augment", "crop", "--device", device)
    options += () if method in ("linear", "full") else ("--dropout", "0.3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(method, whole, *options) == 0

    step, calls = Trainer._step, []

    def interrupted_step(self, *batch):
        calls.append(1)
        if len(calls) == 5:  # the second step of the second epoch
            signal.raise_signal(number)
        return step(self, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted_step)
        capsys.readouterr()
        assert finetune(method, parts, *options) == 130
    captured = capsys.readouterr()
    assert number.name in captured.out
    assert f"stopped in epoch 2 after step 2. To go on: alore-ext finetune --resume --out {parts}" in captured.err
    assert len(calls) == 5 and not (parts / "result.json").exists()

    assert main(["finetune", "--resume", "--out", str(parts), "--device", device]) == 0
    file = read(whole / "result.json")["file"]
    expected, got = load_file(whole / file), load_file(parts / file)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    for ours, theirs in zip(log_of(whole), log_of(parts), strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two class folders, ten images each."""
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (root / name).mkdir()
        for index in range(10):
            Image.new("RGB", (40 + index, 50), colour).save(root / name / f"{index}.jpg")
    return str(root)


@pytest.mark.parametrize("number, source", [(signal.SIGINT, "task"), (signal.SIGTERM, "pictures")])
def test_a_real_signal_to_the_whole_process_group(number, source, request, tmp_path):
    out = tmp_path / "run"
    data = ("--data", request.getfixturevalue(source), "--augment", "crop", "--workers", "2")
    options = (*VIT, *QUICK, *data, "--out", str(out), "--epochs", "100000")
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "finetune", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **outside(tmp_path),
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"To go on: alore-ext finetune --resume --out {out}" in err and "Traceback" not in err
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["epoch"] >= 1


def test_resume_of_several_skips_what_is_done(finetune, tmp_path, monkeypatch):
    out = tmp_path / "two"
    step, calls = Trainer._step, []

    def interrupted_step(self, *batch):
        calls.append(self.title)
        if calls.count("alore") == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "_step", interrupted_step)
    assert finetune("linear,alore", out) == 130
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert calls.count("linear") == calls.count("alore") == 9
    assert (out / "curves.png").exists()


def test_same_seed_same_bits_other_seed_other_bits(finetune, tmp_path):
    files = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert finetune("mlae", tmp_path / name, "--seed", seed) == 0
        files.append(load_file(tmp_path / name / "adapter.safetensors"))
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert not torch.equal(files[0]["head.weight"], files[2]["head.weight"])


def test_a_folder_of_images(pictures, tmp_path, capsys):
    options = ("--data", pictures, "--out", str(tmp_path / "run"), "--augment", "crop")
    assert main(["finetune", *VIT, *QUICK, *options, "--lr", "0.01", "--workers", "1"]) == 0
    assert "2 classes; 16 train, 4 test" in capsys.readouterr().out
    assert read(tmp_path / "run" / "result.json")["accuracy"] == 1.0
    assert read(tmp_path / "run" / "config.json")["class_names"] == ["blue", "red"]
    assert main(["evaluate", "--out", str(tmp_path / "run")]) == 0
    assert "test accuracy 100.00 %" in capsys.readouterr().out


def test_val_joins_training_on_request(finetune, tmp_path):
    assert finetune("linear", tmp_path / "a", "--train-split", "trainval", "--epochs", "1") == 0
    assert log_of(tmp_path / "a")[0]["step"] == 4  # 52 images in batches of 16


def test_bf16_runs(finetune, tmp_path):
    assert finetune("alore", tmp_path / "a", "--amp", "bf16", "--epochs", "1") == 0
    merge = read(tmp_path / "a" / "result.json")["merge"]
    assert merge["max_logit_difference"] <= 1e-4 * max(1, merge["max_logit"])  # compared in fp32


def test_options_reach_the_adapter(finetune, tmp_path):
    from alore_ext.adapter_file import read_adapter

    assert (
        finetune(
            "alore",
            tmp_path / "a",
            "--num-experts",
            "2",
            "--rank",
            "3",
            "--dropout",
            "0.1",
            "--locations",
            "after_attn",
            "--epochs",
            "1",
        )
        == 0
    )
    assert (
        finetune(
            "mlae",
            tmp_path / "m",
            "--num-experts",
            "4",
            "--rank",
            "2",
            "--dropout",
            "0.2",
            "--targets",
            "fc1,fc2",
            "--epochs",
            "1",
        )
        == 0
    )
    assert read_adapter(tmp_path / "a" / "adapter.safetensors").configs == (
        alore_ext.AloreConfig(num_experts=2, rank=3, dropout=0.1, locations=("after_attn",)),
    )
    assert read_adapter(tmp_path / "m" / "adapter.safetensors").configs == (
        alore_ext.MlaeConfig(num_experts=4, expert_rank=2, dropout=0.2, targets=("fc1", "fc2")),
    )


def test_overwrite_takes_only_its_own_files(finetune, tmp_path, fails, task):
    out = tmp_path / "a"
    assert finetune("linear", out, "--epochs", "1") == 0
    (out / "notes.txt").write_text("mine")
    again = ("finetune", *VIT, "--data", task, "--method", "full", "--epochs", "1", "--out", out)
    assert "holds a run already: --resume goes on with it, --overwrite replaces it" in fails(*again)
    assert main([str(a) for a in again] + ["--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert read(out / "config.json")["method"] == "full"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--method", "lora"), "--method takes linear, alore, mlae, full (commas between), got lora"),
        (("--method", "alore,alore"), "--method takes"),
        (("--method", "linear", "--rank", "2"), "--rank is for alore and mlae, not linear"),
        (("--method", "mlae", "--locations", "before_attn"), "--locations is for alore, not mlae"),
        (("--num-experts", "5"), "num_experts"),
        (("--num-experts", "0"), "num_experts must be an int >= 1, got 0"),
        (("--dropout", "1.5"), "dropout must be in [0, 1)"),
        (("--locations", "nowhere"), "locations must be"),
        (("--epochs", "0"), "epochs must be at least 1, got 0"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--lr", "-1"), "lr must be a finite number"),
        (("--eval-every", "0"), "--eval-every must be at least 1, got 0"),
        (("--workers", "-1"), "--workers must be at least 0"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--img-size", "0"), "--img-size must be at least 1"),
        (("--img-size", "33"), "--img-size: VisionTransformer takes no 33x33 image"),
        (("--amp", "fp16", "--device", "cpu"), "--amp fp16 needs a CUDA device"),
        (("--device", "gpu"), "--device: 'gpu' is not a device"),
        (("--device", "cuda:99"), "--device: cuda:99 asked for"),
        (("--model", "no_such_vit"), "has no model 'no_such_vit'"),
        (("--weights", "missing.pth"), "missing.pth does not exist"),
        (("--data", "missing"), "does not exist (give a folder, an .npz file, or 'digits')"),
        (("--model", "test_resnet", "--method", "mlae"), "ResNet"),
    ],
)
def test_bad_input_is_one_line(fails, task, tmp_path, options, message):
    out = tmp_path / "run"
    line = fails("finetune", *VIT, "--data", task, "--out", out, *options)
    assert message in line
    assert not (out / "checkpoint.pt").exists()


def test_what_is_missing_is_said(fails, task, tmp_path):
    assert "--data needs --out DIR" in fails("finetune", *VIT, "--data", task)
    line = fails("finetune", "--model", "test_vit", "--data", task, "--out", tmp_path / "a")
    assert line == "--model test_vit: give --pretrained, --weights FILE, or --random-init if that is meant"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("")
    assert "is not an empty folder" in fails("finetune", *VIT, "--data", task, "--out", tmp_path / "b")


def test_resume_must_fit(fails, finetune, finished, tmp_path):
    assert "holds no run" in fails("finetune", "--resume", "--out", tmp_path)
    line = fails("finetune", "--resume", "--out", finished, "--lr", "0.1")
    assert line == "--resume goes on with the run's own --lr (0.005), not 0.1: leave it out"
    assert "is of linear,alore,mlae,full, not alore" in fails(
        "finetune", "--resume", "--out", finished, "--method", "alore"
    )
    (tmp_path / "config.json").write_text("{}")
    assert "not a configuration of alore-ext" in fails("finetune", "--resume", "--out", tmp_path)


def test_a_damaged_checkpoint_is_one_line(fails, finetune, tmp_path):
    out = tmp_path / "a"
    assert finetune("linear", out, "--epochs", "1") == 0
    (out / "result.json").unlink()
    (out / "checkpoint.pt").write_bytes(b"no")
    assert "is not a readable checkpoint" in fails("finetune", "--resume", "--out", out)


def test_debug_shows_the_traceback(task, tmp_path):
    with pytest.raises(ValueError, match="has no model"):
        main(
            [
                "finetune",
                "--model",
                "nope",
                "--random-init",
                "--data",
                task,
                "--out",
                str(tmp_path / "a"),
                "--debug",
            ]
        )
