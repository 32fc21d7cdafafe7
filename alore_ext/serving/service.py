"""From an uploaded image and an adapter's name to ranked labels: decode, batch, predict, rank. No HTTP here."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alore_ext.training.images import normalize
from alore_ext.training.loader import InputSpec

from .batching import Batcher, BatchRecord, Places
from .errors import InvalidPrediction, PredictionFailed, RequestError, UnknownAdapter
from .images import Decoder
from .settings import Settings

if TYPE_CHECKING:
    from . import AdapterPool

__all__ = ["Adapter", "Prediction", "PredictionService"]

_log = logging.getLogger("alore_ext.serving")


@dataclass(frozen=True)
class Prediction:
    """One class of the adapter that was asked for. Without class names the label is the index."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Adapter:
    """What can be asked for. `labels` is None where the adapter's file has no class names."""

    name: str
    num_classes: int
    labels: list[str] | None


@dataclass(frozen=True)
class _Job:
    pixels: Tensor  # uint8 [3, size, size]
    adapter: str
    top_k: int


class PredictionService:
    """Answers requests from a pool: images decoded on a few threads, predicted in mixed batches on one.

    Args:
        pool: what predicts; only its `predict`, `names`, `num_classes`, `labels` and `device` are used.
        spec: the input that the backbone takes.
        on_batch: called after every batch, on the worker thread.
    """

    def __init__(
        self,
        pool: AdapterPool,
        spec: InputSpec,
        settings: Settings,
        on_batch: Callable[[BatchRecord], None] | None = None,
    ) -> None:
        self.pool, self.spec = pool, spec
        self.batcher: Batcher[_Job, list[Prediction] | RequestError] = Batcher(
            self._predict,
            max_batch=settings.max_batch,
            max_delay=settings.max_delay_ms / 1000,
            max_queue=settings.max_queue,
            fatal=lambda error: isinstance(error, torch.AcceleratorError) and _lost(pool.device),
            on_batch=on_batch,
        )
        self.reading = Places(settings.max_reading, "being read")
        self.adapters: dict[str, Adapter] = {}
        self._decode = Decoder(spec.size, settings.max_pixels, settings.centre_crop)
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="alore-ext-decode")
        # Apart from decoding, which takes seconds at its worst: whatever is read waits for no image.
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="alore-ext-parse")

    def start(self) -> None:
        """Start the threads."""
        self._look()
        self.batcher.start()

    async def close(self) -> None:
        """Finish what was admitted, then end the threads."""
        await self.batcher.close()
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._parser.shutdown)

    @property
    def names(self) -> list[str]:
        """Adapters that can be asked for."""
        return list(self.adapters)

    def exclusive(self, function: Callable[[], object]) -> Future:
        """Call a function that changes the pool, while no batch runs; requests see its changes when it has ended.

        All changes of a pool that is being served go through here.
        """

        def change() -> None:
            try:
                function()
            finally:
                self._look()

        return self.batcher.between_batches(change)

    def _look(self) -> None:
        """Write down what the pool holds. Its own lock is held for as long as a batch runs: nothing for a loop."""
        self.adapters = {
            name: Adapter(name, self.pool.num_classes(name), self.pool.labels(name)) for name in self.pool.names
        }

    async def aside(self, function: Callable, *arguments):
        """Call a function on a thread for it: the event loop is no place for work that takes milliseconds."""
        return await asyncio.get_running_loop().run_in_executor(self._parser, function, *arguments)

    async def classify(self, image: bytes, adapter: str, top_k: int) -> list[Prediction]:
        """The `top_k` likeliest classes of an image file, likeliest first; all of them if there are fewer.

        The caller holds a place of `batcher.admit`.

        Raises:
            UnknownAdapter: no such adapter, or it was removed meanwhile.
            NotAnImage, ImageTooLarge: the file cannot be used.
            InvalidPrediction, PredictionFailed: the model's fault.
        """
        if adapter not in self.adapters:  # before the work of decoding
            raise UnknownAdapter.named(adapter, self.names)
        pixels = await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, image)
        try:
            answer = await self.batcher.submit(_Job(pixels, adapter, top_k))
        except RequestError:
            raise
        except Exception as error:
            if adapter not in self.adapters:  # removed since, which the pool reports in its own way
                raise UnknownAdapter.named(adapter, self.names) from None
            _log.error("prediction with adapter %r failed", adapter, exc_info=error)
            message = f"adapter {adapter!r}: the prediction failed; the server's log has the cause"
            raise PredictionFailed(message) from None
        if isinstance(answer, RequestError):
            raise answer
        return answer

    @torch.no_grad()  # not inference_mode: `normalize` keeps tensors that others use too
    def _predict(self, jobs: list[_Job]) -> list[list[Prediction] | RequestError]:
        """One batch, on the worker thread. A result that is an error belongs to its own request."""
        pixels = torch.stack([job.pixels for job in jobs]).to(self.pool.device)
        images = normalize(pixels.float(), self.spec.mean, self.spec.std)
        adapters = [job.adapter for job in jobs]
        if len(set(adapters)) == 1:
            logits = self.pool.predict(images, adapter=adapters[0])
        else:
            logits = self.pool.predict(images, adapters=adapters)
        known = self.adapters  # of this moment: a reload before the answer is sent may bring other classes
        ranked = rank(logits, max(job.top_k for job in jobs))
        return [_named(row[: job.top_k], known[job.adapter]) for row, job in zip(ranked, jobs, strict=True)]


def rank(logits: Tensor | list[Tensor], top_k: int) -> list[list[tuple[int, float]]]:
    """(index, probability) of each row's likeliest classes, softmax in fp32.

    Args:
        logits: [count, classes], or `count` tensors [classes_i].

    Rows with NaN or infinite logits have NaN probabilities.
    """
    counts = [len(row) for row in logits]
    if not isinstance(logits, Tensor):  # heads of unequal size, in one softmax and one copy to the host
        logits = torch.nn.utils.rnn.pad_sequence(
            [row.float() for row in logits], batch_first=True, padding_value=-math.inf
        )
    values, indices = logits.float().softmax(dim=1).topk(min(top_k, logits.shape[1]), dim=1)
    rows = zip(values.tolist(), indices.tolist(), counts, strict=True)
    return [list(zip(index[:count], value[:count], strict=True)) for value, index, count in rows]


def _lost(device: torch.device) -> bool:
    """Whether the device does nothing any more: CUDA gives most of its errors again at every later call."""
    try:
        torch.ones(1, device=device).item()
    except torch.AcceleratorError:
        return True
    return False


def _named(ranked: list[tuple[int, float]], adapter: Adapter) -> list[Prediction] | InvalidPrediction:
    if any(math.isnan(probability) for _, probability in ranked):
        return InvalidPrediction(f"adapter {adapter.name!r} gave logits that are not finite for this image")
    labels = adapter.labels
    return [Prediction(str(i) if labels is None else labels[i], i, probability) for i, probability in ranked]
