"""Where a model's classifier is: the one part, besides the adapters, that `patch` leaves trainable."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# What torchvision and transformers, which have no get_classifier, call theirs.
_CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "head", "heads")


def find_head_names(
    model: nn.Module, backbone: str, adapted: Iterable[str], head: str | Iterable[str] | None
) -> tuple[str, ...]:
    """Names of the classifier's modules.

    Args:
        model: the model given to `patch`.
        backbone: name of the submodule that holds the blocks ("" for the model itself).
        adapted: names of layers that the head must keep clear of: they stay frozen.
        head: the user's own answer, a module's name or several; None asks `get_classifier`, or
            takes what torchvision's and transformers' models call their classifier.

    Raises:
        ValueError: a name that is no module, a head that contains adapted layers, or a model with parts
            around the backbone and no `get_classifier`, where a trainable part could be frozen unseen.
    """
    names = _classifier_names(model, backbone) if head is None else _given_names(model, head)
    for layer in adapted:
        for name in names:
            if f"{layer}.".startswith(f"{name}."):
                raise ValueError(f"patch: head {name!r} contains the adapted layer {layer}; expected a classifier")
    return names


def _given_names(model: nn.Module, head: str | Iterable[str]) -> tuple[str, ...]:
    names = (head,) if isinstance(head, str) else tuple(head)
    known = dict(model.named_modules())
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"patch: head must be a module's name or several, got {name!r}")
        if name not in known or name == "":
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"patch: head {name!r} is no module of {type(model).__name__}; its children: {children}")
    return tuple(dict.fromkeys(names))


def _classifier_names(model: nn.Module, backbone: str) -> tuple[str, ...]:
    owner, prefix = model, ""
    if not hasattr(owner, "get_classifier") and backbone:
        outside = [name for name, _ in model.named_parameters() if not name.startswith(f"{backbone}.")]
        if outside:
            raise ValueError(
                f"patch: {type(model).__name__} has no get_classifier and parameters outside its backbone "
                f"{backbone!r} ({outside[0]}, ...): name the classifier with head="
            )
        owner, prefix = model.get_submodule(backbone), f"{backbone}."
    if not hasattr(owner, "get_classifier"):
        return tuple(prefix + name for name, _ in owner.named_children() if name in _CLASSIFIERS)
    found = owner.get_classifier()
    modules = found if isinstance(found, (tuple, list)) else (found,)
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(names[id(module)] for module in modules if id(module) in names)
