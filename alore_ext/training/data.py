"""Labelled images from a folder, an ``.npz`` file or scikit-learn's digits, as named splits.

`load_data` is the door. Splits are "train" and, where the source has them, "val" and "test". Arrays come back
in memory; folders as lists of files, which `loader.py` decodes (once, if they fit).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from .errors import InputError, require

__all__ = ["ArraySplit", "Data", "FileSplit", "load_data"]

_EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_TEST_FRACTION = 0.2
_DIGITS_TRAIN = 1000


@dataclass(frozen=True)
class ArraySplit:
    """Images in memory: uint8 [count, 1 or 3, height, width]; labels int64 [count]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FileSplit:
    """Images in files; labels int64 [count]."""

    files: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


Split = ArraySplit | FileSplit


@dataclass(frozen=True)
class Data:
    """Named splits of one task. ``class_names[label]`` names a class."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def final_split(self) -> str:
        """The split whose accuracy is reported at the end: test, or val where there is no test."""
        return "test" if "test" in self.splits else "val"

    def with_val_in_train(self) -> Data:
        """Train on train + val, as VTAB-1k's final runs do (train800val200).

        Raises:
            InputError: there is no val or no test split.
        """
        if "val" not in self.splits or "test" not in self.splits:
            raise InputError(
                f"--train-split trainval needs val and test splits; {self.name} has {_listing(self.splits)}"
            )
        train, val = self.splits["train"], self.splits["val"]
        labels = torch.cat([train.labels, val.labels])
        joined: Split
        if isinstance(train, ArraySplit) and isinstance(val, ArraySplit):
            if train.images.shape[1:] != val.images.shape[1:]:
                raise InputError(f"{self.name}: train and val images differ in shape")
            joined = ArraySplit(torch.cat([train.images, val.images]), labels)
        else:
            joined = FileSplit(train.files + val.files, labels)
        return Data(self.name, self.class_names, {"train": joined, "test": self.splits["test"]})


def load_data(source: str, seed: int = 0) -> Data:
    """Load a task.

    Args:
        source: "digits"; an ``.npz`` file with ``x_train``, ``y_train`` and ``x_test`` or ``x_val`` (or
            MedMNIST's ``train_images``, ``train_labels``, ...), images uint8 NHWC, NHW or NCHW; a folder
            with ``train`` and ``val`` and/or ``test`` folders, each holding a folder a class; or one folder
            of class folders, from which a fifth of every class, drawn with ``seed``, becomes the test split.

    Raises:
        InputError: the source is missing, or not laid out like that; says what was found.
    """
    if source == "digits":
        return _load_digits()
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, seed)
    if not path.exists():
        raise InputError(f"--data: {source} does not exist (give a folder, an .npz file, or 'digits')")
    if path.suffix != ".npz":
        raise InputError(f"--data: {source} is neither a folder nor an .npz file")
    return _load_npz(path)


def _load_digits() -> Data:
    """scikit-learn's 8x8 digits in its order, which is by writer: 1,000 to train, the other 797 to test."""
    digits = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(numpy.rint(digits.images * (255 / 16)).astype(numpy.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    splits: dict[str, Split] = {
        "train": ArraySplit(images[:_DIGITS_TRAIN], labels[:_DIGITS_TRAIN]),
        "test": ArraySplit(images[_DIGITS_TRAIN:], labels[_DIGITS_TRAIN:]),
    }
    return Data("digits", tuple(str(digit) for digit in range(10)), splits)


def _load_npz(path: Path) -> Data:
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--data: cannot read {path}: {error}") from error
    found: dict[str, tuple[Tensor, numpy.ndarray]] = {}
    for split, names in _SPLIT_NAMES.items():
        for name in names:
            for x_key, y_key in ((f"x_{name}", f"y_{name}"), (f"{name}_images", f"{name}_labels")):
                if x_key in arrays and y_key in arrays:
                    found[split] = (_images(arrays[x_key], path, x_key), _labels(arrays[y_key], path, y_key))
                    if len(found[split][0]) != len(found[split][1]):
                        raise InputError(
                            f"--data: {path}: {x_key} has {len(arrays[x_key])} images, "
                            f"{y_key} has {len(arrays[y_key])} labels"
                        )
    if "train" not in found or len(found) < 2:
        raise InputError(
            f"--data: {path} needs x_train, y_train and x_test, y_test (or x_val, y_val); it holds {_listing(arrays)}"
        )
    classes = numpy.unique(found["train"][1])
    splits: dict[str, Split] = {}
    for split, (images, labels) in found.items():
        unknown = numpy.setdiff1d(labels, classes)
        if unknown.size:
            raise InputError(f"--data: {path}: {split} has labels {unknown[:5].tolist()} that train lacks")
        splits[split] = ArraySplit(images, torch.from_numpy(numpy.searchsorted(classes, labels)).long())
    return _checked(Data(path.stem, tuple(str(label) for label in classes.tolist()), splits))


def _images(array: numpy.ndarray, path: Path, key: str) -> Tensor:
    """uint8 NCHW from uint8 NHWC, NHW or NCHW."""
    if array.dtype != numpy.uint8:
        raise InputError(f"--data: {path}: {key} must be uint8 pixels in 0..255, got {array.dtype}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in (1, 3):
        raise InputError(f"--data: {path}: {key} must be [count, height, width, 1 or 3], got {list(array.shape)}")
    return torch.from_numpy(numpy.ascontiguousarray(array))


def _labels(array: numpy.ndarray, path: Path, key: str) -> numpy.ndarray:
    if array.ndim == 2 and array.shape[1] == 1:  # MedMNIST
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"--data: {path}: {key} must be integers [count], got {array.dtype} {list(array.shape)}")
    return array


def _load_folder(root: Path, seed: int) -> Data:
    split_dirs = {
        split: root / name for split, names in _SPLIT_NAMES.items() for name in names if (root / name).is_dir()
    }
    if "train" in split_dirs:
        return _load_split_folders(root, split_dirs)
    by_class = {name: _image_files(root / name) for name in _class_names(root)}
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, list[str]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for label, (name, members) in enumerate(by_class.items()):
        if len(members) < 2:
            raise InputError(f"--data: {root / name} has {len(members)} image(s); a split needs at least 2")
        test_count = max(1, round(len(members) * _TEST_FRACTION))
        in_test = set(torch.randperm(len(members), generator=generator)[:test_count].tolist())
        for index, file in enumerate(members):
            split = "test" if index in in_test else "train"
            files[split].append(file)
            labels[split].append(label)
    splits: dict[str, Split] = {split: FileSplit(tuple(files[split]), torch.tensor(labels[split])) for split in files}
    return _checked(Data(root.name, tuple(by_class), splits))


def _load_split_folders(root: Path, split_dirs: dict[str, Path]) -> Data:
    if len(split_dirs) < 2:
        raise InputError(f"--data: {root} has train but neither val nor test beside it")
    class_names = _class_names(split_dirs["train"])
    label_of = {name: label for label, name in enumerate(class_names)}
    splits: dict[str, Split] = {}
    for split, folder in split_dirs.items():
        files: list[str] = []
        labels: list[int] = []
        for name in _class_names(folder):
            if name not in label_of:
                raise InputError(f"--data: class {name} is in {folder} but not in {split_dirs['train']}")
            members = _image_files(folder / name)
            files += members
            labels += [label_of[name]] * len(members)
        splits[split] = FileSplit(tuple(files), torch.tensor(labels, dtype=torch.int64))
    return _checked(Data(root.name, tuple(class_names), splits))


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"--data: {folder} has no class folders (expected {folder}/CLASS/IMAGE)")
    return names


def _image_files(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in _EXTENSIONS and file.is_file())


def _checked(data: Data) -> Data:
    if data.num_classes < 2:
        raise InputError(f"--data: {data.name} has one class ({data.class_names[0]}); classifying needs two")
    for split, members in data.splits.items():
        if not len(members):
            raise InputError(f"--data: {data.name}: the {split} split has no images")
    return data


def _listing(names) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
