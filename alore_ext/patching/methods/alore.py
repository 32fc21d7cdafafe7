"""ALoRE: its records and its places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alore_ext.config import AloreConfig
from alore_ext.modules import (
    AloreChannelsNorm,
    AloreConv,
    AloreInput,
    AloreLayerNorm,
    AloreLayerNorm2d,
    AloreLinear,
    AloreNorm,
    attach,
)
from alore_ext.modules.adapter import Adapter
from alore_ext.modules.experts import keep_experts

from ..grouping import KronMerge, Merge
from ..records import SHARED_SCALE, AdapterRecord, init_scale_
from ..registry import AloreSite, Structure
from .affine import stacked_record
from .sites import is_plain_layer_norm, located_sites


@dataclass(frozen=True)
class AloreRecord(AdapterRecord):
    """One ALoRE adapter on a layer of `width` = num_experts * p."""

    side: str
    width: int
    num_experts: int
    rank: int
    dropout: float
    share_scale: bool

    method = "alore"

    @property
    def shares_scale(self) -> bool:
        return self.share_scale

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        n, p, r = self.num_experts, self.width // self.num_experts, self.rank
        own_scale = {} if self.share_scale else {"scale": (n, n, n)}
        return {"down": (n, p, r), "up": (n, r, p), **own_scale}

    def init_(self, parameters: Mapping[str, Tensor]) -> None:
        """D xavier-uniform for each expert, U zero (the start is the identity), S normal of variance 1/n."""
        _, p, r = parameters["down"].shape
        bound = math.sqrt(6.0 / (p + r))
        nn.init.uniform_(parameters["down"], -bound, bound)
        nn.init.zeros_(parameters["up"])
        if "scale" in parameters:
            init_scale_(parameters["scale"])

    def attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        attributes: dict[str, Any] = {
            "_alore_root": model if self.share_scale else None,
            "_alore_dropout": self.dropout,
            "_kept_experts": self.kept,
        }
        attach(model.get_submodule(self.module), self.adapter, parameters, attributes)

    def expert_count(self) -> int:
        return self.num_experts

    def merged_tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        tensors = super().merged_tensors(model)
        for linear in self.linears if self.side == "after" else ():
            if (bias := linear.bias_of(model)) is not None:
                tensors[linear.bias_name] = bias
        return tensors

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        names = (SHARED_SCALE if self.share_scale else "scale", "down", "up")
        scale, down, up = (keep_experts(parameters[name], self.kept) for name in names)
        merges: list[Merge] = []
        for linear in self.linears:
            bias = linear.bias_of(model) if self.side == "after" else None
            weight = linear.matrix_of(model)
            merges.append(KronMerge(weight, bias, scale, down, up, self.side))
        return merges


def alore_records(model: nn.Module, structure: Structure, config: AloreConfig, index: int) -> list[AdapterRecord]:
    """One record for each block and location. `index` is the config's among the patch's configs."""
    make = _record if config.structure == "kronecker" else stacked_record
    return [
        make(model, config, index, block, location, site) for block, location, site in located_sites(structure, config)
    ]


def _record(
    model: nn.Module, config: AloreConfig, index: int, block: int, location: str, site: AloreSite
) -> AloreRecord:
    if site.width % config.num_experts:
        raise ValueError(
            f"AloreConfig: num_experts must divide the width of {site.module}, {site.width}, got {config.num_experts}"
        )
    return AloreRecord(
        config=index,
        block=block,
        role=location,
        module=site.module,
        linears=site.linears,
        adapter=_adapter(site, model.get_submodule(site.module)),
        host=site.host,
        side=site.side,
        width=site.width,
        num_experts=config.num_experts,
        rank=config.rank,
        dropout=config.dropout,
        share_scale=config.share_scale,
    )


def _adapter(site: AloreSite, layer: nn.Module) -> type[Adapter]:
    """What `layer`, the site's module, becomes."""
    if site.end == "input":
        return AloreInput
    if site.channel_axis == 1:
        if site.side == "after":
            return AloreConv
        return AloreLayerNorm2d if _is_layer_norm_2d(layer) else AloreChannelsNorm
    if site.side == "after":
        return AloreLinear
    return AloreLayerNorm if is_plain_layer_norm(layer) else AloreNorm


def _is_layer_norm_2d(layer: nn.Module) -> bool:
    """A layer norm over the channels of NCHW: timm's or torchvision's."""
    kind = type(layer)
    return kind.__name__ == "LayerNorm2d" and kind.__module__.startswith(("timm.layers.", "torchvision.models."))
