"""Recognising a base model: which backbone an adapter file belongs to.

The fingerprint holds, for each tensor of the backbone (no adapters, no classifier head), its shape and three
numbers: two projections of a sample of its values and the sample's norm. Shapes must agree exactly. The
numbers must agree to about what rounding to bfloat16 changes, so that float32, bfloat16 and float16 copies of
one base match, and two bases of one architecture do not.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from .patching.state import PatchState

Fingerprint = dict[str, list[Any]]  # name -> [shape, [cosine projection, sine projection, norm]]

_SAMPLE_SIZE = 512
_SKETCH_SIZE = 3
# Rounding to bfloat16 moves a value by at most 2^-9 of it, and a projection by about 2^-10 of the sample's
# norm; another base moves it by about the norm itself. float16 cannot hold values below 2^-24 and moves those
# by up to 2^-25 each.
_RELATIVE_TOLERANCE = 0.01
_ABSOLUTE_TOLERANCE = 2.0**-24
_GOLDEN_ANGLE = 2.399963229728653  # incommensurable with any stride: the projections have no period


def fingerprint(model: nn.Module, state: PatchState) -> Fingerprint:
    """The fingerprint of a patched model's backbone. Reads at most 512 values of each tensor.

    A merged model must have kept its base.
    """
    adapters = set(state.adapter_names())
    tensors = model.state_dict() if state.merged is None else {**model.state_dict(), **state.merged.weights}
    return {
        name: [list(tensor.shape), _sketch(tensor)]
        for name, tensor in tensors.items()
        if name not in adapters and not state.is_head(name) and isinstance(tensor, Tensor)
    }


def parse_fingerprint(text: str) -> Fingerprint:
    """The fingerprint that `json.dumps` wrote.

    Raises ValueError, TypeError or LookupError for any other text.
    """
    return {
        name: [[int(size) for size in shape], [float(sketch[i]) for i in range(_SKETCH_SIZE)]]
        for name, (shape, sketch) in dict(json.loads(text)).items()
    }


def difference(expected: Fingerprint, found: Fingerprint) -> str | None:
    """Why two fingerprints are of different bases, in words; None where they are of the same."""
    for name in {**expected, **found}:
        if name not in found or name not in expected:
            return f"{name} is {'missing' if name not in found else 'unexpected'}"
    for name, (shape, sketch) in expected.items():
        found_shape, found_sketch = found[name]
        if shape != found_shape:
            return f"{name} must be of shape {shape}, got {found_shape}"
        norm = sketch[2]
        tolerance = _RELATIVE_TOLERANCE * norm + _ABSOLUTE_TOLERANCE * math.sqrt(_SAMPLE_SIZE)
        if not all(abs(a - b) <= tolerance for a, b in zip(sketch, found_sketch, strict=True)):
            return f"{name} has the right shape but other values"
    return None


@torch.no_grad()
def _sketch(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    stride = max(1, flat.numel() // _SAMPLE_SIZE)
    sample = flat[::stride][:_SAMPLE_SIZE].to("cpu", torch.float64)
    angles = torch.arange(1, sample.numel() + 1, dtype=torch.float64, device="cpu") * _GOLDEN_ANGLE
    projections = (sample @ angles.cos(), sample @ angles.sin(), sample.norm())
    return [float(f"{float(value):.7g}") for value in projections]
