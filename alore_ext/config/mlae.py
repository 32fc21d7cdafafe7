"""The configuration of MLAE."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from .base import TARGETS, MethodConfig

MASKINGS = ("stochastic", "fixed", "mixed", "none")
STOCHASTIC_PATTERNS = ("uniform", "incremental", "decremental", "protruding", "hourglass")
FIXED_PATTERNS = ("incremental", "decremental", "protruding", "hourglass", "random")


@dataclass(frozen=True)
class MlaeConfig(MethodConfig):
    """MLAE: `h = x W0 + sum_i m_i lambda_i (x a_i) b_i` on a block's linears, with a fresh mask m a step.

    Args:
        num_experts: experts of a layer (with a named fixed pattern: their mean over the blocks; with a list of
            counts: unused).
        expert_rank: rank of each expert; the layer's factors have R = num_experts * expert_rank rows.
        dropout: probability that an expert is masked at a training step, in [0, 1); kept experts are scaled
            by 1 / (1 - p). With a stochastic pattern other than "uniform" the pattern's own probabilities are
            used instead; with masking "fixed" or "none" no expert is ever masked.
        coeff_init: the start value of every coefficient lambda.
        targets: roles out of "qkv", "proj", "fc1", "fc2"; None takes the family's default (ViT: qkv).
        layers: block indices counted over the whole model; None takes all. Kept sorted, each once.
        masking: "stochastic" draws masks; "fixed" gives each block its own number of experts, at inference
            too; "mixed" does both, with one `dropout` for all; "none" masks nothing.
        pattern: how the masking varies over depth (MLAE Table 4, A.5). By name: "uniform", "incremental",
            "decremental", "protruding", "hourglass" for "stochastic"; these but "uniform", and "random", for "fixed"
            and "mixed"; "uniform" for "none". The paper's tables are for 12 blocks; in a model of another depth,
            block i reads entry `12 * i // depth`. Or a list with one entry for each of the model's blocks, whichever
            of them `layers` adapts: experts of the block (ints >= 1) for "fixed" and "mixed", mask probabilities in
            [0, 1) for "stochastic". Its length is checked by `patch`.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    num_experts: int = 8
    expert_rank: int = 1
    dropout: float = 0.5
    coeff_init: float = 1.0
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    masking: str = "stochastic"
    pattern: str | tuple[int, ...] | tuple[float, ...] = "uniform"

    method: ClassVar[str] = "mlae"

    def __post_init__(self) -> None:
        self._check_count("num_experts")
        self._check_count("expert_rank")
        self._check_probability("dropout")
        self._check_number("coeff_init")
        if self.coeff_init in (0.0, float("inf"), float("-inf")) or self.coeff_init != self.coeff_init:
            # B starts at zero too: with lambda = 0 as well no gradient would ever reach either of them.
            raise self._error("coeff_init", "a finite number other than 0", self.coeff_init)
        self._check_names("targets", TARGETS)
        self._check_layers()
        self._check_choice("masking", MASKINGS)
        if not isinstance(self.pattern, str) and self.masking != "none":
            self._check_pattern_list()
        elif self.masking == "stochastic":
            self._check_choice("pattern", STOCHASTIC_PATTERNS)
        elif self.masking == "none":
            self._check_choice("pattern", ("uniform",))
        else:
            self._check_choice("pattern", FIXED_PATTERNS)
            if self.num_experts % 4:
                # The paper's 2, 6, 10 and 14 of 8 experts are 1/4, 3/4, 5/4 and 7/4 of num_experts.
                raise self._error("num_experts", f"a multiple of 4 with masking={self.masking!r}", self.num_experts)

    def _check_pattern_list(self) -> None:
        kind = "a probability in [0, 1)" if self.masking == "stochastic" else "an int >= 1"
        expected = f"the name of a pattern, or for masking={self.masking!r} a list with {kind} for each block"
        if isinstance(self.pattern, bytes) or not isinstance(self.pattern, Iterable):
            raise self._error("pattern", expected, self.pattern, TypeError)
        entries = []
        for entry in (values := tuple(self.pattern)):
            is_number = hasattr(entry, "__float__" if self.masking == "stochastic" else "__index__")
            if isinstance(entry, (bool, str, bytes)) or not is_number:
                raise self._error("pattern", expected, values, TypeError)
            entry = float(entry) if self.masking == "stochastic" else operator.index(entry)
            if not (0.0 <= entry < 1.0 if self.masking == "stochastic" else entry >= 1):
                raise self._error("pattern", expected, values)
            entries.append(entry)
        if not entries:
            raise self._error("pattern", expected, values)
        self._set("pattern", tuple(entries))
