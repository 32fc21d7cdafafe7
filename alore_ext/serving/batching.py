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

from .errors import DeviceFailed, QueueFull, ShuttingDown

__all__ = ["BatchRecord", "Batcher", "Places"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger("alore_ext.serving")

# So many batches in a row of which nothing succeeded, and nobody is sent here for a while; then it is tried again.
_FAILED_BATCHES = 5
_RETRY_S = 30.0


@dataclass(frozen=True)
class BatchRecord:
    """What a batch was like, for metrics."""

    size: int
    waited: tuple[float, ...]  # seconds from submit to the start of the batch, one a request
    seconds: float
    failed: int


class Places:
    """How many requests may be at one stage at a time.

    Args:
        limit: of them.
        stage: for the message: "300 requests are <stage>, of 256 at the most".
    """

    def __init__(self, limit: int, stage: str) -> None:
        self.limit, self._stage = limit, stage
        self.taken = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises QueueFull where all are taken."""
        if self.taken >= self.limit:
            raise QueueFull(f"{self.taken} requests are {self._stage}, of {self.limit} at the most: try again")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """One of them. Raises QueueFull where all are taken."""
        with self._lock:
            self.check()
            self.taken += 1
        try:
            yield
        finally:
            with self._lock:
                self.taken -= 1


@dataclass(eq=False)  # compared by identity: two clients may send the same item
class _Entry(Generic[Item]):
    item: Item
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop
    arrived: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Result]):
    """Runs items in batches: `run` maps a list of items to as many results, in order, on the worker thread.

    A batch that fails is halved until the items that make it fail are alone; only those get the error. After an error
    that is `fatal` nothing more is run.

    Args:
        max_batch: most items in one call of `run`.
        max_delay: seconds that the first of a batch waits for others at the most.
        max_queue: most requests admitted at a time: those being prepared, waiting, and in work.
        fatal: whether after this error of `run` it cannot succeed any more, with any items.
        on_batch: called on the worker thread after every batch. What it raises is logged.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_delay: float,
        max_queue: int,
        fatal: Callable[[Exception], bool] = lambda error: False,
        on_batch: Callable[[BatchRecord], None] | None = None,
    ) -> None:
        self._run, self._fatal, self._on_batch = run, fatal, on_batch
        self.max_batch, self.max_delay = max_batch, max_delay
        self._places = Places(max_queue, "waiting")
        self._waiting: deque[_Entry[Item]] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._broken = False  # by a fatal error
        self._failures, self._last_failure = 0, 0.0  # batches in a row of which nothing succeeded
        self._closing = False  # admits nobody
        self._stopping = False  # the worker ends once the queue is empty
        self._thread = threading.Thread(target=self._work, name="alore-ext-predict", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    @property
    def live(self) -> bool:
        """Whether this process can answer anything, now or later."""
        return self._thread.is_alive() and not self._stopping and not self._broken

    @property
    def ready(self) -> bool:
        """Whether requests are admitted, and were not all in vain of late."""
        failing = self._failures >= _FAILED_BATCHES and time.monotonic() - self._last_failure < _RETRY_S
        return self.live and not self._closing and not failing

    @property
    def admitted(self) -> int:
        """Requests admitted and not yet answered."""
        return self._places.taken

    @property
    def waiting(self) -> int:
        """Items submitted that no batch has taken yet."""
        return len(self._waiting)

    def check(self) -> None:
        """Raises what `admit` would raise now: for a request that has something to do before."""
        if self._broken:
            raise DeviceFailed("the device has failed, and this server must be started anew")
        if self._closing or not self.live:
            raise ShuttingDown("the server is shutting down")
        self._places.check()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place for one request, from before its image is decoded until its answer is there.

        Held from so early because what a decoded image costs is more than what a request costs in the queue.

        Raises:
            QueueFull: `max_queue` requests are admitted.
            ShuttingDown: `close` was called.
            DeviceFailed: after a fatal error.
        """
        self.check()
        with self._places.hold():
            yield

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
        while self.admitted and self._thread.is_alive():
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
                if future.set_running_or_notify_cancel():
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
        failed = sum(error is not None for _, _, error in outcomes)
        self._failures, self._last_failure = (self._failures + 1 if failed == len(batch) else 0), time.monotonic()
        _deliver(outcomes)
        if self._on_batch is not None:
            waited = tuple(started - entry.arrived for entry in batch)
            try:
                self._on_batch(BatchRecord(len(batch), waited, time.monotonic() - started, failed))
            except Exception:  # whoever counts batches does not end them
                _log.exception("on_batch failed")

    def _attempt(self, batch: list[_Entry[Item]]) -> list[tuple[_Entry[Item], Result | None, Exception | None]]:
        if self._broken:
            error = DeviceFailed("the device has failed, and this server must be started anew")
            return [(entry, None, error) for entry in batch]
        try:
            results = self._run([entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results came for a batch of {len(batch)}")
        except Exception as error:
            if self._fatal(error):
                self._broken = True
                _log.critical("nothing more can be predicted, start the server anew: %s", error)
                return [(entry, None, error) for entry in batch]
            if len(batch) == 1:
                return [(batch[0], None, error)]
            _log.warning("a batch of %d failed (%s: %s), halved", len(batch), type(error).__name__, error)
        else:
            return [(entry, result, None) for entry, result in zip(batch, results, strict=True)]
        middle = len(batch) // 2
        return self._attempt(batch[:middle]) + self._attempt(batch[middle:])


def _call(function: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
    except BaseException:  # it ends the thread
        future.set_exception(ShuttingDown("the server is shutting down"))
        raise


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
