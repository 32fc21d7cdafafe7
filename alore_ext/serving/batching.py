"""Dynamic batching: requests of many clients wait a little and run together, on one thread of their own.

The event loop admits requests and awaits their results. One worker thread takes what has gathered and runs it, so
that the device never waits for the event loop, and whatever else must not overlap with a batch (replacing an
adapter) runs on the same thread between two batches.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import QueueFull, ShuttingDown

__all__ = ["BatchRecord", "Batcher"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger("alore_ext.serving")


@dataclass(frozen=True)
class BatchRecord:
    """What a batch was like, for metrics."""

    size: int
    waited: tuple[float, ...]  # seconds from submit to the start of the batch, one a request
    seconds: float
    failed: int


@dataclass(eq=False)  # compared by identity: two clients may send the same item
class _Entry(Generic[Item]):
    item: Item
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    arrived: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Result]):
    """Runs items in batches: `run` maps a list of items to as many results, in order, on the worker thread.

    A batch that fails is halved until the items that make it fail are alone; only those get the error.

    Args:
        max_batch: most items in one call of `run`.
        max_delay: seconds that the first of a batch waits for others at the most.
        max_queue: most requests admitted at a time: those being prepared, waiting, and in work.
        on_batch: called on the worker thread after every batch.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_delay: float,
        max_queue: int,
        on_batch: Callable[[BatchRecord], None] | None = None,
    ) -> None:
        self._run, self._on_batch = run, on_batch
        self.max_batch, self.max_delay, self.max_queue = max_batch, max_delay, max_queue
        self._waiting: deque[_Entry[Item]] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._admitted = 0
        self._closing = False  # admits nobody
        self._stopping = False  # the worker ends once the queue is empty
        self._thread = threading.Thread(target=self._work, name="alore-ext-predict", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are admitted and the worker is there to run them."""
        return self._thread.is_alive() and not self._closing and not self._stopping

    @property
    def admitted(self) -> int:
        """Requests admitted and not yet answered."""
        return self._admitted

    @property
    def waiting(self) -> int:
        """Items submitted that no batch has taken yet."""
        return len(self._waiting)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place for one request, from before its body is read until its answer is there.

        Held from so early because what a request costs while it is prepared (its body, its decoded image) is more
        than what it costs in the queue.

        Raises:
            QueueFull: `max_queue` requests are admitted.
            ShuttingDown: `close` was called.
        """
        with self._changed:
            if not self.ready:
                raise ShuttingDown("the server is shutting down")
            if self._admitted >= self.max_queue:
                raise QueueFull(f"{self._admitted} requests are waiting, of {self.max_queue} at the most: try again")
            self._admitted += 1
        try:
            yield
        finally:
            with self._changed:
                self._admitted -= 1

    async def submit(self, item: Item) -> Result:
        """Wait for the item's result. Cancelling the wait takes the item out of the queue.

        Raises:
            ShuttingDown: the worker has ended.
            Exception: what `run` raised for this item alone.
        """
        loop = asyncio.get_running_loop()
        entry = _Entry(item, loop.create_future(), loop)
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise ShuttingDown("the server is shutting down")
            self._waiting.append(entry)
            if len(self._waiting) in (1, self.max_batch):  # what the worker may be waiting for
                self._changed.notify()
        try:
            return await entry.future
        except asyncio.CancelledError:
            with self._changed:
                if entry in self._waiting:
                    self._waiting.remove(entry)
            raise

    def between_batches(self, function: Callable[[], Any]) -> Future:
        """Call the function on the worker thread, while no batch runs; before the next batch."""
        future: Future = Future()
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise ShuttingDown("the server is shutting down")
            self._jobs.append((function, future))
            self._changed.notify()
        return future

    async def close(self) -> None:
        """Admit nobody, wait until every admitted request has its answer, and end the worker."""
        self._closing = True
        while self._admitted and self._thread.is_alive():
            await asyncio.sleep(0.005)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    # The worker thread

    def _work(self) -> None:
        try:
            while (work := self._next()) is not None:
                if isinstance(work, list):
                    self._process(work)
                else:
                    _call(*work)
        finally:  # an error that is no Exception ends the thread: nobody may wait for it for ever
            with self._changed:
                self._stopping = True
                left, self._waiting = list(self._waiting), deque()
                jobs, self._jobs = list(self._jobs), deque()
            for _, future in jobs:
                future.set_exception(ShuttingDown("the server is shutting down"))
            _deliver([(entry, None, ShuttingDown("the server is shutting down")) for entry in left])

    def _next(self) -> list[_Entry[Item]] | tuple[Callable[[], Any], Future] | None:
        """Wait for a job or a batch; None at the end."""
        with self._changed:
            while True:
                if self._jobs:
                    return self._jobs.popleft()
                if self._waiting:
                    remaining = self._waiting[0].arrived + self.max_delay - time.monotonic()
                    if remaining <= 0 or len(self._waiting) >= self.max_batch or self._stopping:
                        size = min(len(self._waiting), self.max_batch)
                        return [self._waiting.popleft() for _ in range(size)]
                    self._changed.wait(remaining)
                elif self._stopping:
                    return None
                else:
                    self._changed.wait()

    def _process(self, batch: list[_Entry[Item]]) -> None:
        started = time.monotonic()
        try:
            outcomes = self._attempt(batch)
        except BaseException:  # it ends the thread
            _deliver([(entry, None, ShuttingDown("the server is shutting down")) for entry in batch])
            raise
        _deliver(outcomes)
        if self._on_batch is not None:
            waited = tuple(started - entry.arrived for entry in batch)
            failed = sum(error is not None for _, _, error in outcomes)
            self._on_batch(BatchRecord(len(batch), waited, time.monotonic() - started, failed))

    def _attempt(self, batch: list[_Entry[Item]]) -> list[tuple[_Entry[Item], Result | None, Exception | None]]:
        try:
            results = self._run([entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results came for a batch of {len(batch)}")
        except Exception as error:
            if len(batch) == 1:
                return [(batch[0], None, error)]
            _log.warning("a batch of %d failed (%s: %s), halved", len(batch), type(error).__name__, error)
        else:
            return [(entry, result, None) for entry, result in zip(batch, results, strict=True)]
        middle = len(batch) // 2
        return self._attempt(batch[:middle]) + self._attempt(batch[middle:])


def _call(function: Callable[[], Any], future: Future) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _deliver(outcomes: Sequence[tuple[_Entry, Any, Exception | None]]) -> None:
    """Hand results to the event loops that wait for them, each woken once."""
    by_loop: dict[asyncio.AbstractEventLoop, list] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome[0].loop, []).append(outcome)
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, own)
        except RuntimeError:  # the loop was closed: its clients are gone
            _log.warning("%d results have nobody to go to", len(own))


def _resolve(outcomes: list[tuple[_Entry, Any, Exception | None]]) -> None:
    for entry, result, error in outcomes:
        if entry.future.done():  # its client went away meanwhile
            continue
        if error is None:
            entry.future.set_result(result)
        else:
            entry.future.set_exception(error)
