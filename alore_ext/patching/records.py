"""What a record of one adapter says: its layer by name, how it is put on, started, and folded into the weights.

Each method has a record of its own (see `methods`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from alore_ext.modules import detach
from alore_ext.modules.adapter import Adapter

from .grouping import Merge
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
        kept: the experts that run and are merged, ascending; None where all do (see `alore_ext.retain_experts`).
        norm: the layer norm that may compute this layer together with itself (see `modules.MlaeNorm`), or None.
    """

    config: int
    block: int
    role: str
    module: str
    linears: tuple[LinearMap, ...]
    adapter: type[Adapter]
    host: Host | None
    kept: tuple[int, ...] | None = field(default=None, kw_only=True)
    norm: str | None = field(default=None, kw_only=True)

    method: ClassVar[str]
    shares_scale: ClassVar[bool] = False

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The adapter's own parameters and their shapes, in the order of registration."""
        raise NotImplementedError

    def init_(self, parameters: Mapping[str, Tensor]) -> None:
        """Start values, in place, from torch's global generator."""
        raise NotImplementedError

    def anchor_name(self) -> str:
        """Full name of a backbone's parameter that the adapter's follow to a device and dtype."""
        return self.linears[0].weight_name

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

    def expert_count(self) -> int | None:
        """How many experts the adapter has; None for a method without experts."""
        return None

    def merge_refusal(self) -> str | None:
        """Why no weight can take the adapter; None where the merge is exact."""
        return None

    def merged_tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The backbone's parameters that `merge_` changes, by full name."""
        return {linear.weight_name: linear.weight_of(model) for linear in self.linears}

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        """What folds the adapter into `merged_tensors`, in order.

        `parameters` are its own, and `alore_scale` where shared.
        """
        raise NotImplementedError


def init_scale_(scale: Tensor) -> None:
    """Scale matrices [n, n, n] from a normal of variance 1/n, in place."""
    with torch.no_grad():
        scale.normal_(0.0, scale.shape[0] ** -0.5)
