"""`patch` and `unpatch`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from alore_ext.config import Config

from .attaching import attach_all, check_attached, detach_all, undo_on_error
from .merged import restore_base_
from .plan import PatchPlan, make_plan, parameter_dtype
from .records import SHARED_SCALE, init_scale_
from .retained import retain_
from .state import PatchState, clear_state, find_patched, get_state, require_state, set_state


def check_unpatched(model: nn.Module) -> None:
    """Raises ValueError where the model, or a part of it, is patched."""
    if get_state(model) is not None:
        raise ValueError(
            f"patch: {type(model).__name__} is already patched; unpatch it, or give all configs in one list"
        )
    if inner := find_patched(model):
        raise ValueError(f"patch: {type(model).__name__} holds {inner!r}, which is already patched")


@torch.inference_mode(False)  # an adapter made under inference mode could never be trained
def empty_parameters(model: nn.Module, plan: PatchPlan) -> dict[str, nn.Parameter]:
    """All adapter parameters by full name, uninitialised, on the device of a weight that they fold into."""
    shapes: dict[str, tuple[nn.Parameter, tuple[int, ...]]] = {}
    for record in plan.records:
        weight = model.get_parameter(record.anchor_name())
        for name, shape in record.parameter_shapes().items():
            shapes[f"{record.module}.{name}"] = weight, shape
        if record.shares_scale:
            shapes.setdefault(SHARED_SCALE, (weight, (record.num_experts,) * 3))
    return {
        name: nn.Parameter(torch.empty(shape, device=weight.device, dtype=parameter_dtype(weight)))
        for name, (weight, shape) in shapes.items()
    }


def init_parameters_(plan: PatchPlan, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give every adapter parameter its start value, from torch's global generator, layer by layer."""
    for record in plan.records:
        record.init_({name: parameters[f"{record.module}.{name}"] for name in record.parameter_shapes()})
    if SHARED_SCALE in parameters:
        init_scale_(parameters[SHARED_SCALE])


def apply_plan(model: nn.Module, plan: PatchPlan, parameters: Mapping[str, nn.Parameter]) -> None:
    """Attach the adapters and freeze everything but them and the head."""
    state = PatchState(
        family=plan.family,
        configs=plan.configs,
        records=plan.records,
        head_names=plan.head_names,
        requires_grad={name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )
    with undo_on_error() as on_error:
        attach_all(model, plan.records, parameters)
        on_error(lambda: detach_all(model, state))
        set_state(model, state)
        on_error(lambda: clear_state(model))
        on_error(lambda: restore_requires_grad(model, state))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in parameters or state.is_head(name))


def restore_requires_grad(model: nn.Module, state: PatchState) -> None:
    """Give every parameter the flag that it had before `patch`."""
    for name, parameter in model.named_parameters():
        if name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])


def patch(model: nn.Module, config: Config | Iterable[Config], head: str | Iterable[str] | None = None) -> nn.Module:
    """Put adapters on a backbone, in place, and freeze everything but them and the classifier head.

    The layers keep their names, parameters and identity. At the start the model computes what it computed
    before.

    Args:
        model: a backbone of a known family, or a module that contains one.
        config: a config of one of the methods, or a list of them that touch different layers.
        head: name or names of the classifier's modules; None asks the model's `get_classifier`.

    Returns:
        The same model.

    Raises:
        TypeError: not a module, not a config.
        ValueError: already patched; a model of no known family; a width that num_experts does not divide; a
            layer index out of range; a place that this model cannot adapt or merge exactly; configs that
            collide. The model is left as it was.
    """
    return patch_family(model, config, head, None)


def patch_vit(
    model: nn.Module, config: Config | Iterable[Config], head: str | Iterable[str] | None = None
) -> nn.Module:
    """`patch` for a model that must be of the ViT family; raises ValueError for any other."""
    return patch_family(model, config, head, "vit")


def patch_swin(
    model: nn.Module, config: Config | Iterable[Config], head: str | Iterable[str] | None = None
) -> nn.Module:
    """`patch` for a model that must be a Swin Transformer, v1 or v2; raises ValueError for any other."""
    return patch_family(model, config, head, "swin")


def patch_convnext(
    model: nn.Module, config: Config | Iterable[Config], head: str | Iterable[str] | None = None
) -> nn.Module:
    """`patch` for a model that must be a ConvNeXt, v1 or v2; raises ValueError for any other."""
    return patch_family(model, config, head, "convnext")


def patch_as_mlp(
    model: nn.Module, config: Config | Iterable[Config], head: str | Iterable[str] | None = None
) -> nn.Module:
    """`patch` for a model that must be an AS-MLP; raises ValueError for any other."""
    return patch_family(model, config, head, "as_mlp")


def patch_family(
    model: nn.Module, config: Config | Iterable[Config], head: str | Iterable[str] | None, family: str | None
) -> nn.Module:
    """`patch`, with the family named or (None) found."""
    if isinstance(model, nn.Module):
        check_unpatched(model)
    plan = make_plan(model, config, head, family)
    parameters = empty_parameters(model, plan)
    init_parameters_(plan, parameters)
    apply_plan(model, plan, parameters)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Take all adapters off: the backbone's classes, weights, keys and `requires_grad` flags are as before.

    The classifier head stays as trained. A merged model is unmerged first.

    Raises:
        ValueError: not patched, or merged with `keep_base=None`.
    """
    state = require_state(model, "unpatch")
    if state.merged is not None:
        restore_base_(model, state, "unpatch")
    check_attached(model, state, "unpatch")
    retain_(model, state, None)
    detach_all(model, state)
    clear_state(model)
    restore_requires_grad(model, state)
    return model
