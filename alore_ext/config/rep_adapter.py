"""The configuration of RepAdapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import LOCATIONS, MethodConfig


@dataclass(frozen=True)
class RepAdapterConfig(MethodConfig):
    """RepAdapter (Luo et al. 2023): `y = x + scale * up(dropout(down(x)))`, before or after a block's linears.

    `down` is a dense map d -> rank with bias, `up` a map rank -> d in `groups` blocks with bias: output block g reads
    the g-th part of the code. Weights alone are 221,184 parameters on ViT-B at rank 8 and 2 groups, the 0.22 M of the
    papers' tables; with the biases, which train as well, they are 239,808.

    The adapter folds into the weight and bias of the linears around it; where one of them has no bias, `patch` refuses.

    Args:
        rank: width of the code. `groups` must divide it.
        groups: blocks of `up`. Must divide the width of every adapted layer.
        scale: factor of the branch; the papers pick it from {0.1, 0.5, 1, 5, 10}. Not 0.
        dropout: probability on the code, in [0, 1). The public code trains with 0.1.
        locations: out of "before_attn", "after_attn", "before_ffn", "after_ffn"; None takes the family's
            default (ViT: before_attn and before_ffn).
        layers: block indices counted over the whole model; None takes all. Kept sorted, each once.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    rank: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.0
    locations: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    method: ClassVar[str] = "rep_adapter"

    def __post_init__(self) -> None:
        self._check_count("rank")
        self._check_count("groups")
        if self.rank % self.groups:
            raise self._error("groups", f"a divisor of rank, {self.rank}", self.groups)
        self._check_number("scale")
        if self.scale == 0.0 or not math.isfinite(self.scale):
            raise self._error("scale", "a finite number other than 0", self.scale)
        self._check_probability("dropout")
        self._check_names("locations", LOCATIONS)
        self._check_layers()
