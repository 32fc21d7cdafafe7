"""Batches of normalised images on the device, in an order that is a pure function of (seed, epoch, step).

In-memory splits are cropped, resized and normalised on the device itself, with no workers. Files are decoded
by DataLoader workers; when every epoch would decode the same pixels and they fit, they are decoded once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .data import ArraySplit, FileSplit
from .errors import InputError, require
from .images import batch_generator, crop_boxes, draw_augmentation, normalize, resized_crop
from .pictures import as_rgb, to_square

__all__ = ["InputSpec", "Loader", "make_loader"]

_KEEP_BYTES = 1 << 30  # of resized pixels, kept so that later epochs need not make them again
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_ORDER_STEP = 2**32 - 1  # the step whose stream shuffles the epoch; no epoch has as many batches


@dataclass(frozen=True)
class InputSpec:
    """What the model takes: a square of ``size`` pixels, normalised with a mean and std per channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Loader:
    """Batches (images float32 [batch, channels, size, size], labels int64 [batch]) of one split.

    A training loader (``train=True``) shuffles and augments; its last batch may be short.
    """

    def __init__(
        self,
        labels: Tensor,
        spec: InputSpec,
        batch_size: int,
        device: torch.device,
        *,
        train: bool,
        augment: str,
        seed: int,
    ) -> None:
        self.spec, self.batch_size, self.device = spec, batch_size, device
        self.train, self.augment, self.seed = train, augment, seed
        self.count = len(labels)
        self.labels = labels

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from ``first_step`` on: the same ones whether or not the earlier were drawn."""
        if self.train:
            order = torch.randperm(self.count, generator=batch_generator(self.seed, epoch, _ORDER_STEP))
        else:
            order = torch.arange(self.count)
        plan = []
        for step in range(first_step, len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            draws = None
            if self.train and self.augment != "none":
                draws = draw_augmentation(len(index), batch_generator(self.seed, epoch, step))
            plan.append((index, draws))
        for (index, _), pixels in zip(plan, self._pixels(plan), strict=True):
            images = normalize(pixels.to(self.device, non_blocking=True).float(), self.spec.mean, self.spec.std)
            yield images, self.labels[index.to(self.labels.device)].to(self.device, non_blocking=True)

    def _pixels(self, plan: list[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
        raise NotImplementedError


class _ArrayLoader(Loader):
    def __init__(self, split: ArraySplit, *args, **kwargs) -> None:
        super().__init__(split.labels, *args, **kwargs)
        self.images = split.images.to(self.device) if _fits(split.images, self.device) else split.images
        self.labels = split.labels.to(self.device)
        always_whole = self.augment == "none" or (self.augment == "flip" and not self.train)
        channels, size = self.images.shape[1], self.spec.size
        if always_whole and self.count * channels * size**2 <= _KEEP_BYTES:
            # Every epoch would resize to the same pixels, whole numbers in 0..255: uint8 loses nothing.
            resized = [self._crop(index, None).byte() for index in torch.arange(self.count).split(256)]
            self.images = torch.cat(resized)

    def _pixels(self, plan):
        for index, draws in plan:
            yield self._crop(index, draws)

    def _crop(self, index: Tensor, draws: Tensor | None) -> Tensor:
        images = self.images[index.to(self.images.device)].to(self.device)
        height, width = images.shape[2:]
        if height == width == self.spec.size and draws is None and self.augment != "crop":
            return images
        sides = (torch.full((len(index),), float(side)) for side in (height, width))
        return resized_crop(images, crop_boxes(*sides, self.augment, draws), self.spec.size)


class _FileLoader(Loader):
    def __init__(self, split: FileSplit, *args, workers: int, **kwargs) -> None:
        super().__init__(split.labels, *args, **kwargs)
        self.dataset = _Files(split.files, self.spec.size, self.augment)
        self.workers = workers

    def _pixels(self, plan):
        keys = [
            [(int(i), None if draws is None else draws[row]) for row, i in enumerate(index)] for index, draws in plan
        ]
        yield from _run(self.dataset, keys, self.workers, pin_memory=self.device.type == "cuda")


class _Files(torch.utils.data.Dataset):
    """Decodes, crops and resizes single files: (index, draws or None) -> uint8 [3, size, size]."""

    def __init__(self, files: tuple[str, ...], size: int, augment: str) -> None:
        self.files, self.size, self.augment = files, size, augment

    def __getitem__(self, key: tuple[int, Tensor | None]) -> Tensor:
        index, draws = key
        try:
            with require("PIL.Image").open(self.files[index]) as file:
                image = as_rgb(file)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError on broken PNGs
            raise InputError(f"--data: cannot decode {self.files[index]}: {error}") from error
        return to_square(image, self.size, self.augment, draws)

    def __len__(self) -> int:
        return len(self.files)


def _run(dataset: _Files, keys: list, workers: int, pin_memory: bool = False) -> Iterator[Tensor]:
    """The dataset's batches, one per entry of ``keys``."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_process_group,
        generator=torch.Generator(),  # else it would draw its base seed from the run's own random stream
    )
    try:
        with _held(_STOP_SIGNALS):
            batches = iter(loader)  # starts the workers
        yield from batches
    except InputError as error:  # a worker's error arrives with its whole traceback as the message
        raise InputError(str(error).strip().splitlines()[-1].rpartition("InputError: ")[2]) from error


def _fits(images: Tensor, device: torch.device) -> bool:
    """Whether the images may stay on the device for the whole run: they take at most half of what is free."""
    return device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2


@contextmanager
def _held(signals: set[signal.Signals]) -> Iterator[None]:
    """Signals wait until the end, here and, until they say otherwise, in processes that start meanwhile."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _leave_process_group(_worker: int) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM go to the whole group. The main process decides when to stop,
    # and needs its workers to finish the step. They still obey its own SIGTERM.
    os.setpgrp()
    for early in signal.sigpending() & _STOP_SIGNALS:
        signal.sigwait({early})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def make_loader(
    split: ArraySplit | FileSplit,
    spec: InputSpec,
    batch_size: int,
    device: torch.device,
    *,
    train: bool = False,
    augment: str = "none",
    seed: int = 0,
    workers: int = 0,
) -> Loader:
    """The loader that fits the split. ``augment`` chooses the test-time crop too (`images.AUGMENTATIONS`)."""
    options = {"train": train, "augment": augment, "seed": seed}
    if isinstance(split, FileSplit):
        fits = len(split) * 3 * spec.size**2 <= _KEEP_BYTES
        if augment == "crop" or not fits:
            return _FileLoader(split, spec, batch_size, device, workers=workers, **options)
        split = ArraySplit(_decode(split.files, spec.size, workers), split.labels)
    return _ArrayLoader(split, spec, batch_size, device, **options)


@lru_cache(maxsize=3)  # train, val and test: methods that are compared share them
def _decode(files: tuple[str, ...], size: int, workers: int) -> Tensor:
    """Every file's image, whole, as uint8 [count, 3, size, size]."""
    decoded = _run(_Files(files, size, "none"), [[(index, None)] for index in range(len(files))], workers)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    progress = require("tqdm").tqdm(decoded, "decoding", len(files), unit="image", leave=False)
    for index, pixels in enumerate(progress):
        images[index] = pixels[0]
    return images
