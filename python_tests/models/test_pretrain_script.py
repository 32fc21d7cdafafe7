"""benchmarks/pretrain_tiny_vit.py: its augmentations, and that what it writes is what `tiny_vit` reads."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")
pytest.importorskip("PIL")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pretrain_tiny_vit.py"
if not SCRIPT.is_file():
    pytest.skip("the script is in benchmarks/ of a checkout, and runs from there", allow_module_level=True)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_tiny_vit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.sys.modules, spec.name, module)  # dataclasses looks its module up by name
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_warp_without_affine_is_a_crop_of_the_padded_image_or_its_mirror(script, images):
    torch.manual_seed(1)
    warped = script.warp(images, 0.0)
    for image, result in zip(F.pad(images, (4, 4, 4, 4)), warped, strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)  # [9, 9, 3, 32, 32]
        same = (windows == result).flatten(2).all(-1) | (windows.flip(-1) == result).flatten(2).all(-1)
        assert same.any()


def test_warp_with_affine_resamples(script, images):
    torch.manual_seed(1)
    warped = script.warp(images, 1.0)
    assert warped.shape == images.shape and torch.isfinite(warped).all()
    assert not torch.isin(warped[warped != 0], images).all()


def test_cutout_zeroes_one_square_and_nothing_else(script, images):
    torch.manual_seed(2)
    zeroed = (script.cutout(images + 1, 1.0) == 0).all(1)  # [6, 32, 32]
    for hole in zeroed:
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns[None])
        assert rows.sum() <= 16 and columns.sum() <= 16
    assert zeroed.any()
    assert torch.equal(script.cutout(images, 0.0), images)


def test_color_jitter_stays_in_range_and_can_be_off(script, images):
    torch.manual_seed(3)
    jittered = script.color_jitter(images, 1.0)
    assert jittered.min() >= 0 and jittered.max() <= 1
    assert not torch.allclose(jittered, images, atol=0.05)


def test_mix_weights_are_the_shares_of_the_pixels(script):
    rng = random.Random(0)
    labels = torch.arange(50)
    ones_hot = torch.eye(50)[:, :, None, None].expand(50, 50, 32, 32)  # image i is 1 in channel i, 0 elsewhere
    weights = []
    for _ in range(8):
        x, partners, lam = script.mix(ones_hot, labels, 1.0, rng)
        shares = x.mean((2, 3))
        expected = lam * torch.eye(50) + (1 - lam) * torch.eye(50)[partners]
        assert torch.allclose(shares, expected, atol=1e-5)
        weights.append(lam)
    assert len(set(weights)) > 4
    x, partners, lam = script.mix(ones_hot, labels, 0.0, rng)
    assert x is ones_hot and partners is labels and lam == 1.0


def test_data_folder_that_lacks_a_sheet_is_named(script, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither data_batch_1.png nor data_batch_1.webp"):
        script.load_cifar10(tmp_path, torch.device("cpu"), None)


def test_both_file_forms_hold_the_same_pixels(script, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    monkeypatch.setattr(script, "SHEET_IMAGES", 4)
    monkeypatch.setattr(script, "MOSAIC", 2)
    monkeypatch.setattr(script, "PACK_PARTS", {"part1": ["data_batch_1"], "part2": ["test_batch"]})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    for sheet, name in zip(pixels, ("data_batch_1", "test_batch"), strict=True):
        Image.fromarray(sheet.reshape(4, 1024, 3)).save(tmp_path / f"{name}.png")
    for name in script.LABEL_FILES:
        (tmp_path / name).write_text("[0, 1, 2, 3]")
    script.pack(tmp_path, tmp_path / "packed")
    for sheet, part, name in zip(pixels, ("part1", "part2"), ("data_batch_1", "test_batch"), strict=True):
        assert np.array_equal(script.read_sheet(tmp_path, name), sheet)
        assert np.array_equal(script.read_sheet(tmp_path / "packed" / part, name), sheet)


def test_what_the_script_writes_is_what_tiny_vit_reads(script, tmp_path, monkeypatch):
    """Two steps on random images: the schedule ends, and the file rebuilds the averaged model."""
    loader = importlib.import_module("alore_ext.models.tiny_vit")
    torch.manual_seed(0)
    out = tmp_path / "weights.safetensors"
    small = ["--patch-size", "8", "--embed-dim", "32", "--depth", "2", "--num-heads", "2"]
    run = [
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--git-commit",
        "c" * 40,
        "--data",
        str(tmp_path),
        "--out",
        str(out),
    ]
    args = script.parse_args([*small, *run])
    data = script.Cifar10(
        train_x=torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8),
        train_y=torch.randint(0, 10, (8,)),
        test_x=torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8),
        test_y=torch.randint(0, 10, (20,)),
        sha256="0" * 64,
    )
    initial = script.build_model(script.architecture_from(args))
    averaged, record = script.train(args, copy.deepcopy(initial), data)
    accuracy = script.save(args, averaged, data, record)
    assert record["steps"] == 2 and record["epochs"] == 2
    assert not torch.equal(averaged.head.weight, initial.head.weight)

    monkeypatch.setattr(loader, "WEIGHTS", out)
    metadata = loader.tiny_vit_metadata()
    assert metadata["architecture"] == script.architecture_from(args)
    assert metadata["git_commit"] == "c" * 40
    assert metadata["test_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert json.loads(json.dumps(metadata)) == metadata
    model = loader.tiny_vit()
    assert script.accuracy(model, data.test_x, data.test_y) == accuracy
    x = script.normalise(data.test_x.float() / 255)
    assert torch.equal(model.eval()(x), averaged.eval()(x))
