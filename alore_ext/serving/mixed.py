"""One forward pass over images that need different adapters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alore_ext.modules import (
    AloreChannelsNorm,
    AloreConv,
    AloreInput,
    AloreLayerNorm,
    AloreLayerNorm2d,
    AloreLinear,
    AloreNorm,
    FusedBiasAttention,
    LoraConv,
    LoraLinear,
    LoraMultiheadAttention,
    MlaeConv,
    MlaeLinear,
    MlaeMultiheadAttention,
    attach,
)
from alore_ext.modules.adapter import Adapter
from alore_ext.modules.pooled import (
    AdapterStack,
    HeadRoute,
    LayerRoute,
    PooledChannels,
    PooledHeadLinear,
    PooledHeadNorm,
    PooledLayer,
    PooledLayerNorm,
    PooledLayerNorm2d,
    PooledLinear,
    PooledMultiheadAttention,
)
from alore_ext.patching.methods.alore import AloreRecord
from alore_ext.patching.records import SHARED_SCALE, AdapterRecord

from .clones import clone_sharing_tensors, logits_of, replace_module, replace_parameter
from .entry import Entry, num_classes

# What serves an adapter's class: the pooled one of its layer, and the place in the layer's route.
_POOLED: dict[type[Adapter], tuple[type[Adapter], str]] = {
    AloreLayerNorm: (PooledLayerNorm, "after"),
    AloreNorm: (PooledLayer, "after"),
    AloreLinear: (PooledLinear, "after"),
    AloreInput: (PooledLinear, "before"),
    MlaeLinear: (PooledLinear, "weight"),
    LoraLinear: (PooledLinear, "weight"),
    AloreLayerNorm2d: (PooledLayerNorm2d, "after"),
    AloreChannelsNorm: (PooledChannels, "after"),
    AloreConv: (PooledChannels, "after"),
    MlaeConv: (PooledChannels, "weight"),
    LoraConv: (PooledChannels, "weight"),
    MlaeMultiheadAttention: (PooledMultiheadAttention, "weight"),
    LoraMultiheadAttention: (PooledMultiheadAttention, "weight"),
}

Place = tuple[str, str]  # layer, place in its route


@dataclass(frozen=True, eq=False)
class _Served:
    """An adapter's factors by place, and its classifier: what of it a forward pass needs."""

    factors: dict[Place, tuple[Tensor, Tensor, Tensor]]
    head: dict[str, dict[str, Tensor]]
    num_classes: int | None


@dataclass(frozen=True, eq=False)
class _Layer:
    """Of the adapters of a batch, those at one place: their positions, and three lists of their factors."""

    holders: tuple[int, ...]
    factors: tuple[list[Tensor], ...]


class MixedModel:
    """A clone of the backbone whose layers take one adapter a sample. It shares the backbone's own weights.

    Not thread-safe: a batch's routes are on the layers while it runs.
    """

    def __init__(self, base: nn.Module):
        self.model = clone_sharing_tensors(base)
        self._base = base
        self._routes: dict[str, LayerRoute] = {}
        self._heads: dict[str, HeadRoute] = {}
        self._served: dict[str | None, _Served] = {None: _Served({}, {}, None)}
        self._last_table: tuple[tuple[int, ...], dict[Place, _Layer]] | None = None

    def replace_parameter(self, name: str, value: Tensor) -> None:
        """Put another tensor in the place of a weight, by full name."""
        replace_parameter(self.model, name, value)

    def check(self, entry: Entry) -> None:
        """Raises ValueError naming a layer or classifier of the adapter that cannot take one adapter a sample."""
        for record in entry.records:
            layer = self._base.get_submodule(record.module)
            if isinstance(layer, nn.MultiheadAttention) and not layer.batch_first:
                raise ValueError(f"AdapterPool.add: {entry.name!r}: {record.module} must be batch_first=True")
        for module, tensors in entry.head.items():
            _pooled_head(module, self._base.get_submodule(module), tensors, HeadRoute(), entry.name)

    def prepare(self, entry: Entry) -> _Served:
        """Make the layers that this adapter touches ready for it; returns what `add` takes. Needs `check` first."""
        for record in entry.records:
            self._attach(record)
        for module, tensors in entry.head.items():
            if module not in self._heads:
                route = self._heads[module] = HeadRoute()
                layer = self._base.get_submodule(module)
                replace_module(self.model, module, _pooled_head(module, layer, tensors, route, entry.name))
        factors = {(record.module, _POOLED[record.adapter][1]): _factors(record, entry) for record in entry.records}
        return _Served(factors, entry.head, entry.num_classes)

    def add(self, name: str, served: _Served) -> None:
        """Take in an adapter for `run`, in the place of one of its name. Cannot fail."""
        self._last_table = None
        self._served[name] = served

    def remove(self, name: str) -> None:
        """Forget an adapter. The layers stay ready."""
        del self._served[name]
        self._last_table = None

    def _base_classes(self) -> int | None:
        return num_classes({m: dict(self._base.get_submodule(m).named_parameters()) for m in self._heads})

    @torch.no_grad()
    def run(self, images: Tensor, names: Sequence[str | None]) -> list[Tensor] | Tensor:
        """Logits of each image under the adapter of its name, None being the base.

        Args:
            images: [batch, channels, height, width] on the model's device, in its dtype.
            names: one an image, or a single one for all of them; adapters that were added.

        Returns:
            [batch, classes] where all names are one; else a list of [classes], one an image.
        """
        # In the pool's order, so that batches of the same adapters find the same table.
        asked = set(names)
        used = [name for name in self._served if name in asked]
        slot_of = {name: slot for slot, name in enumerate(used)}
        slots = [slot_of[name] for name in names] if len(used) > 1 else [0] * len(images)
        served = [self._served[name] for name in used]
        heads = {module: self._head_tensors(module, served, used) for module in self._heads}
        try:
            self._set_routes(served, heads, slots, images.device)
            logits = logits_of(self.model(images))
        finally:
            for route in self._routes.values():
                route.before = route.weight = route.after = None
            for head in self._heads.values():
                head.tensors, head.slot, head.start = (), None, None
        if len(used) == 1:
            return logits
        widths = [entry.num_classes or self._base_classes() or logits.shape[-1] for entry in served]
        return [row[: widths[slot]] for row, slot in zip(logits.unbind(0), slots, strict=True)]

    def _attach(self, record: AdapterRecord) -> None:
        module = self.model.get_submodule(record.module)
        kind = _POOLED[record.adapter][0]
        if kind is PooledLinear and not isinstance(module, nn.Linear):
            kind = PooledLayer
        host = None if record.host is None else self.model.get_submodule(record.host.module)
        if record.module not in self._routes:
            route = self._routes[record.module] = LayerRoute()
            attach(module, kind, {}, {"_pooled_route": route, "_pooled_bias_owner": None})
        if host is None:
            return
        if not isinstance(host, record.host.adapter):
            attach(host, record.host.adapter, {}, {})
        if issubclass(record.host.adapter, FusedBiasAttention):
            module.__dict__["_pooled_bias_owner"] = host

    def _set_routes(
        self,
        served: Sequence[_Served],
        heads: dict[str, list[dict[str, Tensor]]],
        slots: list[int],
        device: torch.device,
    ) -> None:
        """Write to every layer what this batch needs of it."""
        layers = self._layer_table(served)
        # Layers that the same adapters touch share one index.
        patterns = dict.fromkeys(entry.holders for entry in layers.values())
        positions = [{slot: position for position, slot in enumerate(holders)} for holders in patterns]
        starts = [_starts(tensors) for tensors in heads.values()]
        rows = [slots]
        rows += ([position.get(slot, -1) for slot in slots] for position in positions)
        rows += ([start[slot] for slot in slots] for start in starts)
        index = _to_device(rows, device)
        indices = dict(zip(patterns, index[1 : 1 + len(patterns)].unbind(0), strict=True))
        for (layer, place), entry in layers.items():
            setattr(self._routes[layer], place, AdapterStack(entry.factors, indices[entry.holders]))
        for module, tensors, start in zip(heads, heads.values(), index[1 + len(patterns) :].unbind(0), strict=True):
            route = self._heads[module]
            route.tensors, route.slot, route.start = tensors, index[0], start

    def _layer_table(self, served: Sequence[_Served]) -> dict[Place, _Layer]:
        """For every place that one of the adapters touches: which do, and their factors."""
        key = tuple(map(id, served))
        if self._last_table is None or self._last_table[0] != key:
            places = dict.fromkeys(place for entry in served for place in entry.factors)
            holders = {place: tuple(i for i, entry in enumerate(served) if place in entry.factors) for place in places}
            table = {
                place: _Layer(
                    own, tuple(list(column) for column in zip(*(served[i].factors[place] for i in own), strict=True))
                )
                for place, own in holders.items()
            }
            self._last_table = key, table
        return self._last_table[1]

    def _head_tensors(
        self, module: str, served: Sequence[_Served], used: Sequence[str | None]
    ) -> list[dict[str, Tensor]]:
        own = dict(self._base.get_submodule(module).named_parameters())
        tensors = [entry.head.get(module, own) for entry in served]
        for values, name in zip(tensors, used, strict=True):
            if not values:
                raise ValueError(
                    f"AdapterPool.predict: {'the base' if name is None else repr(name)} has no classifier {module!r}, "
                    "which other adapters of the pool have"
                )
        return tensors


def _starts(tensors: Sequence[dict[str, Tensor]]) -> list[int]:
    """Where each classifier's outputs begin when all are computed side by side."""
    return [0, *itertools.accumulate(len(own["weight"]) for own in tensors)]


def _to_device(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    """int64 [rows, batch]. Neither host nor device waits for the other."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    return torch.tensor(rows, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def _factors(record: AdapterRecord, entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    own = entry.own_parameters(record)
    if isinstance(record, AloreRecord):
        return own[SHARED_SCALE if record.shares_scale else "scale"], own["down"], own["up"]
    rank = own["lora_a"].shape[0]
    if "coeff" not in own:
        return own["lora_a"], own["lora_b"], own["lora_a"].new_full((rank,), record.scaling)
    coeff = own["coeff"]
    return own["lora_a"], own["lora_b"], coeff.repeat_interleave(rank // coeff.numel())


def _pooled_head(module: str, layer: nn.Module, tensors: dict[str, Tensor], route: HeadRoute, name: str) -> nn.Module:
    """What takes the place of a part of the classifier.

    Raises ValueError where it is of a kind, or has tensors of a shape, that no sample can have of its own.
    """
    shapes = {own: list(value.shape) for own, value in layer.named_parameters()}
    got = {own: list(value.shape) for own, value in tensors.items()}
    is_norm = isinstance(layer, nn.LayerNorm) and shapes == got and len(layer.normalized_shape) == 1
    if is_norm and set(got) == {"weight", "bias"}:
        return PooledHeadNorm(route, layer.eps, 1 if type(layer).__name__ == "LayerNorm2d" else -1)
    fits = {"weight"} <= got.keys() <= {"weight", "bias"} and len(got["weight"]) == 2
    width = getattr(layer, "in_features", None)
    if isinstance(layer, (nn.Linear, nn.Identity)) and fits and width in (None, got["weight"][1]):
        return PooledHeadLinear(route)
    raise ValueError(
        f"AdapterPool.add: {name!r}: expected the classifier {module!r} to be a linear or a layer norm with "
        f"{shapes or 'a weight of two axes'}, got a {type(layer).__name__} and tensors {got}"
    )
