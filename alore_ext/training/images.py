"""From stored pixels to the model's input, in batches, on whatever device the pixels are on.

A crop is a box in source pixels. The whole image is one box, the centre crop another, a random resized crop a
third: one resampler serves them all, so training and test images go through the same arithmetic.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["AUGMENTATIONS", "batch_generator", "crop_boxes", "draw_augmentation", "normalize", "resized_crop"]

# none: the whole image resized to the square input (VTAB-1k). flip: the same, mirrored half of the time.
# crop: random resized crop and flip to train, the central 7/8 to test (FGVC).
AUGMENTATIONS = ("none", "flip", "crop")

_CENTRE = 224 / 256
_MIN_AREA = 0.08
_LOG_RATIO = torch.log(torch.tensor(4 / 3)).item()


def batch_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The random stream of one batch, a pure function of its place: resuming needs no stored state."""
    import numpy

    word = int(numpy.random.SeedSequence([seed, epoch, step]).generate_state(1, numpy.uint64)[0])
    return torch.Generator().manual_seed(word & (2**63 - 1))


def draw_augmentation(count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers [count, 5] that `crop_boxes` turns into area, aspect, left, top and mirror."""
    return torch.rand(count, 5, generator=generator)


def crop_boxes(height: Tensor, width: Tensor, augment: str, draws: Tensor | None) -> Tensor:
    """Boxes [count, 4] as (left, top, right, bottom) in source pixels; right < left mirrors the image.

    Args:
        height, width: float tensors [count], the images' sizes.
        augment: one of `AUGMENTATIONS`.
        draws: `draw_augmentation`'s numbers [count, 5], or None for the test-time crop.
    """
    zero = torch.zeros_like(width)
    if augment == "crop" and draws is None:
        side = torch.minimum(height, width) * _CENTRE
        left, top = (width - side) / 2, (height - side) / 2
        return torch.stack([left, top, left + side, top + side], dim=1)
    if augment == "none" or draws is None:
        return torch.stack([zero, zero, width, height], dim=1)
    if augment == "flip":
        left, top, right, bottom = zero, zero, width, height
    else:
        area = height * width * (_MIN_AREA + (1 - _MIN_AREA) * draws[:, 0])
        ratio = torch.exp((2 * draws[:, 1] - 1) * _LOG_RATIO)
        # Too long a side is cut to the image instead of drawing again: a fixed count of draws a sample.
        box_width = torch.minimum(torch.sqrt(area * ratio), width)
        box_height = torch.minimum(torch.sqrt(area / ratio), height)
        left, top = (width - box_width) * draws[:, 2], (height - box_height) * draws[:, 3]
        right, bottom = left + box_width, top + box_height
    mirror = draws[:, 4] < 0.5
    left, right = torch.where(mirror, right, left), torch.where(mirror, left, right)
    return torch.stack([left, top, right, bottom], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop each image to its box and resize it: antialiased bicubic, as Pillow's ``resize(box=...)``.

    Both axes are a small dense matrix per image, so a batch is two batched GEMMs on any device.

    Args:
        images: uint8 [count, channels, height, width].
        boxes: float [count, 4], `crop_boxes`.

    Returns:
        float32 [count, channels, size, size], rounded to whole numbers in 0..255 like stored pixels.
    """
    boxes = boxes.to(images.device)
    columns = _resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[3], size)
    rows = _resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[2], size)
    out = rows.unsqueeze(1) @ images.float() @ columns.unsqueeze(1).transpose(2, 3)
    return out.round_().clamp_(0, 255)


def _resize_matrix(start: Tensor, stop: Tensor, length: int, size: int) -> Tensor:
    """Weights [count, size, length] that resample [start, stop) of a line of pixels to ``size`` pixels."""
    span = (stop - start)[:, None]
    step = span / size
    width = step.abs().clamp(min=1)  # shrinking widens the kernel: antialiasing
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * step
    pixel = torch.arange(length, device=start.device) + 0.5
    # Like Pillow, a kernel may reach over the box's edge, where there are pixels, but not over the image's.
    weights = _cubic((pixel - centre[:, :, None]) / width[:, :, None])
    return weights / weights.sum(dim=2, keepdim=True)


def _cubic(t: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, which Pillow and torch's antialiased resize use."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels / 255 - mean) / std per channel; one channel is repeated to as many as ``mean`` has.

    Args:
        pixels: float [count, 1 or channels, height, width] in 0..255.
    """
    scale, shift = _affine(mean, std, pixels.device)
    return pixels.expand(-1, len(mean), -1, -1) * scale + shift


@lru_cache(maxsize=8)  # a copy to the device for every batch would make it wait
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
