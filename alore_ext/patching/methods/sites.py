"""Which blocks and places of a model a config speaks of."""

from __future__ import annotations

from alore_ext.config import Config

from ..registry import AloreSite, BlockSites, Structure, get_family


def selected_blocks(structure: Structure, config: Config) -> list[tuple[int, BlockSites]]:
    """(index, block) of the config's `layers`, counted over the whole model.

    Raises ValueError for an index that the model does not have.
    """
    depth = len(structure.blocks)
    layers = range(depth) if config.layers is None else config.layers
    if max(layers) >= depth:
        name = type(config).__name__
        raise ValueError(f"{name}: layers must be in 0..{depth - 1} for {depth} blocks, got {max(layers)}")
    return [(block, structure.blocks[block]) for block in layers]


def located_sites(structure: Structure, config: Config) -> list[tuple[int, str, AloreSite]]:
    """(block, location, site) of the config's `layers` and `locations`, or of the family's default locations.

    Raises ValueError for an index or a location that the model does not have.
    """
    locations = config.locations or get_family(structure.family).default_locations
    return [
        (block, location, site_at(sites, sites.alore, location))
        for block, sites in selected_blocks(structure, config)
        for location in locations
    ]


def site_at(block: BlockSites, table: dict, place: str):
    """What a block offers at a location (`table` is its `alore`) or for a role (`mlae`).

    Raises ValueError saying why it offers nothing.
    """
    if place not in table:
        reason = block.refused.get(place, f"{block.name} offers {', '.join(table) or 'no place at all'}")
        raise ValueError(f"patch: {place} is not possible: {reason}")
    return table[place]
