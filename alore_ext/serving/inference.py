"""Which configs a plain dict of adapter tensors was patched with, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from alore_ext.config import AloreConfig, Config, MlaeConfig
from alore_ext.patching.registry import Structure


def infer_configs(structure: Structure, tensors: Mapping[str, Tensor]) -> list[Config]:
    """Configs that give adapters of these names and shapes.

    ALoRE's tensors tell num_experts, rank and places, MLAE's num_experts, expert_rank and targets. What only training
    asks for, dropout and masks, is left at none.

    Raises:
        ValueError: no adapter among the tensors; low-rank factors without coefficients, whose scaling is not in them;
            a place that the model does not have.
    """
    places: dict[tuple, dict[int, set[str]]] = {}  # what a config fixes -> block -> locations or targets
    for name, value in tensors.items():
        module, _, own = name.rpartition(".")
        if own == "down" and value.dim() == 3:
            key = ("alore", value.shape[0], value.shape[2], f"{module}.scale" not in tensors)
            sites = (
                (b, place) for b, s in enumerate(structure.blocks) for place, x in s.alore.items() if x.module == module
            )
        elif own == "lora_a" and value.dim() == 2:
            if (coeff := tensors.get(f"{module}.coeff")) is None:
                raise ValueError(
                    f"{module} has low-rank factors and no coeff: give config=LoraConfig(rank=..., alpha=...)"
                )
            key = ("mlae", coeff.numel(), value.shape[0] // coeff.numel())
            sites = (
                (b, role)
                for b, s in enumerate(structure.blocks)
                for role, found in s.mlae.items()
                if any(x.linear.module == module for x in found)
            )
        else:
            continue
        found = next(sites, None)
        if found is None:
            raise ValueError(f"{name}: the {structure.family} model has no place for an adapter at {module!r}")
        places.setdefault(key, {}).setdefault(found[0], set()).add(found[1])
    if not places:
        raise ValueError(f"holds no adapter's tensors (down and up, or lora_a and lora_b), got {list(tensors)[:3]}")
    return [config for key, by_block in places.items() for config in _configs(key, by_block)]


def _configs(key: tuple, by_block: dict[int, set[str]]) -> list[Config]:
    """One config for each set of places that some blocks have in common."""
    layers: dict[tuple[str, ...], list[int]] = {}
    for block, found in by_block.items():
        layers.setdefault(tuple(sorted(found)), []).append(block)
    return [_config(key, found, tuple(sorted(blocks))) for found, blocks in layers.items()]


def _config(key: tuple, places: tuple[str, ...], layers: tuple[int, ...]) -> Config:
    if key[0] == "alore":
        _, experts, rank, shared = key
        return AloreConfig(num_experts=experts, rank=rank, share_scale=shared, locations=places, layers=layers)
    _, experts, expert_rank = key
    return MlaeConfig(num_experts=experts, expert_rank=expert_rank, dropout=0.0, targets=places, layers=layers)
