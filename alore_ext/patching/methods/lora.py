"""LoRA: its records and its places."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alore_ext.config import LoraConfig
from alore_ext.modules import (
    FusedBiasAttention,
    LoraConv,
    LoraLinear,
    LoraMultiheadAttention,
    MlaeMultiheadAttention,
    attach,
)

from ..grouping import LoraMerge, Merge
from ..records import AdapterRecord
from ..registry import MlaeSite, Structure, get_family
from .sites import norm_before, selected_blocks, site_at

# What a family names as MLAE's class for a map that is no module of its own.
_LORA_OF = {None: LoraLinear, MlaeMultiheadAttention: LoraMultiheadAttention}


@dataclass(frozen=True)
class LoraRecord(AdapterRecord):
    """The low-rank update of one linear [out_features, in_features]."""

    in_features: int
    out_features: int
    rank: int
    scaling: float

    method = "lora"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"lora_a": (self.rank, self.in_features), "lora_b": (self.out_features, self.rank)}

    def init_(self, parameters: Mapping[str, Tensor]) -> None:
        """A kaiming-uniform (a = sqrt 5), B zero."""
        nn.init.kaiming_uniform_(parameters["lora_a"], a=math.sqrt(5))
        nn.init.zeros_(parameters["lora_b"])

    def attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        joint = self.host is not None and issubclass(self.host.adapter, FusedBiasAttention)
        attributes: dict[str, Any] = {
            "_lora_scaling": self.scaling,
            "_mlae_bias_owner": model.get_submodule(self.host.module) if joint else None,
        }
        attributes = {name: value for name, value in attributes.items() if name in self.adapter.adapter_attributes}
        attach(model.get_submodule(self.module), self.adapter, parameters, attributes)

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        lora_a = parameters["lora_a"]
        coeff = lora_a.new_full((self.rank,), self.scaling)
        return [LoraMerge(self.linears[0].matrix_of(model), lora_a, parameters["lora_b"], coeff)]


def lora_records(model: nn.Module, structure: Structure, config: LoraConfig, index: int) -> list[AdapterRecord]:
    """One record for each linear of the targets, or for each of `config.modules`."""
    places = _by_role(structure, config) if config.modules is None else _by_name(structure, config)
    return [_record(model, config, index, *place) for place in places]


Place = tuple[int, str, MlaeSite]  # block, role, site


def _by_role(structure: Structure, config: LoraConfig) -> Iterator[Place]:
    for block, sites in selected_blocks(structure, config):
        for target in config.targets or get_family(structure.family).default_targets:
            for site in site_at(sites, sites.mlae, target):
                yield block, target, site


def _by_name(structure: Structure, config: LoraConfig) -> Iterator[Place]:
    places = linear_sites(structure)
    for name in config.modules:
        if name not in places:
            raise ValueError(
                f"LoraConfig: modules must name linears of the model's blocks ({', '.join(list(places)[:4])}, ...), "
                f"got {name!r}"
            )
        yield places[name]


def linear_sites(structure: Structure) -> dict[str, Place]:
    """Every linear of the blocks that LoRA can adapt, by the name of the module that owns its weight."""
    return {
        site.linear.module: (block, role, site)
        for block, sites in enumerate(structure.blocks)
        for role, found in sites.mlae.items()
        for site in found
    }


def _record(model: nn.Module, config: LoraConfig, index: int, block: int, role: str, site: MlaeSite) -> LoraRecord:
    return LoraRecord(
        config=index,
        block=block,
        role=role,
        module=site.linear.module,
        linears=(site.linear,),
        adapter=LoraConv if site.channel_axis == 1 else _LORA_OF[site.adapter],
        host=site.host,
        in_features=site.linear.in_features(model),
        out_features=site.linear.out_features(model),
        rank=config.rank,
        scaling=config.scaling,
        norm=norm_before(model, site),
    )
