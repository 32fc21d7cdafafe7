"""Running an adapter with a part of its experts: what `retain_experts` and `merge_` share."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable

from torch import nn

from .merged import allow_training, refuse_training, restore_training
from .records import AdapterRecord
from .state import PatchState


def check_keep(records: Iterable[AdapterRecord], keep: Iterable[int], caller: str, name: str) -> tuple[int, ...]:
    """The expert indices, ascending.

    Raises:
        TypeError: not an iterable of ints.
        ValueError: none, one twice, or one that a layer does not have (naming the layer); no layer has experts.
    """
    expected = f"{caller}: {name} must be None or indices of experts, counted from 0"
    if isinstance(keep, (str, bytes)) or not isinstance(keep, Iterable):
        raise TypeError(f"{expected}, got {keep!r}")
    entries = tuple(keep)
    if not entries:
        raise ValueError(f"{expected}, got none")
    if any(isinstance(entry, bool) or not hasattr(entry, "__index__") for entry in entries):
        raise TypeError(f"{expected}, got {list(entries)}")
    kept = tuple(sorted(map(operator.index, entries)))
    if len(set(kept)) < len(kept):
        raise ValueError(f"{expected}, each once, got {list(kept)}")
    if kept[0] < 0:
        raise ValueError(f"{expected}, got {kept[0]}")
    counts = [(record.module, count) for record in records if (count := record.expert_count()) is not None]
    if not counts:
        raise ValueError(f"{caller}: no adapter of the model has experts")
    for module, count in counts:
        if kept[-1] >= count:
            raise ValueError(f"{caller}: {name} has expert {kept[-1]}, but {module} has {count} (0 to {count - 1})")
    return kept


def with_kept(records: Iterable[AdapterRecord], kept: tuple[int, ...] | None) -> tuple[AdapterRecord, ...]:
    """The records with these experts alone; adapters without experts stay whole."""
    return tuple(
        record if record.expert_count() is None else dataclasses.replace(record, kept=kept) for record in records
    )


def retain_(model: nn.Module, state: PatchState, kept: tuple[int, ...] | None) -> None:
    """Run these experts alone from now on, in eval mode; None runs all again, in the modes from before.

    While the model is merged only what `unmerge_` will bring back is changed.
    """
    if kept == state.kept:
        return
    state.records = with_kept(state.records, kept)
    if state.merged is None:
        for record in state.records:
            if record.expert_count() is not None and record.is_attached(model):
                model.get_submodule(record.module).__dict__["_kept_experts"] = kept
    if state.kept is None:
        state.training_before_kept = {name: module.training for name, module in model.named_modules()}
        model.eval()
        refuse_training(model)
    elif kept is None:
        if state.merged is None:
            allow_training(model)
            restore_training(model, state.training_before_kept)
        else:
            state.merged.training = state.training_before_kept
        state.training_before_kept = None
    state.kept = kept
