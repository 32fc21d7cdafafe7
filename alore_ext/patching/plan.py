"""From configs and a model's structure to a list of adapter records, with every check that can fail.

Changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from alore_ext.config import AloreConfig, Config
from alore_ext.modules.channels import is_pointwise

from .heads import find_head_names
from .methods import METHODS
from .methods.mlae import MlaeRecord
from .records import AdapterRecord
from .registry import find_structure

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PatchPlan:
    """What `patch` will do."""

    family: str
    configs: tuple[Config, ...]
    records: tuple[AdapterRecord, ...]
    head_names: tuple[str, ...]

    def with_expert_counts(self, counts: Mapping[str, int]) -> PatchPlan:
        """The plan with an earlier draw of its random masking patterns: experts by "<module>.coeff"."""
        records = tuple(
            dataclasses.replace(record, num_experts=counts.get(f"{record.module}.coeff", record.num_experts))
            if isinstance(record, MlaeRecord) and self.configs[record.config].pattern == "random"
            else record
            for record in self.records
        )
        return dataclasses.replace(self, records=records)


def make_plan(
    model: nn.Module, configs: Config | Iterable[Config], head: str | Iterable[str] | None, family: str | None
) -> PatchPlan:
    """Check everything that `patch` promises to check, and say what to put where.

    Raises:
        TypeError: a model that is no module, a config that is none.
        ValueError: naming the layer or the field, what was expected and what came.
    """
    _check_model(model)
    configs = _as_configs(configs)
    structure = find_structure(model, family)
    records = [
        record
        for index, config in enumerate(configs)
        for record in METHODS[type(config)](model, structure, config, index)
    ]
    _check_collisions(records)
    _check_shared_scale(configs)
    _check_layers(model, records)
    adapted = [name for record in records for name in (record.module, *(linear.module for linear in record.linears))]
    head_names = find_head_names(model, structure.backbone, adapted, head)
    return PatchPlan(structure.family, configs, tuple(records), head_names)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "patch: nn.DataParallel's replicas would reach for the first device's alore_scale; use "
            "DistributedDataParallel around the patched model"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("patch: got a DistributedDataParallel; patch the model inside it before wrapping it")


def _as_configs(configs: Config | Iterable[Config]) -> tuple[Config, ...]:
    if type(configs) in METHODS:
        return (configs,)
    expected = f"patch: config must be one of {', '.join(kind.__name__ for kind in METHODS)}, or a list of them"
    if not isinstance(configs, Iterable) or isinstance(configs, (str, bytes)):
        raise TypeError(f"{expected}, got {configs!r}")
    configs = tuple(configs)
    for config in configs:
        if type(config) not in METHODS:
            raise TypeError(f"{expected}, got {config!r}")
    if not configs:
        raise ValueError(f"{expected}, got an empty one")
    return configs


def _check_collisions(records: Sequence[AdapterRecord]) -> None:
    """Each layer takes one adapter at most, and one merge: the second would multiply what the first had added."""
    taken: dict[str, AdapterRecord] = {}
    for record in records:
        for layer in (record.module, *(linear.module for linear in record.linears)):
            other = taken.setdefault(layer, record)
            if other is not record:
                raise ValueError(
                    f"patch: {layer} is adapted twice, by {_describe(other)} and {_describe(record)}; "
                    f"methods on one model must touch different layers"
                )


def _describe(record: AdapterRecord) -> str:
    return f"{record.method} {record.role} (config {record.config})"


def _check_shared_scale(configs: Sequence[Config]) -> None:
    experts = {config.num_experts for config in configs if isinstance(config, AloreConfig) and config.has_shared_scale}
    if len(experts) > 1:
        raise ValueError(
            f"patch: a model has one set of shared scale matrices, but the configs ask for num_experts "
            f"{sorted(experts)}; use one number of experts, or share_scale=False"
        )


def _check_layers(model: nn.Module, records: Sequence[AdapterRecord]) -> None:
    """Adapted layers must compute what their class says, from weights that are theirs alone."""
    module_uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    weight_uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for record in records:
        layer = model.get_submodule(record.module)
        if "forward" in layer.__dict__:
            raise ValueError(f"patch: {record.module} has its own forward, which would go around the adapter")
        if module_uses[id(layer)] > 1:
            raise ValueError(f"patch: {record.module} is registered in several places of the model")
        if taken := [name for name in record.parameter_shapes() if hasattr(layer, name)]:
            raise ValueError(f"patch: {record.module} already has {', '.join(taken)}")
        for linear in record.linears:
            _check_linear(linear.module, model.get_submodule(linear.module), linear.weight)
            if weight_uses[id(linear.weight_of(model))] > 1 or module_uses[id(model.get_submodule(linear.module))] > 1:
                raise ValueError(f"patch: the weight of {linear.module} is used in several places of the model")
        for name, tensor in record.merged_tensors(model).items():
            if weight_uses[id(tensor)] > 1:
                raise ValueError(f"patch: {name} is used in several places of the model")
            if tensor.dtype not in _WEIGHT_DTYPES:
                raise ValueError(f"patch: {name} must be one of {_WEIGHT_DTYPES}, got {tensor.dtype}")


_LINEAR_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, nn.MultiheadAttention.forward)


def _check_linear(name: str, linear: nn.Module, weight_name: str) -> None:
    if type(linear).forward not in _LINEAR_FORWARDS or "forward" in linear.__dict__:
        raise ValueError(f"patch: {name} must be an nn.Linear, got a {type(linear).__name__} with its own forward")
    weight = linear._parameters.get(weight_name)
    if weight is None:
        raise ValueError(f"patch: {name} must store its weight, but computes it (weight norm, parametrization)")
    if weight.dtype not in _WEIGHT_DTYPES:
        raise ValueError(f"patch: the weight of {name} must be one of {_WEIGHT_DTYPES}, got {weight.dtype}")
    if isinstance(linear, nn.Conv2d) and not is_pointwise(linear):
        raise ValueError(f"patch: {name} must be a 1x1 convolution of stride 1, padding 0 and one group, got {linear}")


def parameter_dtype(weight: torch.Tensor) -> torch.dtype:
    """float64 beside a float64 weight, else float32: a 16-bit adapter would lose small updates."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
