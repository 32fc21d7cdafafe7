"""SSF: its records and its places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from alore_ext.config import SsfConfig
from alore_ext.config.base import TARGETS
from alore_ext.modules import (
    FusedBiasAttention,
    MlaeMultiheadAttention,
    SsfConv,
    SsfLinear,
    SsfMultiheadAttention,
    SsfNorm,
    attach,
)

from ..grouping import Merge, ScaleShiftMerge
from ..linear_map import LinearMap
from ..records import AdapterRecord
from ..registry import MlaeSite, Structure
from .sites import selected_blocks, site_at

_NORMS = (nn.LayerNorm, nn.GroupNorm)
# What a family names as MLAE's class for a map that is no module of its own.
_SSF_OF = {None: SsfLinear, MlaeMultiheadAttention: SsfMultiheadAttention}


@dataclass(frozen=True)
class SsfRecord(AdapterRecord):
    """Scale and shift of `width` channels.

    `affine` names the weight and bias that take the merge. A norm's is no linear map, and is not among `linears`.
    """

    width: int
    affine: LinearMap

    method = "ssf"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"gamma": (self.width,), "beta": (self.width,)}

    def anchor_name(self) -> str:
        return self.affine.weight_name

    def init_(self, parameters: Mapping[str, Tensor]) -> None:
        """gamma 1 and beta 0: the identity."""
        nn.init.ones_(parameters["gamma"])
        nn.init.zeros_(parameters["beta"])

    def attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        attach(model.get_submodule(self.module), self.adapter, parameters, {})

    def merged_tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        owner = model.get_submodule(self.affine.module)._parameters
        return {
            self.affine.weight_name: owner[self.affine.weight],
            self.affine.bias_name: owner[self.affine.bias],
        }

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        weight, bias = self.merged_tensors(model).values()
        return [ScaleShiftMerge(weight, bias, parameters["gamma"], parameters["beta"])]


def ssf_records(model: nn.Module, structure: Structure, config: SsfConfig, index: int) -> list[AdapterRecord]:
    """One record for each linear of the targets, and each norm of the blocks."""
    targets = config.targets or _all_targets(structure)
    records: list[AdapterRecord] = []
    for block, sites in selected_blocks(structure, config):
        for name in sites.norms if config.norms else ():
            records.append(_norm_record(model, index, block, name))
        for target in targets:
            for site in site_at(sites, sites.mlae, target):
                records.append(_linear_record(model, index, block, target, site))
    return records


def _all_targets(structure: Structure) -> tuple[str, ...]:
    """The roles that any of the blocks has: of no ConvNeXt block anyone expects a qkv."""
    return tuple(target for target in TARGETS if any(target in sites.mlae for sites in structure.blocks))


def _linear_record(model: nn.Module, index: int, block: int, target: str, site: MlaeSite) -> SsfRecord:
    linear = site.linear
    if site.host is not None and issubclass(site.host.adapter, FusedBiasAttention):
        raise ValueError(
            f"SsfConfig: {linear.module} has its bias in {site.host.module}, as q_bias, k_bias and v_bias, and k_bias "
            f"is no parameter: beta has nothing to merge into; give targets without {target!r}"
        )
    if linear.bias_of(model) is None:
        raise ValueError(
            f"SsfConfig: {linear.module} has no bias that is a parameter, so beta has nothing to merge into; give "
            f"targets without {target!r}"
        )
    return SsfRecord(
        config=index,
        block=block,
        role=target,
        module=linear.module,
        linears=(linear,),
        adapter=SsfConv if site.channel_axis == 1 else _SSF_OF[site.adapter],
        host=site.host,
        width=linear.out_features(model),
        affine=linear,
    )


def _norm_record(model: nn.Module, index: int, block: int, name: str) -> SsfRecord:
    norm = model.get_submodule(name)
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if not isinstance(norm, _NORMS) or weight is None or bias is None or weight.dim() != 1:
        raise ValueError(
            f"SsfConfig: {name} must be a layer or group norm with a weight and a bias [channels] that gamma and beta "
            f"can merge into, got {norm}; give norms=False"
        )
    return SsfRecord(
        config=index,
        block=block,
        role="norm",
        module=name,
        linears=(),
        adapter=SsfNorm,
        host=None,
        width=weight.numel(),
        affine=LinearMap(name),
    )
