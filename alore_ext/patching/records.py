"""One record for each adapter: its layer by name, how it is put on, started, and folded into the backbone's
weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alore_ext.modules import FusedBiasAttention, attach, detach
from alore_ext.modules.adapter import Adapter

from .grouping import KronMerge, LoraMerge, Merge
from .linear_map import LinearMap
from .registry import Host

SHARED_SCALE = "alore_scale"


@dataclass(frozen=True)
class AdapterRecord:
    """What both methods' records have.

    Attributes:
        config: index into the patch's configs.
        block: the block's index over the whole model.
        role: the location ("before_attn") or target ("qkv") that the config asked for.
        module: the adapted layer's name.
        linears: the maps that take the merge.
        adapter: what the layer becomes.
        host: what must change around the layer for it to be called at all.
    """

    config: int
    block: int
    role: str
    module: str
    linears: tuple[LinearMap, ...]
    adapter: type[Adapter]
    host: Host | None

    method: ClassVar[str]
    shares_scale: ClassVar[bool] = False

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The adapter's own parameters and their shapes, in the order of registration."""
        raise NotImplementedError

    def init_(self, parameters: Mapping[str, Tensor]) -> None:
        """Start values, in place, from torch's global generator."""
        raise NotImplementedError

    def attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the adapter on its layer."""
        raise NotImplementedError

    def detach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Take off the adapter, or what a failed `attach` left; returns its parameters by their own names."""
        layer = model.get_submodule(self.module)
        return detach(layer) if isinstance(layer, Adapter) else {}

    def is_attached(self, model: nn.Module) -> bool:
        """Whether the layer of this name still is the one that was patched."""
        try:
            return isinstance(model.get_submodule(self.module), Adapter)
        except AttributeError:
            return False

    def merged_tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The backbone's parameters that `merge_` changes, by full name."""
        return {linear.weight_name: linear.weight_of(model) for linear in self.linears}

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        """What folds the adapter into `merged_tensors`, in order.

        `parameters` are its own, and `alore_scale` where shared.
        """
        raise NotImplementedError


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
        }
        attach(model.get_submodule(self.module), self.adapter, parameters, attributes)

    def merged_tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        tensors = super().merged_tensors(model)
        for linear in self.linears if self.side == "after" else ():
            if (bias := linear.bias_of(model)) is not None:
                tensors[linear.bias_name] = bias
        return tensors

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        scale = parameters[SHARED_SCALE if self.share_scale else "scale"]
        merges: list[Merge] = []
        for linear in self.linears:
            bias = linear.bias_of(model) if self.side == "after" else None
            weight = linear.matrix_of(model)
            merges.append(KronMerge(weight, bias, scale, parameters["down"], parameters["up"], self.side))
        return merges


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
            "_mlae_bias_owner": model.get_submodule(self.host.module) if joint else None,
        }
        attributes = {name: attributes[name] for name in self.adapter.adapter_attributes}
        attach(model.get_submodule(self.module), self.adapter, parameters, attributes)

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        coeff = parameters["coeff"]
        if self.expert_rank > 1:
            coeff = coeff.repeat_interleave(self.expert_rank)
        weight = self.linears[0].matrix_of(model)
        return [LoraMerge(weight, parameters["lora_a"], parameters["lora_b"], coeff)]


def init_scale_(scale: Tensor) -> None:
    """Scale matrices [n, n, n] from a normal of variance 1/n, in place."""
    with torch.no_grad():
        scale.normal_(0.0, scale.shape[0] ** -0.5)
