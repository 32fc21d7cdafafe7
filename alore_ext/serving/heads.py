"""Classifiers that take turns at the end of one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .clones import replace_module
from .entry import num_classes

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class HeadSwitch:
    """Installs an adapter's classifier in a model, in place.

    Classifiers of one shape share one module and its memory, so that a captured graph or compiled code of one serves
    all of them; the base's own module is among those. Another shape brings another module in, made once and kept for as
    long as an adapter has that shape.
    """

    def __init__(self, model: nn.Module, base: nn.Module):
        self._model = model
        self._base = base  # keeps the pristine values
        self._own: dict[str, nn.Module] = {}
        self._modules: dict[tuple[str, _Shapes], nn.Module] = {}
        self._counts = _class_counts(model)

    def prepare(self, head: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Make what installing this head will need; True where it has a part that none before it had."""
        is_new = not head.keys() <= self._own.keys()
        for name, tensors in head.items():
            if name not in self._own:
                module = self._own[name] = self._model.get_submodule(name)
                self._modules[name, _shapes(self._pristine(name))] = module
            key = name, _shapes(tensors)
            if key not in self._modules:
                self._modules[key] = _linear_like(tensors, self._own[name])
        return is_new

    def keep(self, heads: Iterable[Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Drop the modules that none of these heads needs, nor the base's own."""
        used = {(name, _shapes(self._pristine(name))) for name in self._own}
        used |= {(name, _shapes(tensors)) for head in heads for name, tensors in head.items()}
        self._modules = {key: module for key, module in self._modules.items() if key in used}

    def install(self, head: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put these values in, and the base's where the head has none. `{}` is the base's own head."""
        self.copy(head)
        self.switch(head)

    @torch.no_grad()
    def copy(self, head: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The part of `install` that runs on the device."""
        pairs = [
            (module._parameters[own], value)
            for module, tensors in self._chosen(head).values()
            for own, value in tensors.items()
        ]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

    def switch(self, head: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The rest of `install`: the modules in their places, and the counts of classes."""
        for name, (module, _) in self._chosen(head).items():
            if self._model.get_submodule(name) is not module:
                replace_module(self._model, name, module)
        _set_class_counts(self._model, self._counts, num_classes(head))

    def _chosen(self, head: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[nn.Module, Mapping[str, Tensor]]]:
        tensors = {name: head.get(name, self._pristine(name)) for name in self._own}
        return {name: (self._modules[name, _shapes(values)], values) for name, values in tensors.items()}

    def shapes(self, head: Mapping[str, Mapping[str, Tensor]]) -> tuple:
        """What tells classifiers apart that need graphs of their own: the parts that do not run in the base's modules.

        Not what those are: an adapter that brings a new part would change the key of all that were captured before.
        """
        shapes = {name: _shapes(tensors) for name, tensors in head.items()}
        return tuple((name, own) for name, own in sorted(shapes.items()) if own != _shapes(self._pristine(name)))

    def _pristine(self, name: str) -> dict[str, Tensor]:
        return dict(self._base.get_submodule(name).named_parameters())


def _shapes(tensors: Mapping[str, Tensor]) -> _Shapes:
    return tuple(sorted((name, tuple(value.shape)) for name, value in tensors.items()))


def _linear_like(tensors: Mapping[str, Tensor], old: nn.Module) -> nn.Linear:
    weight = tensors["weight"]
    out_features, in_features = weight.shape
    new = nn.utils.skip_init(
        nn.Linear, in_features, out_features, bias="bias" in tensors, device=weight.device, dtype=weight.dtype
    )
    return new.train(old.training).requires_grad_(False)


_COUNTS = ("num_classes", "num_labels")


def _owners(model: nn.Module) -> Iterable[nn.Module]:
    """The modules that say how many classes there are: timm's and transformers' models, timm's heads."""
    return (module for module in model.modules() if any(isinstance(module.__dict__.get(c), int) for c in _COUNTS))


def _class_counts(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Where class counts and names are, with their values."""
    found = [
        (owner.__dict__, {c: owner.__dict__[c] for c in _COUNTS if c in owner.__dict__}) for owner in _owners(model)
    ]
    config = getattr(model, "config", None)
    if isinstance(getattr(config, "id2label", None), dict):
        found.append((config.__dict__, {key: config.__dict__[key] for key in ("id2label", "label2id")}))
    return found


def _set_class_counts(model: nn.Module, counts: list[tuple[dict[str, Any], dict[str, Any]]], width: int | None) -> None:
    """As they were, or (width given) of a classifier of that many classes."""
    for namespace, values in counts:
        namespace.update(values)
        if width is not None and not any(values.get(c) == width for c in _COUNTS):
            namespace.update({c: width for c in _COUNTS if c in values})
    config = getattr(model, "config", None)
    if width is not None and isinstance(getattr(config, "id2label", None), dict) and len(config.id2label) != width:
        config.num_labels = width
