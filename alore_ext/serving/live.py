"""Swapping adapters in a model's own weights: always merged from the pristine ones, always into the same memory."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from alore_ext.patching.grouping import KronMerge, LoraMerge, Merge, run_merges_

from .clones import clone_sharing_tensors, replace_parameter
from .entry import Entry
from .graphs import Recorder
from .heads import HeadSwitch


@dataclasses.dataclass(eq=False)
class _Prepared:
    """How an adapter goes into the weights.

    Attributes:
        merges: from pristine weights into live ones.
        written: names of the parameters that the merges write.
        is_checked: the merged weights have been seen to be finite; they are the same bits at every activation.
        graph: the merges and copies as a CUDA graph, which saves the host's part of them.
    """

    entry: Entry
    merges: list[Merge]
    written: frozenset[str]
    is_checked: bool = False
    graph: torch.cuda.CUDAGraph | None = None


class LiveModel:
    """The model that was given, with at most one adapter in its weights.

    `base` is a clone of it that keeps the pristine weights. A weight that no adapter has touched is shared by both;
    the first adapter that will write it gives the clone a copy.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.base = clone_sharing_tensors(model)
        self.heads = HeadSwitch(model, self.base)
        self._pristine: dict[str, Tensor] = {}
        self._prepared: dict[str, _Prepared] = {}
        self._installed: _Prepared | None = None
        self._dirty: frozenset[str] = frozenset()  # weights that may differ from the pristine ones
        device = next(model.parameters()).device
        self._recorder = Recorder(device) if device.type == "cuda" else None

    @property
    def active(self) -> str | None:
        """Name of the adapter in the weights."""
        return None if self._installed is None else self._installed.entry.name

    def missing_copies(self, entry: Entry) -> dict[str, Tensor]:
        """Copies of the weights that this adapter writes and no other did, by full name. Changes nothing."""
        names = [name for record in entry.records for name in record.merged_tensors(self.model)]
        names += [f"{module}.{own}" for module in entry.head for own in self._own_head(module)]
        parameters = dict(self.model.named_parameters())
        return {n: parameters[n].detach().clone() for n in names if n not in self._pristine and n in parameters}

    def _own_head(self, module: str) -> list[str]:
        return [own for own, _ in self.base.get_submodule(module).named_parameters()]

    def prepare(self, entry: Entry, copies: dict[str, Tensor]) -> _Prepared:
        """What `add` takes; `copies` are what `missing_copies` gave. Adapters that were added stay as they are.

        May drop graphs, none of which may be running.
        """
        for name, copy in copies.items():
            self._pristine[name] = copy
            replace_parameter(self.base, name, copy)
        if self.heads.prepare(entry.head):
            for prepared in self._prepared.values():
                prepared.graph = None  # it does not bring back the base's values of the new part
        merges, written = [], set()
        for record in entry.records:
            own = entry.own_parameters(record)
            written |= record.merged_tensors(self.model).keys()
            pairs = zip(record.merges(self.model, own), record.merges(self.base, own), strict=True)
            merges += [_from_source(live, pristine) for live, pristine in pairs]
        return _Prepared(entry, merges, frozenset(written))

    def add(self, prepared: _Prepared) -> None:
        """Take in an adapter for `activate`, in the place of one of its name. Cannot fail."""
        self._prepared[prepared.entry.name] = prepared

    def remove(self, name: str) -> None:
        """Forget an adapter that is not active and whose graph is not running."""
        del self._prepared[name]

    def activate(self, name: str | None) -> None:
        """Merge an adapter from the pristine weights; None brings those back.

        Raises ValueError where a merged weight is NaN or infinite in the weights' dtype. Whatever fails, the weights
        are those from before.
        """
        target, former = None if name is None else self._prepared[name], self._installed
        try:
            self._install(target)
        except BaseException:
            self._install(former)
            raise

    @torch.no_grad()
    def _install(self, target: _Prepared | None) -> None:
        written = frozenset() if target is None else target.written
        self._restore([name for name in self._dirty if name not in written])
        self._dirty = written
        if target is None:
            self.heads.install({})
            self._installed = None
            return
        if target.graph is not None:
            target.graph.replay()
        else:
            self._write(target)
            if not target.is_checked:
                self._check_finite(target)
            if self._recorder is not None:
                # All in one memory: no two run at a time.
                beside = next((p.graph for p in self._prepared.values() if p.graph is not None), None)
                target.graph, _ = self._recorder.record(lambda: self._write(target), beside)
        self.heads.switch(target.entry.head)
        self._installed = target

    def _write(self, target: _Prepared) -> None:
        """All that an activation does on the device."""
        # Biases are merged in place: they start from their pristine values too.
        self._restore([name for name in target.written if self._pristine[name].dim() == 1])
        run_merges_(target.merges)
        self.heads.copy(target.entry.head)

    def _restore(self, names: list[str]) -> None:
        if names:
            live = [self.model.get_parameter(name) for name in names]
            torch._foreach_copy_(live, [self._pristine[name] for name in names])

    def _check_finite(self, target: _Prepared) -> None:
        weights = [self.model.get_parameter(name) for name in target.written]
        if not math.isfinite(get_total_norm(weights, math.inf).item()):
            name = next(n for n in target.written if not torch.isfinite(self.model.get_parameter(n)).all())
            dtype = self.model.get_parameter(name).dtype
            raise ValueError(
                f"AdapterPool.activate: {target.entry.name!r}: the merged {name} holds NaN or infinity in {dtype}"
            )
        target.is_checked = True


def _from_source(live: Merge, pristine: Merge) -> Merge:
    """A merge from the pristine weight. A plan lets no weight take two merges, so none would start over."""
    if not isinstance(live, (KronMerge, LoraMerge)):
        raise TypeError(f"a pool merges Kronecker and low-rank updates, got {type(live).__name__}")
    return dataclasses.replace(live, source=pristine.weight)
