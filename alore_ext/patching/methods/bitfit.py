"""BitFit: its records and its places.

A bias may be changed wherever it is, whatever reads it, so nothing is asked of a family but its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from alore_ext.config import BitFitConfig
from alore_ext.modules import BitFitInProjection, BitFitJointBias, BitFitLayer, attach
from alore_ext.modules.adapter import Adapter

from ..grouping import Merge, ScaleShiftMerge
from ..records import AdapterRecord
from ..registry import Structure
from .sites import selected_blocks

# The names that biases have, and what makes the code that reads them read the changed ones.
_KINDS: tuple[tuple[tuple[str, ...], type[Adapter]], ...] = (
    (("bias",), BitFitLayer),
    (("in_proj_bias",), BitFitInProjection),
    (("q_bias", "v_bias"), BitFitJointBias),
)


@dataclass(frozen=True)
class BitFitRecord(AdapterRecord):
    """The biases of one layer. `shapes` are those of `biases`."""

    biases: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    method = "bitfit"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{bias}_delta": shape for bias, shape in zip(self.biases, self.shapes, strict=True)}

    def anchor_name(self) -> str:
        return f"{self.module}.{self.biases[0]}"

    def init_(self, parameters: Mapping[str, Tensor]) -> None:
        """Zero: the identity."""
        for delta in parameters.values():
            nn.init.zeros_(delta)

    def attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        attach(model.get_submodule(self.module), self.adapter, parameters, {})

    def merged_tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        owner = model.get_submodule(self.module)._parameters
        return {f"{self.module}.{bias}": owner[bias] for bias in self.biases}

    def merges(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Merge]:
        owner = model.get_submodule(self.module)._parameters
        return [ScaleShiftMerge(None, owner[bias], None, parameters[f"{bias}_delta"]) for bias in self.biases]


def bitfit_records(model: nn.Module, structure: Structure, config: BitFitConfig, index: int) -> list[AdapterRecord]:
    """One record for each layer with a bias.

    Raises ValueError where there is none, or where a bias is computed.
    """
    records: list[AdapterRecord] = []
    for block, sites in selected_blocks(structure, config):
        for name, layer in model.get_submodule(sites.name).named_modules(prefix=sites.name):
            for biases, adapter in _KINDS:
                if record := _record(layer, name, biases, adapter, block, index, config.norms):
                    records.append(record)
    if not records:
        raise ValueError(f"BitFitConfig: no layer of the {len(structure.blocks)} blocks has a bias to train")
    return records


def _record(
    layer: nn.Module,
    name: str,
    biases: tuple[str, ...],
    adapter: type[Adapter],
    block: int,
    index: int,
    norms: bool,
) -> BitFitRecord | None:
    for bias in biases:
        if is_parametrized(layer, bias):
            raise ValueError(f"BitFitConfig: {name} must store its {bias}, but computes it (a parametrization)")
        if layer._parameters.get(bias) is None:
            return None
    # The weight of a linear map or a convolution is more than one number a channel.
    weight = getattr(layer, "weight", None)
    is_norm = weight is not None and weight.shape == layer._parameters[biases[0]].shape
    if is_norm and not norms:
        return None
    return BitFitRecord(
        config=index,
        block=block,
        role="norm" if is_norm else "bias",
        module=name,
        linears=(),
        adapter=adapter,
        host=None,
        biases=biases,
        shapes=tuple(tuple(layer._parameters[bias].shape) for bias in biases),
    )
