"""Configurations of the methods: plain, frozen, validated when they are made.

A config knows nothing about a model. What depends on one (does `num_experts` divide the width, does block 17
exist) is checked by `patch`, with the layer's name in the error.
"""

from __future__ import annotations

from typing import Any

from .alore import STRUCTURES, AloreConfig
from .base import LOCATIONS, TARGETS, MethodConfig, parse_json
from .bitfit import BitFitConfig
from .lora import LoraConfig
from .mlae import FIXED_PATTERNS, MASKINGS, STOCHASTIC_PATTERNS, MlaeConfig
from .rep_adapter import RepAdapterConfig
from .ssf import SsfConfig

__all__ = [
    "FIXED_PATTERNS",
    "LOCATIONS",
    "MASKINGS",
    "STOCHASTIC_PATTERNS",
    "STRUCTURES",
    "TARGETS",
    "AloreConfig",
    "BitFitConfig",
    "Config",
    "LoraConfig",
    "MlaeConfig",
    "RepAdapterConfig",
    "SsfConfig",
    "config_from_dict",
    "config_from_json",
]

Config = MethodConfig
_CLASSES = {cls.method: cls for cls in (AloreConfig, MlaeConfig, RepAdapterConfig, LoraConfig, SsfConfig, BitFitConfig)}


def config_from_dict(fields: dict[str, Any]) -> Config:
    """The config whose `method` tag the fields carry. Raises ValueError where no method has that tag."""
    method = fields.get("method") if isinstance(fields, dict) else None
    if method not in _CLASSES:
        raise ValueError(f"config: method must be one of {tuple(_CLASSES)}, got {method!r}")
    return _CLASSES[method].from_dict(fields)


def config_from_json(text: str) -> Config:
    """The config that `to_json` of any of the classes wrote."""
    return config_from_dict(parse_json(text, "config"))
