"""The batched resampler against Pillow and torch, and the crops."""

import numpy
import pytest
import torch
from PIL import Image

from alore_ext.training.images import (
    batch_generator,
    crop_boxes,
    draw_augmentation,
    normalize,
    resized_crop,
)


def random_images(count=3, channels=3, height=23, width=31, low=0, high=256):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def whole(images):
    height, width = images.shape[2:]
    return torch.tensor([[0.0, 0.0, width, height]]).repeat(len(images), 1)


@pytest.mark.parametrize("size", [8, 23, 64])
def test_whole_image_is_torchs_antialiased_bicubic(size):
    images = random_images()
    expected = torch.nn.functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    got = resized_crop(images, whole(images), size)
    assert (got - expected.clamp(0, 255)).abs().max() <= 0.5 + 1e-3  # half a level: the rounding to pixels


@pytest.mark.parametrize("box", [(0, 0, 31, 23), (2.25, 3.5, 30.0, 20.75), (5.0, 6.0, 9.0, 10.0)])
@pytest.mark.parametrize("size", [7, 40])
def test_box_is_pillows(box, size):
    images = random_images(count=1, low=80, high=176)  # Pillow clips between its two passes, so no overshoot
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    expected = numpy.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    got = resized_crop(images, torch.tensor([box], dtype=torch.float32), size)[0].permute(1, 2, 0)
    assert (got - torch.from_numpy(expected.copy()).float()).abs().max() <= 2  # and rounds there


def test_reversed_box_mirrors():
    images = random_images()
    boxes = whole(images)
    mirrored = boxes[:, [2, 1, 0, 3]]
    assert torch.equal(resized_crop(images, mirrored, 16), resized_crop(images, boxes, 16).flip(3))


def test_own_size_is_exact():
    images = random_images(height=16, width=16)
    assert torch.equal(resized_crop(images, whole(images), 16), images.float())


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_boxes_stay_inside(augment):
    height, width = torch.full((500,), 37.0), torch.full((500,), 90.0)
    boxes = crop_boxes(height, width, augment, draw_augmentation(500, batch_generator(0, 0, 0)))
    left, right = torch.minimum(boxes[:, 0], boxes[:, 2]), torch.maximum(boxes[:, 0], boxes[:, 2])
    assert left.min() >= 0 and right.max() <= 90 + 1e-4
    assert boxes[:, 1].min() >= 0 and boxes[:, 3].max() <= 37 + 1e-4
    assert (right > left).all() and (boxes[:, 3] > boxes[:, 1]).all()
    mirrored = (boxes[:, 0] > boxes[:, 2]).float().mean()
    assert mirrored == 0 if augment == "none" else 0.4 < mirrored < 0.6


def test_random_crop_covers_the_area_range():
    side = torch.full((4000,), 100.0)
    boxes = crop_boxes(side, side, "crop", draw_augmentation(4000, batch_generator(0, 0, 0)))
    area = (boxes[:, 2] - boxes[:, 0]).abs() * (boxes[:, 3] - boxes[:, 1]) / 100**2
    assert 0.08 <= area.min() < 0.12 and area.max() > 0.9


def test_test_time_crop_is_central():
    box = crop_boxes(torch.tensor([256.0]), torch.tensor([512.0]), "crop", None)
    assert box.tolist() == [[144.0, 16.0, 368.0, 240.0]]


def test_batch_generator_depends_on_every_part():
    streams = {
        tuple(torch.rand(2, generator=batch_generator(*place)).tolist())
        for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(streams) == 4
    again = torch.rand(2, generator=batch_generator(0, 0, 1))
    assert torch.equal(again, torch.rand(2, generator=batch_generator(0, 0, 1)))


def test_normalize_repeats_one_channel():
    pixels = torch.tensor([0.0, 255.0]).view(1, 1, 1, 2)
    got = normalize(pixels, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 3.0], [0.0, 1.0]]).view(1, 3, 1, 2)
    torch.testing.assert_close(got, expected)
