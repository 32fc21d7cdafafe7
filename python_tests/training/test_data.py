"""Every layout that load_data takes, and what it says about the others."""

import numpy
import pytest
import torch
from PIL import Image

from alore_ext.training.data import ArraySplit, FileSplit, load_data
from alore_ext.training.errors import InputError


def write_npz(path, **changes):
    arrays = {
        "x_train": numpy.zeros((6, 8, 8, 3), numpy.uint8),
        "y_train": numpy.array([0, 1, 2, 0, 1, 2]),
        "x_test": numpy.zeros((3, 8, 8, 3), numpy.uint8),
        "y_test": numpy.array([2, 1, 0]),
    }
    arrays.update(changes)
    numpy.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def write_folder(root, layout):
    """layout: {"train/cat": 3} -> that many images."""
    for name, count in layout.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (9, 7), (index, 0, 0)).save(root / name / f"{index}.png")
    return str(root)


def test_digits_are_split_in_order():
    data = load_data("digits")
    assert (len(data.splits["train"]), len(data.splits["test"])) == (1000, 797)
    assert data.class_names == tuple("0123456789")
    images = data.splits["train"].images
    assert images.shape == (1000, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 255


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((6, 8, 9, 3), (6, 3, 8, 9)),
        ((6, 8, 9, 1), (6, 1, 8, 9)),
        ((6, 8, 9), (6, 1, 8, 9)),
        ((6, 3, 8, 9), (6, 3, 8, 9)),
    ],
)
def test_npz_image_layouts(tmp_path, shape, expected):
    pixels = numpy.arange(numpy.prod(shape), dtype=numpy.int64).astype(numpy.uint8).reshape(shape)
    data = load_data(write_npz(tmp_path / "a.npz", x_train=pixels))
    images = data.splits["train"].images
    assert images.shape == expected
    if len(shape) == 4 and shape[3] == 3:
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(pixels))


def test_npz_labels_are_renumbered(tmp_path):
    data = load_data(
        write_npz(tmp_path / "a.npz", y_train=numpy.array([7, 3, 9, 7, 3, 9]), y_test=numpy.array([[9], [3], [7]]))
    )
    assert data.class_names == ("3", "7", "9")
    assert data.splits["train"].labels.tolist() == [1, 0, 2, 1, 0, 2]
    assert data.splits["test"].labels.tolist() == [2, 0, 1]


def test_npz_medmnist_names(tmp_path):
    path = tmp_path / "m.npz"
    numpy.savez(
        path,
        train_images=numpy.zeros((4, 8, 8), numpy.uint8),
        train_labels=numpy.array([[0], [1]] * 2),
        val_images=numpy.zeros((2, 8, 8), numpy.uint8),
        val_labels=numpy.array([[0], [1]]),
    )
    data = load_data(str(path))
    assert set(data.splits) == {"train", "val"} and data.final_split == "val"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_test": None}, "needs x_train, y_train and x_test, y_test"),
        (
            {"x_train": numpy.zeros((6, 8, 8, 3), numpy.float32)},
            "x_train must be uint8 pixels in 0..255, got float32",
        ),
        ({"x_train": numpy.zeros((6, 8, 8, 4), numpy.uint8)}, r"got \[6, 8, 8, 4\]"),
        ({"y_train": numpy.zeros(5, numpy.int64)}, "x_train has 6 images, y_train has 5 labels"),
        ({"y_train": numpy.zeros(6)}, "y_train must be integers"),
        ({"y_test": numpy.array([0, 1, 5])}, r"test has labels \[5\] that train lacks"),
        ({"y_train": numpy.zeros(6, int), "y_test": numpy.zeros(3, int)}, "has one class"),
        (
            {"x_test": numpy.zeros((0, 8, 8), numpy.uint8), "y_test": numpy.zeros(0, int)},
            "test split has no images",
        ),
        ({"y_train": numpy.array([{}] * 6, dtype=object)}, "cannot read"),
    ],
)
def test_npz_errors(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_data(write_npz(tmp_path / "a.npz", **changes))


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match="cannot read"):
        load_data(str(path))


def test_split_folders(tmp_path):
    root = write_folder(tmp_path / "pets", {"train/cat": 3, "train/dog": 2, "valid/dog": 1, "test/cat": 1})
    data = load_data(root)
    assert data.class_names == ("cat", "dog")
    assert isinstance(data.splits["train"], FileSplit)
    assert data.splits["train"].labels.tolist() == [0, 0, 0, 1, 1]
    assert data.splits["val"].labels.tolist() == [1] and data.splits["test"].labels.tolist() == [0]


def test_single_folder_is_split_by_class_and_seed(tmp_path):
    root = write_folder(tmp_path / "pets", {"cat": 10, "dog": 5})
    data = load_data(root, seed=1)
    assert data.splits["test"].labels.tolist() == [0, 0, 1]
    assert not set(data.splits["test"].files) & set(data.splits["train"].files)
    assert len(data.splits["train"]) == 12
    assert load_data(root, seed=1).splits["test"].files == data.splits["test"].files
    assert any(load_data(root, seed=s).splits["test"].files != data.splits["test"].files for s in range(2, 6))


@pytest.mark.parametrize(
    "layout, message",
    [
        ({"train/cat": 1, "train/dog": 1}, "neither val nor test"),
        ({"train/cat": 1, "train/dog": 1, "test/cow": 1}, "class cow is in"),
        ({"cat": 1, "dog": 3}, "needs at least 2"),
        ({"cat": 4}, "has one class"),
        ({"train/cat": 1, "train/dog": 1, "val/cat": 0}, "val split has no images"),
    ],
)
def test_folder_errors(tmp_path, layout, message):
    with pytest.raises(InputError, match=message):
        load_data(write_folder(tmp_path / "pets", layout))


def test_missing_and_odd_sources(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_data(str(tmp_path / "nothing"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="neither a folder nor an .npz"):
        load_data(str(tmp_path / "a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        load_data(str(tmp_path / "empty"))


def test_val_joins_train(tmp_path):
    path = write_npz(tmp_path / "a.npz", x_val=numpy.ones((2, 8, 8, 3), numpy.uint8), y_val=numpy.array([1, 0]))
    joined = load_data(path).with_val_in_train()
    assert set(joined.splits) == {"train", "test"}
    train = joined.splits["train"]
    assert isinstance(train, ArraySplit) and len(train) == 8 and train.labels[-2:].tolist() == [1, 0]
    with pytest.raises(InputError, match="needs val and test"):
        joined.with_val_in_train()
