"""From an adapter file or state dict to an adapter that a pool can run and merge."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alore_ext.adapter_file import AdapterFile, is_adapter_metadata, parse_adapter, read_adapter
from alore_ext.checkpoint import checked_values
from alore_ext.config import Config
from alore_ext.fingerprint import difference, fingerprint
from alore_ext.patching.apply import check_unpatched
from alore_ext.patching.heads import find_head_names
from alore_ext.patching.methods.alore import AloreRecord
from alore_ext.patching.methods.lora import LoraRecord
from alore_ext.patching.methods.mlae import MlaeRecord
from alore_ext.patching.plan import PatchPlan, make_plan, parameter_dtype
from alore_ext.patching.records import SHARED_SCALE, AdapterRecord
from alore_ext.patching.registry import find_structure
from alore_ext.patching.state import PatchState

from .inference import infer_configs

_SERVED = (AloreRecord, MlaeRecord, LoraRecord)


@dataclass(frozen=True, eq=False)
class Entry:
    """One adapter of a pool, on the pool's device.

    Attributes:
        parameters: the adapters' by full name, in float32 (float64 on a float64 backbone).
        head: the classifier's tensors by module and own name, in the backbone's dtype. Empty: the base's classifier.
        num_classes: outputs of its classifier, or of the base's where it has none of its own; None without either.
        labels: names of the classes, where the file has them.
    """

    name: str
    records: tuple[AdapterRecord, ...]
    parameters: dict[str, Tensor]
    head: dict[str, dict[str, Tensor]]
    num_classes: int | None
    labels: tuple[str, ...] | None

    def own_parameters(self, record: AdapterRecord) -> dict[str, Tensor]:
        """A record's tensors by their own names, with the shared scale where it shares one."""
        own = {name: self.parameters[f"{record.module}.{name}"] for name in record.parameter_shapes()}
        if record.shares_scale:
            own[SHARED_SCALE] = self.parameters[SHARED_SCALE]
        return own


def load_entry(
    base: nn.Module, name: str, adapter: str | os.PathLike | Mapping[str, Tensor], config: Config | list[Config] | None
) -> Entry:
    """Read and check an adapter for this base.

    Args:
        base: the plain backbone with its own weights; not changed.
        name: the adapter's name in the pool, for messages.
        adapter: a file of `save_adapter`, an `adapter_state_dict`, or a dict of the same tensors.
        config: what a dict without metadata was patched with; None infers it from names and shapes. Refused where
            there is metadata, which holds it.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the adapter, what was expected and what came.
    """
    file = _read(base, name, adapter, config)
    check_unpatched(base)
    with torch.random.fork_rng(devices=[]):  # as in load_adapter: a random pattern is drawn and then replaced
        try:
            plan = make_plan(base, file.configs, file.head_names or None, file.family)
        except ValueError as error:
            raise file.error(str(error)) from error
    plan = plan.with_expert_counts({n: t.numel() for n, t in file.tensors.items() if n.endswith(".coeff")})
    for record in plan.records:
        if not isinstance(record, _SERVED):
            raise file.error(
                f"{record.module} has an adapter of {type(plan.configs[record.config]).__name__}; a pool serves "
                "AloreConfig (structure 'kronecker'), MlaeConfig and LoraConfig. merge_and_unload gives a plain model"
            )
    state = PatchState(plan.family, plan.configs, plan.records, plan.head_names)
    if file.base is not None and (reason := difference(file.base, fingerprint(base, state))):
        raise file.error(f"the adapter was trained on another base: {reason}")
    head = _head(base, file)
    own = {module: dict(base.get_submodule(module).named_parameters()) for module in _leaves(base, plan.head_names)}
    classes = num_classes(head or own)
    if file.labels is not None and len(file.labels) != classes:
        raise file.error(f"labels name {len(file.labels)} classes, expected one for each of the classifier's {classes}")
    return Entry(name, plan.records, _parameters(base, plan, file), head, classes, file.labels)


def num_classes(head: Mapping[str, Mapping[str, Tensor]]) -> int | None:
    """Outputs of the last linear among a classifier's tensors by module; None where there is none."""
    widths = [
        len(tensors["weight"]) for tensors in head.values() if "weight" in tensors and tensors["weight"].dim() == 2
    ]
    return widths[-1] if widths else None


def _leaves(base: nn.Module, head_names: tuple[str, ...]) -> list[str]:
    return [
        name
        for name, module in base.named_modules()
        if any(f"{name}.".startswith(f"{head}.") for head in head_names) and not any(module.children())
    ]


def _read(base: nn.Module, name: str, adapter, config: Config | list[Config] | None) -> AdapterFile:
    caller = "AdapterPool.add"
    if isinstance(adapter, (str, os.PathLike)):
        if config is not None:
            raise ValueError(f"{caller}: {name!r}: a file holds its own config; got config={config!r} besides")
        return read_adapter(adapter, caller)
    if not isinstance(adapter, Mapping) or not all(isinstance(value, Tensor) for value in adapter.values()):
        raise TypeError(f"{caller}: {name!r} must be a path or a dict of tensors, got {type(adapter).__name__}")
    path = f"adapter {name!r}"
    metadata = getattr(adapter, "_metadata", None)
    if is_adapter_metadata(metadata):
        if config is not None:
            raise ValueError(
                f"{caller}: {name!r}: the state dict's metadata hold its config, expected none besides; got "
                f"config={config!r}"
            )
        return parse_adapter(metadata, adapter, path, caller)
    structure = find_structure(base)
    try:
        configs = infer_configs(structure, adapter) if config is None else config
    except ValueError as error:
        raise ValueError(f"{caller}: {path}: {error}") from None
    configs = tuple(configs) if isinstance(configs, (list, tuple)) else (configs,)
    adapted = [tensor.rpartition(".")[0] for tensor in adapter if tensor.rpartition(".")[2] in ("down", "lora_a")]
    heads = find_head_names(base, structure.backbone, adapted, None)
    return AdapterFile(path, structure.family, configs, heads, None, dict(adapter), caller=caller)


def _parameters(base: nn.Module, plan: PatchPlan, file: AdapterFile) -> dict[str, Tensor]:
    anchors: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for record in plan.records:
        weight = base.get_parameter(record.anchor_name())
        anchors |= {f"{record.module}.{own}": (weight, shape) for own, shape in record.parameter_shapes().items()}
        if record.shares_scale:
            anchors.setdefault(SHARED_SCALE, (weight, (record.num_experts,) * 3))
    values = checked_values({name: torch.empty(shape, device="meta") for name, (_, shape) in anchors.items()}, file)
    return {
        name: _own_copy(values[name], like=weight, dtype=parameter_dtype(weight), file=file, name=name)
        for name, (weight, _) in anchors.items()
    }


def _head(base: nn.Module, file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    like = next(parameter for parameter in base.parameters() if parameter.is_floating_point())
    head: dict[str, dict[str, Tensor]] = {}
    for name, value in file.head_tensors().items():
        module, _, own = name.rpartition(".")
        try:
            base.get_submodule(module)
        except AttributeError:
            raise file.error(f"the model has no {module} for the head's {name}") from None
        head.setdefault(module, {})[own] = _own_copy(value, like=like, dtype=like.dtype, file=file, name=name)
    return head


def _own_copy(value: Tensor, *, like: Tensor, dtype: torch.dtype, file: AdapterFile, name: str) -> Tensor:
    copy = value.detach().to(device=like.device, dtype=dtype, copy=True).contiguous()
    if not torch.isfinite(copy).all():
        raise file.error(f"{name} holds NaN or infinity in {dtype}; expected finite values")
    return copy
