"""What a patched model remembers about its adapters: one object in the model's `__dict__`, safe to copy and
pickle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from alore_ext.config import Config

from .records import SHARED_SCALE, AdapterRecord

_KEY = "_alore_state"


@dataclass
class MergedState:
    """What `unmerge_` needs: the adapters taken off, the weights as they were, and the training flags.

    `weights` is None where the base was not kept.
    """

    adapters: dict[str, nn.Parameter]
    weights: dict[str, torch.Tensor] | None
    training: dict[str, bool]


@dataclass
class PatchState:
    """Everything is by name, so that a deepcopy of the model has a state that speaks of the copy."""

    family: str
    configs: tuple[Config, ...]
    records: tuple[AdapterRecord, ...]
    head_names: tuple[str, ...]
    requires_grad: dict[str, bool] = field(default_factory=dict)
    merged: MergedState | None = None
    # The experts kept by `retain_experts`, and the training flags from before; None where all run.
    kept: tuple[int, ...] | None = None
    training_before_kept: dict[str, bool] | None = None

    def adapter_names(self) -> list[str]:
        """Full names of all adapter parameters, the shared scale first."""
        shared = [SHARED_SCALE] if any(record.shares_scale for record in self.records) else []
        return shared + [f"{record.module}.{name}" for record in self.records for name in record.parameter_shapes()]

    def is_head(self, name: str) -> bool:
        """Whether a parameter or buffer belongs to the classifier."""
        return any(name.startswith(f"{head}.") for head in self.head_names)


def get_state(model: nn.Module) -> PatchState | None:
    """The model's state; None where it is not patched. Raises TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    return model.__dict__.get(_KEY)


def require_state(model: nn.Module, caller: str) -> PatchState:
    """The model's state. Raises ValueError naming `caller` where the model is not patched."""
    state = get_state(model)
    if state is None:
        inner = find_patched(model)
        hint = f"; its submodule {inner!r} is: call {caller} on that" if inner else ""
        raise ValueError(f"{caller}: {type(model).__name__} is not patched{hint}")
    return state


def set_state(model: nn.Module, state: PatchState) -> None:
    """Remember `state` on the model."""
    model.__dict__[_KEY] = state


def clear_state(model: nn.Module) -> None:
    """Forget the model's state."""
    model.__dict__.pop(_KEY, None)


def find_patched(model: nn.Module) -> str | None:
    """The name of a submodule that is patched on its own; None where there is none."""
    return next((name for name, module in model.named_modules() if name and _KEY in module.__dict__), None)
