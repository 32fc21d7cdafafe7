"""A small task and small finished runs for the command line."""

import numpy
import pytest
from safetensors.torch import save_file
from tiny_runs import QUICK, VIT

from alore_ext.cli import main
from alore_ext.training.backbone import build_backbone
from alore_ext.training.state import seed_everything


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """An .npz file: three classes told apart by where a bright square is."""
    rng = numpy.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 40), ("val", 12), ("test", 21)):
        labels = numpy.arange(count) % 3
        images = rng.integers(0, 60, (count, 32, 32, 3), dtype=numpy.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 10 * label : 10 * label + 10] += 150
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    numpy.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="session")
def finetune(task):
    """finetune("alore", out, *options) -> exit code."""

    def call(method, out, *options):
        return main(["finetune", *VIT, *QUICK, "--data", task, "--method", method, "--out", str(out), *options])

    return call


@pytest.fixture(scope="session")
def finished(finetune, tmp_path_factory):
    """Folder with a finished run of each method: finished / "alore" and so on."""
    out = tmp_path_factory.mktemp("runs") / "all"
    assert finetune("linear,alore,mlae,full", out, "--lr", "0.005") == 0
    return out


@pytest.fixture
def fails(capsys):
    """fails(arguments...) -> the one line of error that the command prints, exit code 2."""

    def call(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        command = str(arguments[0])
        assert lines[0].startswith(f"alore-ext {command}: error: ")
        return lines[0].removeprefix(f"alore-ext {command}: error: ")

    return call


@pytest.fixture(scope="session")
def moved(finished, task, tmp_path_factory):
    """An ALoRE adapter far from its run, with its base in a file: (adapter, base weights)."""
    folder = tmp_path_factory.mktemp("moved")
    seed_everything(0)  # what --random-init of seed 0 made
    save_file(build_backbone("test_vit", 3, img_size=32).state_dict(), folder / "base.safetensors")
    (folder / "bars.safetensors").write_bytes((finished / "alore" / "adapter.safetensors").read_bytes())
    return folder / "bars.safetensors", folder / "base.safetensors"
