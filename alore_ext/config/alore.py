"""The configuration of ALoRE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import LOCATIONS, MethodConfig


@dataclass(frozen=True)
class AloreConfig(MethodConfig):
    """ALoRE: `y = x + dropout(x W')`, `W' = sum_i S_i (x) (D_i U_i)`, before or after a block's linears.

    Args:
        num_experts: n, the experts of an adapter and the side of each scale matrix. Must divide the width of
            every adapted layer.
        rank: r, the rank of each expert's `D_i U_i`.
        dropout: probability on the branch, in [0, 1); before the residual is added.
        locations: out of "before_attn", "after_attn", "before_ffn", "after_ffn"; None takes the family's
            default (ViT: before_attn and before_ffn).
        layers: block indices counted over the whole model; None takes all. Kept sorted, each once.
        share_scale: one set of scale matrices for the whole model (the paper's count) or one for each
            adapter.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    num_experts: int = 4
    rank: int = 4
    dropout: float = 0.0
    locations: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    share_scale: bool = True

    method: ClassVar[str] = "alore"

    def __post_init__(self) -> None:
        self._check_count("num_experts")
        self._check_count("rank")
        self._check_probability("dropout")
        self._check_names("locations", LOCATIONS)
        self._check_layers()
        if not isinstance(self.share_scale, bool):
            raise self._error("share_scale", "True or False", self.share_scale, TypeError)
