"""Configurations of the two methods: plain, frozen, validated when they are made.

A config knows nothing about a model. What depends on one (does `num_experts` divide the width, does block 17
exist) is checked by `patch`, with the layer's name in the error.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

LOCATIONS = ("before_attn", "after_attn", "before_ffn", "after_ffn")
TARGETS = ("qkv", "proj", "fc1", "fc2")
MASKINGS = ("stochastic", "fixed", "mixed", "none")
STOCHASTIC_PATTERNS = ("uniform", "incremental", "decremental", "protruding", "hourglass")
FIXED_PATTERNS = ("incremental", "decremental", "protruding", "hourglass", "random")


class _Config:
    """What both configs share: field checks and JSON with a `method` tag."""

    method: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """All fields and the `method` tag, in types that JSON knows."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {"method": self.method, **fields}

    def to_json(self) -> str:
        """One JSON object; `from_json` of the same class gives an equal config back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, fields: dict[str, Any]):
        """The inverse of `to_dict`.

        Raises ValueError for another method's tag or a field that does not exist.
        """
        if not isinstance(fields, dict):
            raise TypeError(f"{cls.__name__}: expected a JSON object, got {type(fields).__name__}")
        fields = dict(fields)
        method = fields.pop("method", None)
        if method != cls.method:
            raise ValueError(f"{cls.__name__}: method must be {cls.method!r}, got {method!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; expected some of {known}")
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str):
        """The inverse of `to_json`.

        Raises ValueError for text that is not JSON, another method's tag, or unknown fields.
        """
        return cls.from_dict(_parse_json(text, cls.__name__))

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)  # the one way to normalise a field of a frozen dataclass

    def _error(self, field: str, expected: str, got: Any, kind: type[Exception] = ValueError) -> Exception:
        return kind(f"{type(self).__name__}: {field} must be {expected}, got {got!r}")

    def _check_count(self, field: str) -> None:
        value = getattr(self, field)
        expected = "an int >= 1"
        if isinstance(value, bool):
            raise self._error(field, expected, value, TypeError)
        try:
            value = operator.index(value)  # takes numpy integers, refuses 4.0
        except TypeError:
            raise self._error(field, expected, value, TypeError) from None
        if value < 1:
            raise self._error(field, expected, value)
        self._set(field, value)

    def _check_number(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
            raise self._error(field, "a number", value, TypeError)
        self._set(field, float(value))

    def _check_probability(self, field: str) -> None:
        self._check_number(field)
        value = getattr(self, field)
        if not 0.0 <= value < 1.0:  # also refuses NaN
            raise self._error(field, "in [0, 1)", value)

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if not isinstance(value, str):
            raise self._error(field, f"one of {choices}", value, TypeError)
        if value not in choices:
            raise self._error(field, f"one of {choices}", value)

    def _check_names(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value is None:
            return
        expected = f"None or a tuple out of {choices}"
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise self._error(field, expected, value, TypeError)
        names = tuple(value)
        if not names:
            raise self._error(field, f"{expected} with at least one entry", names)
        for name in names:
            if not isinstance(name, str):
                raise self._error(field, expected, name, TypeError)
            if name not in choices:
                raise self._error(field, expected, name)
        self._set(field, tuple(choice for choice in choices if choice in names))

    def _check_layers(self, field: str = "layers") -> None:
        value = getattr(self, field)
        if value is None:
            return
        expected = "None or an iterable of block indices >= 0"
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise self._error(field, expected, value, TypeError)
        indices = set()
        for index in value:
            if isinstance(index, bool):
                raise self._error(field, expected, index, TypeError)
            try:
                indices.add(operator.index(index))
            except TypeError:
                raise self._error(field, expected, index, TypeError) from None
        if not indices:
            raise self._error(field, f"{expected}, not an empty one", ())
        if min(indices) < 0:
            raise self._error(field, expected, min(indices))
        self._set(field, tuple(sorted(indices)))


@dataclass(frozen=True)
class AloreConfig(_Config):
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


@dataclass(frozen=True)
class MlaeConfig(_Config):
    """MLAE: `h = x W0 + sum_i m_i lambda_i (x a_i) b_i` on a block's linears, with a fresh mask m a step.

    Args:
        num_experts: experts of a layer (with a fixed pattern: their mean over the blocks).
        expert_rank: rank of each expert; the layer's factors have R = num_experts * expert_rank rows.
        dropout: probability that an expert is masked at a training step, in [0, 1); kept experts are scaled
            by 1 / (1 - p). With a stochastic pattern other than "uniform" the pattern's own probabilities are
            used instead; with masking "fixed" or "none" no expert is ever drawn.
        coeff_init: the start value of every coefficient lambda.
        targets: roles out of "qkv", "proj", "fc1", "fc2"; None takes the family's default (ViT: qkv).
        layers: block indices counted over the whole model; None takes all. Kept sorted, each once.
        masking: "stochastic" draws masks; "fixed" gives each block its own number of experts, at inference
            too; "mixed" does both, with one `dropout` for all; "none" masks nothing.
        pattern: how the masking varies over depth (MLAE Table 4, A.5): "uniform", "incremental",
            "decremental", "protruding", "hourglass", and "random" for "fixed" and "mixed".

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
    pattern: str = "uniform"

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
        if self.masking == "stochastic":
            self._check_choice("pattern", STOCHASTIC_PATTERNS)
        elif self.masking == "none":
            self._check_choice("pattern", ("uniform",))
        else:
            self._check_choice("pattern", FIXED_PATTERNS)
            if self.num_experts % 4:
                # The paper's 2, 6, 10 and 14 of 8 experts are 1/4, 3/4, 5/4 and 7/4 of num_experts.
                raise self._error("num_experts", f"a multiple of 4 with masking={self.masking!r}", self.num_experts)


Config = AloreConfig | MlaeConfig
_CLASSES = {cls.method: cls for cls in (AloreConfig, MlaeConfig)}


def config_from_dict(fields: dict[str, Any]) -> Config:
    """The config whose `method` tag the fields carry. Raises ValueError where no method has that tag."""
    method = fields.get("method") if isinstance(fields, dict) else None
    if method not in _CLASSES:
        raise ValueError(f"config: method must be one of {tuple(_CLASSES)}, got {method!r}")
    return _CLASSES[method].from_dict(fields)


def config_from_json(text: str) -> Config:
    """The config that `to_json` of either class wrote."""
    return config_from_dict(_parse_json(text, "config"))


def _parse_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
