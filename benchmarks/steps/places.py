"""Which layers of a model the methods work on: one answer for this library, plain PyTorch and PEFT."""

from dataclasses import dataclass

from alore_ext.patching.registry import find_structure, get_family


@dataclass(frozen=True)
class Places:
    """Names of layers.

    Attributes:
        first_block: the floor asks for the gradient of its input, so that backward runs through every block.
        alore: (layer, width) of each ALoRE adapter, which stands behind that layer.
        mlae: the linears that MLAE adapts.
        lokr: last names of the linears that ALoRE acts on ("qkv", "fc1"): LoKr's targets.
        lora: the same for LoRA; in a ViT those of MLAE ("qkv"), as is the habit there.
        head: the classifier.
        channel_axis: of the activations there: -1, or 1 for NCHW between 1x1 convolutions.
    """

    first_block: str
    alore: tuple[tuple[str, int], ...]
    mlae: tuple[str, ...]
    lokr: tuple[str, ...]
    lora: tuple[str, ...]
    head: str
    channel_axis: int


def find_places(model) -> Places:
    """The family's default places.

    Raises ValueError for a model of no known family.
    """
    structure = find_structure(model)
    family = get_family(structure.family)
    alore = [block.alore[location] for block in structure.blocks for location in family.default_locations]
    mlae = [site for block in structure.blocks for target in family.default_targets for site in block.mlae[target]]
    lokr = last_names(linear.module for site in alore if site.side == "before" for linear in site.linears)
    classifier = model.get_classifier()
    return Places(
        first_block=structure.blocks[0].name,
        alore=tuple((site.module, site.width) for site in alore),
        mlae=tuple(site.linear.module for site in mlae),
        lokr=lokr,
        lora=last_names(site.linear.module for site in mlae) if structure.family == "vit" else lokr,
        head=next(name for name, module in model.named_modules() if module is classifier),
        channel_axis=alore[0].channel_axis,
    )


def last_names(names) -> tuple[str, ...]:
    """Each last part of a dotted name, once."""
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
