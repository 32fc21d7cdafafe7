"""Folding adapters into the backbone's own weights, and taking them out again.

A merged model is the plain backbone: its own classes, its own state_dict keys, no adapter left in the
forward. Weights are merged in float32 (float64 for float64) and rounded once. Subtracting the update again
would not give the rounding back, so `merge_` keeps copies of the weights that it changes, and `unmerge_`
restores every bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from .patching.apply import restore_requires_grad
from .patching.attaching import OnError, attach_all, check_attached, detach_all, undo_on_error
from .patching.grouping import Merge, run_merges_
from .patching.merged import allow_training, refuse_training, restore_base_, restore_training
from .patching.records import SHARED_SCALE, AdapterRecord
from .patching.retained import check_keep, retain_, with_kept
from .patching.state import MergedState, clear_state, require_state

_KEEP_BASE = ("device", "cpu", None)


def merge_(model: nn.Module, keep_base: str | None = "device", keep_experts: Iterable[int] | None = None) -> nn.Module:
    """Fold all adapters into the weights, in place, and put the model in eval mode.

    Until `unmerge_`, `model.train()` and `save_adapter` raise, and `state_dict()` gives the merged weights
    under the backbone's own keys.

    Args:
        model: a patched model.
        keep_base: where the original weights are kept: "device" (beside them), "cpu", or None (nowhere: the
            merge cannot be undone).
        keep_experts: indices of the experts to merge, as for `retain_experts`, whatever that retains; the others
            come back with `unmerge_`. None merges those that run.

    Returns:
        The same model.

    Raises:
        TypeError: keep_experts is no iterable of ints.
        ValueError: not patched; merged already; a keep_base of another kind; experts that a layer does not have; an
            adapter that no weight can take, saying why; a NaN or infinity in an adapter or in a merged weight, naming
            it. The model is left as it was.
    """
    state = require_state(model, "merge_")
    if keep_base not in _KEEP_BASE:
        raise ValueError(f"merge_: keep_base must be one of {_KEEP_BASE}, got {keep_base!r}")
    if state.merged is not None:
        raise ValueError(f"merge_: {type(model).__name__} is already merged")
    check_attached(model, state, "merge_")
    records = state.records
    if keep_experts is not None:
        records = with_kept(records, check_keep(records, keep_experts, "merge_", "keep_experts"))
    for record in records:
        if reason := record.merge_refusal():
            raise ValueError(f"merge_: the adapter at {record.module} cannot be merged: {reason}")
    parameters = dict(model.named_parameters())
    _check_finite({name: parameters[name] for name in state.adapter_names()})

    training = {name: module.training for name, module in model.named_modules()}
    with undo_on_error() as on_error:
        copies = _merge_weights_(model, records, parameters, keep_base, on_error)
        adapters = detach_all(model, state)
        on_error(lambda: attach_all(model, state.records, adapters))
        on_error(lambda: restore_training(model, training))
        model.eval()
        state.merged = MergedState(adapters, None if keep_base is None else copies, training)
        refuse_training(model)
    return model


@torch.no_grad()
def _merge_weights_(
    model: nn.Module,
    records: Iterable[AdapterRecord],
    parameters: dict[str, nn.Parameter],
    keep_base: str | None,
    on_error: OnError,
) -> dict[str, torch.Tensor]:
    """Merge all layers in few calls; returns copies of the weights as they were."""
    tensors: dict[str, torch.Tensor] = {}
    merges: list[Merge] = []
    for record in records:
        own = {name: parameters[f"{record.module}.{name}"] for name in record.parameter_shapes()}
        if record.shares_scale:
            own[SHARED_SCALE] = parameters[SHARED_SCALE]
        tensors.update(record.merged_tensors(model))
        merges += record.merges(model, own)
    copies: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        # Made even with keep_base=None: until the merged weights are known to be finite, the merge may still be
        # refused.
        copy = tensor.detach().to("cpu", copy=True) if keep_base == "cpu" else tensor.detach().clone()
        copies[name] = copy
        on_error(lambda tensor=tensor, copy=copy: _copy_(tensor, copy))
    run_merges_(merges)
    _check_finite(tensors)
    return copies


@torch.no_grad()
def _copy_(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    tensor.copy_(copy)


@torch.no_grad()
def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity, after one look at all of them together.

    The largest magnitude of all tensors is finite exactly where every element is; it waits for the device once.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"merge_: {name} is on the meta device, which holds no values to merge")
    largest = get_total_norm([tensor for tensor in tensors.values() if tensor.numel() > 0], math.inf)
    if math.isfinite(largest.item()):
        return
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"merge_: {name} holds NaN or infinity; expected finite values")


def unmerge_(model: nn.Module) -> nn.Module:
    """Undo `merge_`: every bit of the weights, the adapters, and the training flags.

    Returns:
        The same model.

    Raises:
        ValueError: not patched; not merged; merged with `keep_base=None`.
    """
    state = require_state(model, "unmerge_")
    if state.merged is None:
        raise ValueError(f"unmerge_: {type(model).__name__} is not merged")
    restore_base_(model, state, "unmerge_")
    return model


def merge_and_unload(model: nn.Module, keep_experts: Iterable[int] | None = None) -> nn.Module:
    """Merge (unless merged already) and forget the adapters: a plain backbone with its own classes and keys.

    `requires_grad` and training flags are those the model had before `patch` and before the merge (and before
    `retain_experts`).

    Args:
        model: a patched model.
        keep_experts: as for `merge_`; for a model that is not merged yet.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: as `merge_`; keep_experts for a model that is merged already.
    """
    state = require_state(model, "merge_and_unload")
    if state.merged is None:
        merge_(model, keep_base=None, keep_experts=keep_experts)
    elif keep_experts is not None:
        raise ValueError(f"merge_and_unload: {type(model).__name__} is already merged; give keep_experts to merge_")
    retain_(model, state, None)
    allow_training(model)
    restore_training(model, state.merged.training)
    clear_state(model)
    restore_requires_grad(model, state)
    return model
