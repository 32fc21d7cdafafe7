"""Families of backbones: how each is recognised, and where in its blocks adapters can go.

A family is one file that defines a `Family` and registers it. It says what a model offers (`Structure`); it
changes nothing. Everything after that, from validation to merging, is the same for all families.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import nn


@dataclass(frozen=True)
class AloreSite:
    """A place for one ALoRE adapter.

    Attributes:
        module: name of the layer that becomes an ALoRE layer: a norm ("before") or a linear ("after").
        side: "before" or "after", where the adapter stands as seen from the linears it folds into.
        linears: names of the linears that take the merge: for "before" all that consume the layer's output.
        width: size of the last dimension that the adapter acts on.
    """

    module: str
    side: str
    linears: tuple[str, ...]
    width: int


@dataclass(frozen=True)
class MlaeSite:
    """A linear for MLAE experts.

    Attributes:
        module: the linear's name.
        bias_owner: name of an attention whose forward would go around the linear, and whose class must change
            with it (see `modules.FusedBiasAttention`); None where the linear is called as a module.
    """

    module: str
    bias_owner: str | None = None


@dataclass(frozen=True)
class BlockSites:
    """What one block offers. `refused` says of a location or role that the block lacks why it does."""

    name: str
    alore: dict[str, AloreSite] = field(default_factory=dict)
    mlae: dict[str, tuple[MlaeSite, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """What a family found in a model.

    Attributes:
        family: the family's name.
        backbone: name of the submodule that holds the blocks and answers `get_classifier`; "" for the model
            itself.
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
