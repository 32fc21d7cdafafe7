"""Opened image files to the pixels of an input: what training, evaluation and serving share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from .errors import require
from .images import crop_boxes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["as_rgb", "to_square"]


def as_rgb(image: Image) -> Image:
    """The image upright and in RGB. Transparency is dropped; of an animation, the first frame is taken.

    Raises:
        Exception: whatever Pillow's decoder raises on damaged data; OSError in most cases.
    """
    image.load()
    try:
        image = require("PIL.ImageOps").exif_transpose(image)
    except Exception:  # damaged EXIF fails in many ways, and says nothing about the picture
        pass
    if image.mode.startswith("I"):  # 16-bit gray, which convert("RGB") would clip at 255
        levels = numpy.asarray(image).clip(0, 65535) >> 8  # in its own type: of a large image each copy counts
        image = require("PIL.Image").fromarray(levels.astype(numpy.uint8))
    return image.convert("RGB")


def to_square(image: Image, size: int, augment: str, draws: Tensor | None) -> Tensor:
    """Crop and resize an RGB image to uint8 [3, size, size], as `images.resized_crop` does to tensors.

    Args:
        augment: one of `images.AUGMENTATIONS`.
        draws: `images.draw_augmentation`'s numbers [5] for this image, or None for the test-time crop.
    """
    width, height = image.size
    left, top, right, bottom = crop_boxes(
        torch.tensor([float(height)]),
        torch.tensor([float(width)]),
        augment,
        None if draws is None else draws[None],
    )[0].tolist()
    image = image.resize(
        (size, size),
        require("PIL.Image").Resampling.BICUBIC,
        box=(min(left, right), top, max(left, right), bottom),
    )
    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()
    return pixels.flip(2) if right < left else pixels
