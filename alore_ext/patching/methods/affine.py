"""Bottleneck adapters with biases: ALoRE's stacked structures and RepAdapter, their records and places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alore_ext.config import AloreConfig, RepAdapterConfig
from alore_ext.modules import AffineBehind, AffineInput, attach
from alore_ext.modules.affine import AffineForm, GroupedForm, StackedForm

from ..grouping import AffineMerge, Merge
from ..records import AdapterRecord
from ..registry import AloreSite, Structure
from .sites import located_sites


@dataclass(frozen=True)
class AffineRecord(AdapterRecord):
    """One adapter on a layer of `width`; `form` says how its parameters make its maps."""

    side: str
    width: int
    rank: int
    form: AffineForm

    def init_(self, parameters: Mapping[str, Tensor]) -> None:
        """down xavier-uniform, all else zero: the start is the identity."""
        bound = math.sqrt(6.0 / (self.width + self.rank))
        nn.init.uniform_(parameters["down"], -bound, bound)
        for name in ("down_bias", "up", "up_bias"):
            nn.init.zeros_(parameters[name])

    def attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        attributes: dict[str, Any] = {"_affine_form": self.form, "_kept_experts": self.kept}
        attach(model.get_submodule(self.module), self.adapter, parameters, attributes)

    def merge_refusal(self) -> str | None:
        return "GELU stands between its two products, so no linear map equals it" if self.form.gelu else None

    def merged_tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        biases = {linear.bias_name: linear.bias_of(model) for linear in self.linears}
        # One that is never merged may stand before linears without a bias.
        biases = {name: bias for name, bias in biases.items() if bias is not None}
        return {**super().merged_tensors(model), **biases}

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        maps = self.form.maps(**parameters, kept=self.kept)
        return [AffineMerge(linear.matrix_of(model), linear.bias_of(model), maps, self.side) for linear in self.linears]


@dataclass(frozen=True)
class StackedRecord(AffineRecord):
    """ALoRE's stacked structures: `num_experts` adapters of one rank side by side."""

    num_experts: int

    method = "alore"

    def expert_count(self) -> int:
        return self.num_experts

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        n, d, r = self.num_experts, self.width, self.rank
        return {"down": (n, d, r), "down_bias": (n, r), "up": (n, r, d), "up_bias": (n, d)}


@dataclass(frozen=True)
class RepAdapterRecord(AffineRecord):
    """RepAdapter: `up` in `groups` blocks."""

    groups: int

    method = "rep_adapter"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        d, r, g = self.width, self.rank, self.groups
        return {"down": (d, r), "down_bias": (r,), "up": (g, r // g, d // g), "up_bias": (d,)}


def stacked_record(
    model: nn.Module, config: AloreConfig, index: int, block: int, location: str, site: AloreSite
) -> AdapterRecord:
    """The record of one block and location. `index` is the config's among the patch's configs."""
    site = _behind_padding(site)
    gelu = config.structure == "stacked_nonlinear"
    if not gelu:  # which is never merged, and so asks nothing of the linears
        _check_biases(model, f"AloreConfig: structure {config.structure!r}", location, site)
    return StackedRecord(
        **_shared_fields(index, block, location, site),
        rank=config.rank,
        form=StackedForm(site.channel_axis, gelu=gelu, dropout=config.dropout),
        num_experts=config.num_experts,
    )


def rep_adapter_records(
    model: nn.Module, structure: Structure, config: RepAdapterConfig, index: int
) -> list[AdapterRecord]:
    """One record for each block and location. `index` is the config's among the patch's configs."""
    records = []
    for block, location, found in located_sites(structure, config):
        site = _behind_padding(found)
        _check_biases(model, "RepAdapterConfig", location, site)
        if site.width % config.groups:
            raise ValueError(
                f"RepAdapterConfig: groups must divide the width of {site.module}, {site.width}, got {config.groups}"
            )
        record = RepAdapterRecord(
            **_shared_fields(index, block, location, site),
            rank=config.rank,
            form=GroupedForm(site.channel_axis, code_dropout=config.dropout, scale=config.scale),
            groups=config.groups,
        )
        records.append(record)
    return records


def _behind_padding(site: AloreSite) -> AloreSite:
    """Where an adapter with a bias acts: on padded zeros too, which the merged bias reaches."""
    return site.behind_padding or site


def _shared_fields(index: int, block: int, location: str, site: AloreSite) -> dict[str, Any]:
    return {
        "config": index,
        "block": block,
        "role": location,
        "module": site.module,
        "linears": site.linears,
        "adapter": AffineInput if site.end == "input" else AffineBehind,
        "host": site.host,
        "side": site.side,
        "width": site.width,
    }


def _check_biases(model: nn.Module, what: str, location: str, site: AloreSite) -> None:
    """Every linear must have a bias that takes the adapter's."""
    for linear in site.linears:
        reason = site.bias_refused
        if linear.bias_of(model) is None:
            reason = f"it has no {linear.bias} (none at all, or the layer around it adds one of its own)"
        if reason is not None:
            raise ValueError(f"{what}: {location} has biases to merge, but {linear.module} cannot take one: {reason}")
