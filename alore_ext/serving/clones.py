"""Copies of a model's structure that share its tensors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from types import MethodType

from torch import Tensor, nn


def clone_sharing_tensors(model: nn.Module) -> nn.Module:
    """Modules of their own over the same parameters and buffers: a few kilobytes.

    Hooks that are methods of another object stay that object's: a trainer or recorder is nothing to copy.
    """
    shared = itertools.chain(model.parameters(), model.buffers(), _hooks_of_others(model))
    return copy.deepcopy(model, {id(kept): kept for kept in shared})


def _hooks_of_others(model: nn.Module) -> Iterator[MethodType]:
    own = {id(module) for module in model.modules()}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            yield from (h for h in hooks.values() if isinstance(h, MethodType) and id(h.__self__) not in own)


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in the place of a parameter, by full name."""
    module, _, own = name.rpartition(".")
    model.get_submodule(module)._parameters[own] = nn.Parameter(value, requires_grad=False)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of one, by full name."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def logits_of(output) -> Tensor:
    """What a model returned as a tensor: itself, or the `logits` of transformers' outputs."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"AdapterPool: the model must return logits, got a {type(output).__name__}")
    return logits
