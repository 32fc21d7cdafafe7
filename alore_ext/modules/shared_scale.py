"""One set of scale matrices for the whole model, and the gradient that all of its adapters share.

Every adapter returns a gradient of the shared scale, and autograd adds them one by one: for a ViT-B 23 additions of 64
numbers, each a launch and a few calls of the host. So while the root's forward runs, each adapter gets a view of its
own, a row of one expanded tensor, whose backward stacks and sums all gradients at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# By root, while its forward runs; not in the module, whose copies must not hold them.
_VIEWS: weakref.WeakKeyDictionary[nn.Module, Iterator[Tensor]] = weakref.WeakKeyDictionary()


def shared_scale(root: nn.Module) -> Tensor:
    """`root.alore_scale`, or a view of it that nobody else has."""
    # Through the module and not a kept reference to the parameter: load_state_dict(assign=True),
    # functional_call and sharding all replace the registered one.
    scale = root.alore_scale
    if torch.compiler.is_compiling():  # the compiler adds gradients up in one kernel itself
        return scale
    # Outside of the root's forward, and when a layer runs twice: the parameter itself.
    return next(_VIEWS[root], scale) if root in _VIEWS else scale


class HandOut:
    """The root's forward pre-hook: `count` views for the adapters, in whatever order they ask."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, root: nn.Module, args: tuple) -> None:
        scale = root.alore_scale
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and scale.requires_grad):
            return
        _VIEWS[root] = iter(scale.expand(self.count, *scale.shape).unbind())


def take_back(root: nn.Module, args: tuple, output: object) -> None:
    """The root's forward hook, called after errors too."""
    if not torch.compiler.is_compiling():  # then none were handed out
        _VIEWS.pop(root, None)


def start_sharing(root: nn.Module, count: int) -> None:
    """Install both hooks for `count` adapters; `stop_sharing` undoes it."""
    root.register_forward_pre_hook(HandOut(count))
    root.register_forward_hook(take_back, always_call=True)


def stop_sharing(root: nn.Module) -> None:
    """Remove the hooks of `start_sharing`, of a copy of the model too."""
    for key in [key for key, hook in root._forward_pre_hooks.items() if isinstance(hook, HandOut)]:
        del root._forward_pre_hooks[key]
    for key in [key for key, hook in root._forward_hooks.items() if hook is take_back]:
        del root._forward_hooks[key]
        root._forward_hooks_always_called.pop(key, None)
    _VIEWS.pop(root, None)
