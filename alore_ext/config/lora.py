"""The configuration of LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from .base import TARGETS, MethodConfig


@dataclass(frozen=True)
class LoraConfig(MethodConfig):
    """LoRA (Hu et al. 2022): `h = x W0 + alpha / rank * (x A^T) B^T`: MLAE without masks and coefficients.

    Args:
        rank: rows of A and columns of B.
        alpha: a finite number other than 0; None takes `rank`, so that the update is not scaled.
        targets: roles out of "qkv", "proj", "fc1", "fc2"; None takes the family's default (ViT: qkv).
        layers: block indices counted over the whole model; None takes all. Kept sorted, each once.
        modules: full names of the very linears to adapt, where roles and blocks are too coarse (queries and values
            without the keys); then `targets` and `layers` must be None. Kept in the order given, each once.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    modules: tuple[str, ...] | None = None

    method: ClassVar[str] = "lora"

    @property
    def scaling(self) -> float:
        """What the update is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def __post_init__(self) -> None:
        self._check_count("rank")
        if self.alpha is not None:
            self._check_number("alpha")
            if self.alpha == 0.0 or not math.isfinite(self.alpha):
                raise self._error("alpha", "None or a finite number other than 0", self.alpha)
        self._check_names("targets", TARGETS)
        self._check_layers()
        self._check_modules()

    def _check_modules(self) -> None:
        if self.modules is None:
            return
        expected = "None or a tuple of at least one module name"
        if isinstance(self.modules, (str, bytes)) or not isinstance(self.modules, Iterable):
            raise self._error("modules", expected, self.modules, TypeError)
        names = tuple(dict.fromkeys(self.modules))
        if not names:
            raise self._error("modules", expected, names)
        for name in names:
            if not isinstance(name, str):
                raise self._error("modules", expected, name, TypeError)
        for field in ("targets", "layers"):
            if getattr(self, field) is not None:
                raise self._error(field, "None where modules names the layers", getattr(self, field))
        self._set("modules", names)
