"""CUDA graphs: how they are recorded, and the merged forward as one for each batch size and shape of classifier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .clones import logits_of

_WARM_UP = 3  # cuBLAS, cuDNN and the autotuner settle in the first calls
# A process may have one capture under way: what begins one synchronizes the device and empties the allocator's caches,
# which fails while another thread captures.
_CAPTURING = threading.Lock()
_Result = TypeVar("_Result")


class Recorder:
    """Records work on one device as CUDA graphs, in one thread of the process at a time.

    It has a stream of its own, for graphs that share memory must be captured on one. torch's default is the whole
    process's: on whichever device captured first, and with one cuBLAS workspace for the graphs of all.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def record(
        self, work: Callable[[], _Result], beside: torch.cuda.CUDAGraph | None, warm_up: int = 0
    ) -> tuple[torch.cuda.CUDAGraph, _Result]:
        """What `work` does as a graph, and what it returned: the graph writes there.

        Args:
            work: runs `warm_up` times and is then recorded, which runs nothing.
            beside: a graph of this recorder to share memory with; the two must not run at the same time. A graph and no
                handle of its memory, which could not be used again once the last graph in it is gone.
        """
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for _ in range(warm_up):
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        memory = None if beside is None else beside.pool()
        # thread_local: what other threads do on the device meanwhile is no part of it.
        options = {"pool": memory, "stream": self._stream, "capture_error_mode": "thread_local"}
        with _CAPTURING, torch.no_grad(), torch.cuda.graph(graph, **options):
            result = work()
        return graph, result


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    logits: Tensor


class ForwardGraphs:
    """Captured forwards of one model.

    A graph holds addresses, not values: it runs whatever adapter is in the weights when it is replayed, because a
    swap writes into the same memory.
    """

    def __init__(self, model: nn.Module, batch_sizes: tuple[int, ...], like: Tensor):
        self.batch_sizes = batch_sizes
        self._model = model
        self._shape = like.shape[1:]
        self._like = like
        self._captured: dict[tuple, _Captured] = {}
        self._recorder = Recorder(like.device)

    def capture(self, head: tuple) -> None:
        """Capture every batch size for the classifier that is installed, told apart by its shapes `head`."""
        for size in sorted(self.batch_sizes, reverse=True):  # the largest first: the others fit into its memory
            if (size, head) not in self._captured:
                self._captured[size, head] = self._capture(size)

    def keep(self, heads: Collection[tuple]) -> None:
        """Drop the graphs of all other classifiers. None of them may be running."""
        self._captured = {key: captured for key, captured in self._captured.items() if key[1] in heads}

    def run(self, images: Tensor, head: tuple) -> Tensor | None:
        """Logits [batch, classes] by the smallest graph that takes the batch; None where none does."""
        batch = images.shape[0]
        size = min((size for size in self.batch_sizes if size >= batch), default=None)
        captured = self._captured.get((size, head))
        if captured is None or images.shape[1:] != self._shape or batch == 0:
            return None
        captured.images[:batch].copy_(images)
        captured.graph.replay()
        return captured.logits[:batch].clone()

    def _capture(self, size: int) -> _Captured:
        images = self._like.new_zeros(size, *self._shape)
        beside = next((captured.graph for captured in self._captured.values()), None)
        graph, logits = self._recorder.record(lambda: logits_of(self._model(images)), beside, _WARM_UP)
        return _Captured(graph, images, logits)
