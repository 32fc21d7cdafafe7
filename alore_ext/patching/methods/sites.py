"""Which blocks and places of a model a config speaks of."""

from __future__ import annotations

from torch import nn

from alore_ext.config import Config

from ..registry import AloreSite, BlockSites, MlaeSite, Structure, get_family


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


def norm_before(model: nn.Module, site: MlaeSite) -> str | None:
    """The norm that the site's linear can be computed together with (see `modules.MlaeNorm`)."""
    is_linear = site.adapter is None and site.channel_axis == -1
    if not is_linear or site.norm is None or not is_plain_layer_norm(model.get_submodule(site.norm)):
        return None
    return site.norm


def is_plain_layer_norm(layer: nn.Module) -> bool:
    """nn.LayerNorm or one that computes the same, over the last dimension: what `ops.layer_norm_alore` computes."""
    kind = type(layer)
    if kind.__module__.startswith("transformers.models.convnext"):
        is_known = getattr(layer, "data_format", None) == "channels_last"
    else:
        is_timm = kind.__module__.startswith("timm.layers.") and kind.__name__ == "LayerNorm"
        is_known = kind is nn.LayerNorm or is_timm
    return is_known and len(layer.normalized_shape) == 1
