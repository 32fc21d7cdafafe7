"""A merged model's way back: weights from their copies, adapters on again."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import nn

from .attaching import attach_all
from .plan import parameter_dtype
from .state import PatchState, require_state


def refuse_training(model: nn.Module) -> None:
    """Make `model.train()` raise while the model is merged or retains a part of its experts.

    `eval()` and `train(False)` still work.
    """
    model.__dict__["train"] = functools.partial(_train_unless_refused, model)


def allow_training(model: nn.Module) -> None:
    """Undo `refuse_training`."""
    model.__dict__.pop("train", None)


def restore_training(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Give every module the training flag that it has in `flags`, by name."""
    for name, module in model.named_modules():
        module.training = flags.get(name, module.training)


def _train_unless_refused(model: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        name, state = type(model).__name__, require_state(model, "train")
        if state.merged is not None:
            raise ValueError(f"train: {name} is merged, so its adapters would not train; call unmerge_ first")
        raise ValueError(
            f"train: {name} retains experts {list(state.kept)}, so the others would not train; "
            "call retain_experts(model, keep=None) first"
        )
    return type(model).train(model, mode)


def restore_base_(model: nn.Module, state: PatchState, caller: str) -> None:
    """Undo a merge: every weight bit for bit from its copy, the adapters back on their layers.

    Raises:
        ValueError: the merge kept no copies, or a merged layer is gone; the model is left as it was.
    """
    merged = state.merged
    if merged.weights is None:
        raise ValueError(f"{caller}: the model was merged with keep_base=None, so its base weights are gone")
    parameters = dict(model.named_parameters())
    for name, weight in merged.weights.items():
        if name not in parameters or parameters[name].shape != weight.shape:
            raise ValueError(f"{caller}: {name} is no longer the weight that was merged")
    for record in state.records:
        weight = parameters[record.anchor_name()]
        for name in record.parameter_shapes():
            _follow(merged.adapters[f"{record.module}.{name}"], weight)
        if record.shares_scale:
            _follow(merged.adapters["alore_scale"], weight)
    # Weights first: adapters on top of weights that still hold them would count twice, should a copy fail.
    with torch.no_grad():
        for name, weight in merged.weights.items():
            parameters[name].copy_(weight)
    attach_all(model, state.records, merged.adapters)
    if state.kept is None:
        allow_training(model)
    restore_training(model, merged.training)
    state.merged = None


def _follow(adapter: nn.Parameter, weight: torch.Tensor) -> None:
    """Move an adapter's parameter to where `.to()` has brought the model while it was merged."""
    dtype = adapter.dtype
    if dtype != weight.dtype and (dtype != torch.float32 or weight.dtype == torch.float64):
        dtype = parameter_dtype(weight)
    if adapter.device != weight.device or adapter.dtype != dtype:
        adapter.data = adapter.data.to(device=weight.device, dtype=dtype)
