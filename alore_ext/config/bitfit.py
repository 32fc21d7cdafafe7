"""The configuration of BitFit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import MethodConfig


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """BitFit (Ben Zaken et al. 2022): the biases that the blocks have are trained, as deltas that start at zero.

    Args:
        layers: block indices counted over the whole model; None takes all. Kept sorted, each once.
        norms: train the biases of norms too, and not those of linear maps and convolutions alone.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    layers: tuple[int, ...] | None = None
    norms: bool = True

    method: ClassVar[str] = "bitfit"

    def __post_init__(self) -> None:
        self._check_layers()
        self._check_flag("norms")
