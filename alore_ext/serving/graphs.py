"""The merged forward as CUDA graphs, one for each batch size and shape of classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .clones import logits_of

_WARM_UP = 3  # cuBLAS, cuDNN and the autotuner settle in the first calls


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
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, head: tuple) -> None:
        """Capture every batch size for the classifier that is installed, told apart by its shapes `head`."""
        for size in sorted(self.batch_sizes, reverse=True):  # the largest first: the others fit into its memory
            if (size, head) not in self._captured:
                self._captured[size, head] = self._capture(size)

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
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._model(images)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile is no part of it.
        with torch.no_grad(), torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = logits_of(self._model(images))
        return _Captured(graph, images, logits)
