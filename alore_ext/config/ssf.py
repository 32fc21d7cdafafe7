"""The configuration of SSF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import TARGETS, MethodConfig


@dataclass(frozen=True)
class SsfConfig(MethodConfig):
    """SSF (Lian et al. 2022): `y = gamma * f(x) + beta` behind a block's linears and norms.

    The start is gamma = 1 and beta = 0, the identity. The authors' code draws them from N(1, 0.02) and N(0, 0.02); here
    every method starts at the pretrained model, and neither of the two needs noise to get a gradient.

    Args:
        targets: roles out of "qkv", "proj", "fc1", "fc2"; None takes all that the family's blocks have.
        norms: scale and shift the blocks' norms as well.
        layers: block indices counted over the whole model; None takes all. Kept sorted, each once.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    targets: tuple[str, ...] | None = None
    norms: bool = True
    layers: tuple[int, ...] | None = None

    method: ClassVar[str] = "ssf"

    def __post_init__(self) -> None:
        self._check_names("targets", TARGETS)
        self._check_flag("norms")
        self._check_layers()
