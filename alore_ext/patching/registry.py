"""Families of backbones: how each is recognised, and where in its blocks adapters can go.

A family is one file that defines a `Family` and registers it. It says what a model offers (`Structure`); it
changes nothing. Everything after that, from validation to merging, is the same for all families.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from alore_ext.modules.adapter import Adapter

from .linear_map import LinearMap


@dataclass(frozen=True)
class Host:
    """A containing module whose forward would go around its linears, and the class under which it calls them.

    Attributes:
        module: the containing module's name.
        adapter: what its class becomes while one of its linears is adapted (see `modules.FusedBiasAttention`).
    """

    module: str
    adapter: type[Adapter]


@dataclass(frozen=True)
class AloreSite:
    """A place for one ALoRE adapter.

    Attributes:
        module: name of the layer that becomes an ALoRE layer.
        side: "before" or "after", where the adapter stands as seen from the linears it folds into.
        linears: the maps that take the merge: for "before" all that consume the adapted value.
        width: size of the axis that the adapter acts on.
        end: which end of `module` is adapted: its "output" (a norm's, or the linear's own), or its "input".
        channel_axis: the axis that the adapter acts on: -1, or 1 for NCHW.
        host: what must change for the module to be called at all.
        behind_padding: the site at which the value stands once zeros have been padded in; None where none are. An
            adapter with a bias must act there: the merged bias reaches the padding too.
        bias_refused: why a bias of the linears' own does not always reach the result, so that no adapter with a bias
            can be merged; None where it does.
    """

    module: str
    side: str
    linears: tuple[LinearMap, ...]
    width: int
    end: str = "output"
    channel_axis: int = -1
    host: Host | None = None
    behind_padding: AloreSite | None = None
    bias_refused: str | None = None


@dataclass(frozen=True)
class MlaeSite:
    """A linear for MLAE experts.

    Attributes:
        linear: the map. Where the parameters are not an nn.Linear's or a convolution's own, `adapter` says what the
            owning module becomes.
        channel_axis: the axis that the map acts on: -1, or 1 for a 1x1 convolution.
        host: what must change for the linear to be called at all; None where it is called as a module.
        adapter: the class that the owning module takes; None for the usual one of its kind.
        norm: the norm whose output is, as it is, the input of this linear and of no other; None where there is none.
    """

    linear: LinearMap
    channel_axis: int = -1
    host: Host | None = None
    adapter: type[Adapter] | None = None
    norm: str | None = None


@dataclass(frozen=True)
class BlockSites:
    """What one block offers.

    `norms` names the norm of each residual branch, before or behind it. `refused` says of a location or role that the
    block lacks why it does.
    """

    name: str
    alore: dict[str, AloreSite] = field(default_factory=dict)
    mlae: dict[str, tuple[MlaeSite, ...]] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """What a family found in a model.

    Attributes:
        family: the family's name.
        backbone: name of the submodule that holds the blocks and the classifier; "" for the model itself.
        blocks: one entry for each block, counted over the whole model.
    """

    family: str
    backbone: str
    blocks: tuple[BlockSites, ...]


class NotThisFamily(Exception):
    """Raised by `Family.find`: the text says what was looked for and what is there."""


class Family(Protocol):
    """One kind of backbone."""

    name: str
    default_locations: tuple[str, ...]
    default_targets: tuple[str, ...]

    def find(self, model: nn.Module) -> Structure:
        """The model's structure. Raises NotThisFamily. Must not change the model."""


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to `patch`. Families are tried in the order of registration."""
    _FAMILIES[family.name] = family


def get_family(name: str) -> Family:
    """The family of this name. Raises ValueError naming those that are known."""
    if name not in _FAMILIES:
        raise ValueError(f"unknown family {name!r}; known families: {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def find_structure(model: nn.Module, family: str | None = None) -> Structure:
    """The model's structure, by the family named or the first that recognises it.

    Raises:
        ValueError: no family recognises the model; the text gives each one's reason.
    """
    families = _FAMILIES.values() if family is None else (get_family(family),)
    reasons = []
    for candidate in families:
        try:
            return candidate.find(model)
        except NotThisFamily as reason:
            reasons.append(f"{candidate.name}: {reason}")
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    what = "is of no known family" if family is None else f"is not of family {family!r}"
    raise ValueError(f"patch: {type(model).__name__} {what}. {'; '.join(reasons)}. Its children: {children}")
