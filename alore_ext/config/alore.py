"""The configuration of ALoRE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import LOCATIONS, MethodConfig

STRUCTURES = ("kronecker", "stacked_linear", "stacked_nonlinear")


@dataclass(frozen=True)
class AloreConfig(MethodConfig):
    """ALoRE: `y = x + dropout(x W')`, `W' = sum_i S_i (x) (D_i U_i)`, before or after a block's linears.

    The stacked structures are the baselines of the paper's Table 4, n whole bottleneck adapters side by side (its
    equation 5): `y = x + dropout(sum_i (act(x D_i + c_i) U_i + b_i))`, D_i [d, r], U_i [r, d]. Linear: act is the
    identity, and the adapter folds into the weight and bias of the linears around it; where one of them has no bias,
    `patch` refuses. Nonlinear: act is GELU (the paper names no function here; it is that of its FFN, equation 4), and
    the adapter trains, saves and loads, but cannot be merged.

    Args:
        num_experts: n, the experts of an adapter. "kronecker": also the side of each scale matrix, and must divide
            the width of every adapted layer.
        rank: r, the rank of each expert's `D_i U_i`.
        dropout: probability on the branch, in [0, 1); before the residual is added.
        locations: out of "before_attn", "after_attn", "before_ffn", "after_ffn"; None takes the family's
            default (ViT: before_attn and before_ffn).
        layers: block indices counted over the whole model; None takes all. Kept sorted, each once.
        share_scale: one set of scale matrices for the whole model (the paper's count) or one for each
            adapter. The stacked structures have none, and this means nothing to them.
        structure: "kronecker", "stacked_linear" or "stacked_nonlinear".

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    num_experts: int = 4
    rank: int = 4
    dropout: float = 0.0
    locations: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    share_scale: bool = True
    structure: str = "kronecker"

    method: ClassVar[str] = "alore"

    def __post_init__(self) -> None:
        self._check_count("num_experts")
        self._check_count("rank")
        self._check_probability("dropout")
        self._check_names("locations", LOCATIONS)
        self._check_layers()
        if not isinstance(self.share_scale, bool):
            raise self._error("share_scale", "True or False", self.share_scale, TypeError)
        self._check_choice("structure", STRUCTURES)

    @property
    def has_shared_scale(self) -> bool:
        """Whether its adapters read the model's one `alore_scale`."""
        return self.share_scale and self.structure == "kronecker"
