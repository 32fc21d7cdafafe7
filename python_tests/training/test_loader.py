"""Batches are a pure function of (seed, epoch, step), from arrays and from files."""

import pytest
import torch
from PIL import Image

from alore_ext.training.data import ArraySplit, FileSplit
from alore_ext.training.errors import InputError
from alore_ext.training.loader import InputSpec, make_loader

CPU = torch.device("cpu")
PLAIN = InputSpec(16, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # normalised pixels are the pixels


@pytest.fixture
def arrays():
    generator = torch.Generator().manual_seed(0)
    # Mid greys: where bicubic overshoots 0..255, Pillow clips after each axis and the batched resampler once.
    images = torch.randint(80, 176, (10, 3, 20, 12), generator=generator, dtype=torch.uint8)
    return ArraySplit(images, torch.arange(10))


@pytest.fixture
def files(arrays, tmp_path):
    names = []
    for index, image in enumerate(arrays.images):
        names.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(names[-1])
    return FileSplit(tuple(names), arrays.labels)


def collect(loader, *place):
    return [(images.clone(), labels.clone()) for images, labels in loader.batches(*place)]


def assert_same(first, second):
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_starting_inside_an_epoch_gives_the_same_batches(kind, augment, request):
    split = request.getfixturevalue(kind)
    loader = make_loader(split, PLAIN, 4, CPU, train=True, augment=augment, seed=3)
    assert len(loader) == 3
    torch.manual_seed(0)
    every = collect(loader, 5)
    torch.manual_seed(1)  # the global stream plays no part
    assert_same(collect(loader, 5, 1), every[1:])
    assert sorted(torch.cat([labels for _, labels in every]).tolist()) == list(range(10))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_resizing_ahead_changes_nothing(arrays, augment, train, monkeypatch):
    ahead = make_loader(arrays, PLAIN, 4, CPU, train=train, augment=augment)
    kept_whole = augment == "none" or (augment == "flip" and not train)
    assert (ahead.images.shape[2:] == (16, 16)) == kept_whole
    monkeypatch.setattr("alore_ext.training.loader._KEEP_BYTES", 0)
    every_time = make_loader(arrays, PLAIN, 4, CPU, train=train, augment=augment)
    assert every_time.images.shape[2:] == (20, 12)
    assert_same(collect(ahead, 1), collect(every_time, 1))


def test_epochs_and_seeds_differ(arrays):
    def order(seed, epoch):
        loader = make_loader(arrays, PLAIN, 10, CPU, train=True, seed=seed)
        return tuple(next(loader.batches(epoch))[1].tolist())

    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3


def test_drawing_leaves_the_global_stream_alone(files):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    collect(make_loader(files, PLAIN, 4, CPU, train=True, augment="crop", workers=0))
    assert torch.equal(torch.rand(3), expected)


def test_test_loader_keeps_order(arrays):
    labels = torch.cat([labels for _, labels in make_loader(arrays, PLAIN, 3, CPU).batches()])
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_files_give_what_arrays_give(arrays, files, augment):
    options = {"train": True, "augment": augment, "seed": 1}
    from_arrays = collect(make_loader(arrays, PLAIN, 4, CPU, **options))
    from_files = collect(make_loader(files, PLAIN, 4, CPU, **options))
    for (images, labels), (other_images, other_labels) in zip(from_arrays, from_files, strict=True):
        assert torch.equal(labels, other_labels)
        assert (images - other_images).abs().max() <= 2.001  # Pillow rounds after each axis


def test_workers_change_nothing(files):
    options = {"train": True, "augment": "crop", "seed": 1}
    assert_same(
        collect(make_loader(files, PLAIN, 4, CPU, workers=2, **options), 2, 1),
        collect(make_loader(files, PLAIN, 4, CPU, workers=0, **options), 2, 1),
    )


def test_files_are_decoded_once_where_epochs_do_not_differ(files, tmp_path):
    loader = make_loader(files, PLAIN, 4, CPU, train=True, augment="flip")
    for file in tmp_path.glob("*.png"):
        file.unlink()
    assert len(collect(loader, 1)) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_file_is_named_in_one_line(files, workers):
    with open(files.files[2], "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(InputError, match=r"^--data: cannot decode .*2\.png") as raised:
        collect(make_loader(files, PLAIN, 4, CPU, augment="crop", workers=workers))
    assert "\n" not in str(raised.value)


def test_grey_files_become_rgb(tmp_path):
    Image.new("L", (5, 5), 100).save(tmp_path / "a.png")
    split = FileSplit((str(tmp_path / "a.png"),), torch.zeros(1, dtype=torch.int64))
    images, _ = next(make_loader(split, PLAIN, 1, CPU).batches())
    torch.testing.assert_close(images, torch.full((1, 3, 16, 16), 100.0))
