"""What callers hand to an `AdapterPool`: checked, and refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from alore_ext._example_images import example_images


def check_images(images: Tensor, channels: int, caller: str, argument: str = "images") -> None:
    """Raises TypeError, or ValueError where they are no [batch, channels, height, width]; the batch may be empty."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{caller}: {argument} must be a floating-point tensor, got {got}")
    if images.dim() != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
        raise ValueError(f"{caller}: {argument} must be [batch, {channels}, height, width], got {list(images.shape)}")


def example_for_capture(model: nn.Module, given: Tensor | None, channels: int) -> Tensor:
    """Images on the model's device and in its dtype, of the size to capture: the model's own where none are given.

    Raises TypeError or ValueError where what is given is no batch of images, or the model names no size.
    """
    caller, argument = "AdapterPool.capture", "example_image"
    if given is not None:
        check_images(given, channels, caller, argument)
    return example_images(model, given, caller, argument)


@contextlib.contextmanager
def sizes_refused_by_name(images: Tensor, caller: str) -> Iterator[None]:
    """Around a model's forward: the assertion with which it refuses a height and width becomes a ValueError."""
    try:
        yield
    except AssertionError as error:
        height, width = images.shape[2:]
        raise ValueError(f"{caller}: the model does not take images of {height}x{width}: {error}") from error


def as_names(adapters: Sequence[str | None], batch: int) -> list[str | None]:
    """One name an image. Raises ValueError for what is no sequence of them, and for another number of them."""
    if isinstance(adapters, (str, bytes)) or not isinstance(adapters, Iterable):
        raise ValueError(f"AdapterPool.predict: adapters must name one adapter an image, got {adapters!r}")
    names = list(adapters)
    if len(names) != batch:
        raise ValueError(f"AdapterPool.predict: adapters must have a name for each of {batch} images, got {len(names)}")
    return names


def as_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    """Each size once. Raises ValueError for anything else than integers of at least 1."""
    sizes = tuple(dict.fromkeys(batch_sizes)) if isinstance(batch_sizes, Iterable) else ()
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"AdapterPool.capture: batch_sizes must be integers of at least 1, got {batch_sizes!r}")
    return sizes
