"""MLAE: its records and its places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alore_ext.config import MlaeConfig
from alore_ext.masking import expert_counts, mask_probabilities
from alore_ext.modules import FusedBiasAttention, MlaeConv, MlaeLinear, attach
from alore_ext.modules.experts import keep_lora_experts

from ..grouping import LoraMerge, Merge
from ..records import AdapterRecord
from ..registry import MlaeSite, Structure, get_family
from .sites import norm_before, selected_blocks, site_at


@dataclass(frozen=True)
class MlaeRecord(AdapterRecord):
    """The MLAE experts of one linear [out_features, in_features]."""

    in_features: int
    out_features: int
    num_experts: int
    expert_rank: int
    coeff_init: float
    mask_p: float

    method = "mlae"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        total_rank = self.num_experts * self.expert_rank
        return {
            "lora_a": (total_rank, self.in_features),
            "lora_b": (self.out_features, total_rank),
            "coeff": (self.num_experts,),
        }

    def init_(self, parameters: Mapping[str, Tensor]) -> None:
        """A kaiming-uniform (a = sqrt 5), B zero, every coefficient at `coeff_init`."""
        nn.init.kaiming_uniform_(parameters["lora_a"], a=math.sqrt(5))
        nn.init.zeros_(parameters["lora_b"])
        nn.init.constant_(parameters["coeff"], self.coeff_init)

    def attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        joint = self.host is not None and issubclass(self.host.adapter, FusedBiasAttention)
        attributes: dict[str, Any] = {
            "_mlae_mask_p": self.mask_p,
            "_mlae_expert_rank": self.expert_rank,
            "_kept_experts": self.kept,
            "_mlae_bias_owner": model.get_submodule(self.host.module) if joint else None,
        }
        attributes = {name: value for name, value in attributes.items() if name in self.adapter.adapter_attributes}
        attach(model.get_submodule(self.module), self.adapter, parameters, attributes)

    def expert_count(self) -> int:
        return self.num_experts

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        factors = (parameters["lora_a"], parameters["lora_b"], parameters["coeff"])
        lora_a, lora_b, coeff = keep_lora_experts(*factors, self.kept, self.expert_rank)
        if self.expert_rank > 1:
            coeff = coeff.repeat_interleave(self.expert_rank)
        weight = self.linears[0].matrix_of(model)
        return [LoraMerge(weight, lora_a, lora_b, coeff)]


def mlae_records(model: nn.Module, structure: Structure, config: MlaeConfig, index: int) -> list[AdapterRecord]:
    """One record for each block and linear of the targets. `index` is the config's among the patch's configs."""
    depth = len(structure.blocks)
    targets = config.targets or get_family(structure.family).default_targets
    counts, probabilities = expert_counts(config, depth), mask_probabilities(config, depth)
    return [
        _record(model, config, index, block, target, site, counts[block], probabilities[block])
        for block, sites in selected_blocks(structure, config)
        for target in targets
        for site in site_at(sites, sites.mlae, target)
    ]


def _record(
    model: nn.Module,
    config: MlaeConfig,
    index: int,
    block: int,
    target: str,
    site: MlaeSite,
    num_experts: int,
    mask_p: float,
) -> MlaeRecord:
    return MlaeRecord(
        config=index,
        block=block,
        role=target,
        module=site.linear.module,
        linears=(site.linear,),
        adapter=site.adapter or (MlaeConv if site.channel_axis == 1 else MlaeLinear),
        host=site.host,
        in_features=site.linear.in_features(model),
        out_features=site.linear.out_features(model),
        num_experts=num_experts,
        expert_rank=config.expert_rank,
        coeff_init=config.coeff_init,
        mask_p=mask_p,
        norm=norm_before(model, site),
    )
