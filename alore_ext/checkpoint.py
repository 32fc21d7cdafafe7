"""Saving a model's adapters and putting saved ones on a model (see `adapter_file` for what is in a file)."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ._files import write_atomic
from .adapter_file import AdapterFile, adapter_metadata, read_adapter
from .fingerprint import difference, fingerprint
from .patching.apply import apply_plan, check_unpatched, empty_parameters
from .patching.attaching import OnError, undo_on_error
from .patching.plan import make_plan
from .patching.state import PatchState, get_state, require_state


def adapter_state_dict(model: nn.Module, include_head: bool = True) -> OrderedDict[str, Tensor]:
    """The adapters' parameters and the classifier head's tensors by full name, sharing memory with the model.

    Works on a merged model too, whose adapters are kept aside. As a module's own state dict it has an attribute
    `_metadata`; here that is what `save_adapter` writes beside the tensors, so that
    `alore_ext.serving.AdapterPool` takes the result as it takes a file.

    Raises:
        ValueError: not patched.
    """
    state = require_state(model, "adapter_state_dict")
    tensors = OrderedDict(_adapter_tensors(model, state, include_head))
    tensors._metadata = adapter_metadata(model, state)
    return tensors


def _adapter_tensors(model: nn.Module, state: PatchState, include_head: bool) -> dict[str, Tensor]:
    adapters = dict(model.named_parameters()) if state.merged is None else state.merged.adapters
    tensors = {name: adapters[name].detach() for name in state.adapter_names()}
    if include_head:
        tensors.update({name: value for name, value in model.state_dict().items() if state.is_head(name)})
    return tensors


def save_adapter(
    model: nn.Module, path: str | os.PathLike, include_head: bool = True, labels: Sequence[str] | None = None
) -> Path:
    """Write the adapters, and by default the head, to one safetensors file.

    The file is complete or not there: it is written beside `path` and moved into place.

    Args:
        model: patched, not merged.
        path: the file; replaced where it exists.
        include_head: the classifier goes in too.
        labels: names of the classes in the order of the logits, for whoever serves the adapter.

    Returns:
        The path.

    Warns:
        UserWarning: other parameters are trainable; what they learned is not in the file.

    Raises:
        TypeError: labels that are no strings.
        ValueError: not patched; merged; labels without a head, or not one for each of its classes.
    """
    state = require_state(model, "save_adapter")
    if state.merged is not None:
        raise ValueError(f"save_adapter: {type(model).__name__} is merged; call unmerge_ first")
    tensors = _adapter_tensors(model, state, include_head)
    if labels is not None:
        labels = _checked_labels(labels, tensors, state)
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and n not in tensors and not state.is_head(n)]
    if left_out:
        warnings.warn(
            f"save_adapter: {len(left_out)} trainable parameters, neither adapter nor head, are not saved: "
            f"{', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}",
            stacklevel=2,
        )
    metadata = adapter_metadata(model, state, labels)
    path = Path(path)
    # Contiguous copies: safetensors refuses views and tensors that share memory (a tied head).
    contents = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda written: save_file(contents, written, metadata))
    return path


def _checked_labels(labels: Sequence[str], tensors: Mapping[str, Tensor], state: PatchState) -> tuple[str, ...]:
    if not isinstance(labels, Collection) or isinstance(labels, str) or not all(isinstance(x, str) for x in labels):
        raise TypeError(f"save_adapter: labels must be a sequence of strings, got {labels!r}")
    widths = [tensor.shape[0] for name, tensor in tensors.items() if state.is_head(name) and tensor.dim() > 1]
    if not widths:
        raise ValueError("save_adapter: labels name the classes of a head, but no head is saved")
    if len(labels) != widths[-1]:
        raise ValueError(f"save_adapter: labels must name the head's {widths[-1]} classes, got {len(labels)} names")
    return tuple(labels)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Put a saved adapter on a model: patch it as the file says, and load adapters and head.

    A plain model is patched; a patched one must have the file's configs, and takes its values. The head is
    restored where the file holds one, and replaced where it has another size.

    Args:
        model: the base that the adapter was trained on, in any floating dtype.
        path: a file that `save_adapter` wrote.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file, or truncated; of another format version, base, family or config; a
            merged model. The model is left as it was.
    """
    file = read_adapter(path)
    state = get_state(model)
    if state is None:
        _load_on_plain(model, file)
    else:
        _load_on_patched(model, state, file)
    return model


def _load_on_plain(model: nn.Module, file: AdapterFile) -> None:
    check_unpatched(model)
    with torch.random.fork_rng(devices=[]):
        # A random masking pattern is drawn here, and gives way to the one that the file was trained with.
        try:
            plan = make_plan(model, file.configs, file.head_names, file.family)
        except ValueError as error:
            raise file.error(str(error)) from error
    plan = plan.with_expert_counts({n: t.numel() for n, t in file.tensors.items() if n.endswith(".coeff")})
    _check_base(model, PatchState(plan.family, plan.configs, plan.records, plan.head_names), file)
    parameters = empty_parameters(model, plan)
    values = checked_values(parameters, file)
    with undo_on_error() as on_error:
        restore_head(model, file, on_error)
        for name, parameter in parameters.items():
            copy_(parameter, values[name])
        apply_plan(model, plan, parameters)


def _load_on_patched(model: nn.Module, state: PatchState, file: AdapterFile) -> None:
    if state.merged is not None:
        raise file.error(f"{type(model).__name__} is merged; call unmerge_ first")
    if state.family != file.family:
        raise file.error(f"family must be {state.family!r}, got {file.family!r}")
    if state.configs != file.configs:
        raise file.error(f"the model is patched with {list(state.configs)}, the file has {list(file.configs)}")
    _check_base(model, state, file)
    parameters = {name: p for name, p in model.named_parameters() if name in set(state.adapter_names())}
    values = checked_values(parameters, file)
    with undo_on_error() as on_error:
        restore_head(model, file, on_error)
        for name, parameter in parameters.items():
            before = parameter.detach().clone()
            on_error(lambda parameter=parameter, before=before: copy_(parameter, before))
            copy_(parameter, values[name])


def _check_base(model: nn.Module, state: PatchState, file: AdapterFile) -> None:
    if file.base is not None and (reason := difference(file.base, fingerprint(model, state))):
        raise file.error(f"the adapter was trained on another base: {reason}")


def checked_values(parameters: Mapping[str, Tensor], file: AdapterFile) -> dict[str, Tensor]:
    """The file's adapter tensors, which must be these parameters and no other."""
    values = {name: tensor for name, tensor in file.tensors.items() if name not in file.head_tensors()}
    if missing := sorted(parameters.keys() - values.keys()):
        raise file.error(f"misses {missing[0]} ({len(missing)} tensors in all)")
    if unknown := sorted(values.keys() - parameters.keys()):
        raise file.error(f"holds {unknown[0]}, which its config does not explain ({len(unknown)} tensors in all)")
    for name, parameter in parameters.items():
        if values[name].shape != parameter.shape:
            raise file.error(f"{name} must be {list(parameter.shape)}, got {list(values[name].shape)}")
    return values


def restore_head(model: nn.Module, file: AdapterFile, on_error: OnError) -> None:
    """Load the file's head.

    A linear of another size, or the Identity of a model without classes, is replaced.
    """
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.head_tensors().items():
        module, _, own = name.rpartition(".")
        by_module.setdefault(module, {})[own] = tensor
    for name, tensors in by_module.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise file.error(f"the model has no {name} to restore the head to") from None
        own = {**module._parameters, **module._buffers}
        shapes = {key: tensor.shape for key, tensor in own.items() if tensor is not None}
        if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
            module = _replace_linear(model, name, module, tensors, file, on_error)
            own = dict(module._parameters)
        for key, tensor in tensors.items():
            before = own[key].detach().clone()
            on_error(lambda target=own[key], before=before: copy_(target, before))
            copy_(own[key], tensor)


@torch.no_grad()
def copy_(target: Tensor, value: Tensor) -> None:
    target.copy_(value)


def _replace_linear(
    model: nn.Module,
    name: str,
    old: nn.Module,
    tensors: Mapping[str, Tensor],
    file: AdapterFile,
    on_error: OnError,
) -> nn.Linear:
    """A linear for the head's tensors in the place of `old`, and `num_classes` to match."""
    if not isinstance(old, (nn.Linear, nn.Identity)) or not {"weight"} <= set(tensors) <= {"weight", "bias"}:
        raise file.error(f"the head {name} is a {type(old).__name__} of another shape, not an nn.Linear")
    out_features, in_features = tensors["weight"].shape
    like = next(old.parameters(), None)
    if like is None:
        like = next(p for p in model.parameters() if p.is_floating_point())
    new = nn.utils.skip_init(
        nn.Linear, in_features, out_features, bias="bias" in tensors, device=like.device, dtype=like.dtype
    )
    new.train(old.training)
    parent = model.get_submodule(name.rpartition(".")[0])
    child = name.rpartition(".")[2]
    parent._modules[child] = new
    on_error(lambda: parent._modules.__setitem__(child, old))
    for owner in {id(module): module for module in (model, parent)}.values():
        for count in ("num_classes", "num_labels"):
            if isinstance(owner.__dict__.get(count), int):
                before: Any = owner.__dict__[count]
                on_error(lambda owner=owner, count=count, before=before: owner.__dict__.update({count: before}))
                owner.__dict__[count] = out_features
    _count_labels(getattr(model, "config", None), out_features, on_error)
    return new


def _count_labels(config: Any, num_labels: int, on_error: OnError) -> None:
    """transformers' config counts the classes by their names, and new ones are made where their number changes."""
    if isinstance(getattr(config, "id2label", None), dict) and len(config.id2label) != num_labels:
        names = {key: config.__dict__[key] for key in ("id2label", "label2id") if key in config.__dict__}
        on_error(lambda: config.__dict__.update(names))
        config.num_labels = num_labels
