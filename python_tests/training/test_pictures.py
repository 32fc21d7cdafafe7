"""Image files as the loader reads them: upright, and with all of their gray levels."""

import tracemalloc

import numpy
import torch
from PIL import Image

from alore_ext.training.data import FileSplit
from alore_ext.training.loader import InputSpec, make_loader
from alore_ext.training.pictures import as_rgb

SPEC = InputSpec(16, (0.0,) * 3, (1 / 255,) * 3)  # the loader's floats are the pixels


def loaded(file):
    loader = make_loader(FileSplit((str(file),), torch.tensor([0])), SPEC, 1, torch.device("cpu"))
    return next(loader.batches())[0][0]


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    upright = Image.fromarray(numpy.arange(3 * 20 * 30, dtype=numpy.int64).reshape(20, 30, 3).astype(numpy.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored.png", exif=exif)
    assert torch.equal(loaded(tmp_path / "stored.png"), loaded(tmp_path / "upright.png"))


def test_16_bit_gray_is_scaled(tmp_path):
    levels = numpy.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(numpy.uint16)
    Image.fromarray(levels).save(tmp_path / "gray.png")
    expected = torch.from_numpy((levels >> 8).astype(numpy.float32)).expand(3, 16, 16)
    assert torch.allclose(loaded(tmp_path / "gray.png"), expected, atol=1e-3)


def test_16_bit_gray_is_scaled_in_little_memory():
    """A large image's copies decide what a server needs."""
    image = Image.fromarray(numpy.zeros((500, 500), numpy.uint16))
    tracemalloc.start()
    try:
        as_rgb(image)
        assert tracemalloc.get_traced_memory()[1] < 10 * 500 * 500  # of numpy: its arrays, at 2 bytes a pixel
    finally:
        tracemalloc.stop()
