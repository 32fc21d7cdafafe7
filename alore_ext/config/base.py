"""What the configurations of all methods share."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterable
from typing import Any, ClassVar

LOCATIONS = ("before_attn", "after_attn", "before_ffn", "after_ffn")
TARGETS = ("qkv", "proj", "fc1", "fc2")


def parse_json(text: str, name: str) -> Any:
    """The JSON value of `text`; raises ValueError naming `name` where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: not JSON: {error}") from None


class MethodConfig:
    """What all configs share: field checks and JSON with a `method` tag."""

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
        return cls.from_dict(parse_json(text, cls.__name__))

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

    def _check_flag(self, field: str) -> None:
        if not isinstance(getattr(self, field), bool):
            raise self._error(field, "True or False", getattr(self, field), TypeError)

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
