"""Reads published AS-MLP checkpoints, without running what may be inside them."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["load_as_mlp_checkpoint"]


def load_as_mlp_checkpoint(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Loads weights into a model of :mod:`alore_ext.models.as_mlp`, strictly, and returns it.

    Args:
        model: of the checkpoint's size and number of classes. It is changed only if everything fits.
        path: what `torch.save` wrote, a state dict or ``{"model": state dict, ...}`` as the published files are; or a
            ``.safetensors`` file. Tensors are converted to the model's dtype and device.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or holds no state dict; it holds pickled objects besides tensors, which are
            not loaded because that would run code of the file; or its names or shapes are not the model's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_as_mlp_checkpoint: there is no file {path}")
    state = _read(path)
    own = model.state_dict()
    _check_fit(path, state, own)
    model.load_state_dict(state)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"load_as_mlp_checkpoint: {path} is not a whole safetensors file: {error}") from error
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            if foreign is not None:
                raise ValueError(_foreign_object(path, foreign[1])) from error
            raise ValueError(f"load_as_mlp_checkpoint: {path} is not a checkpoint of torch.save: {error}") from error
        except (RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"load_as_mlp_checkpoint: {path} is damaged, or not of torch.save: {error}") from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        found = f"the entries {list(content)[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(
            f"load_as_mlp_checkpoint: {path} must hold a state dict, or one under 'model'; it holds {found}"
        )
    return dict(state)


def _foreign_object(path: Path, name: str) -> str:
    clean = path.with_suffix(".safetensors").name
    return (
        f"load_as_mlp_checkpoint: {path} holds more than tensors (a pickled {name}), and loading that would run code "
        "of the file, so it is refused. If you trust where the file comes from, keep its weights alone, once, in a "
        f"Python that can import {name.partition('.')[0]}:\n"
        "    import torch, safetensors.torch\n"
        f'    content = torch.load("{path.name}", map_location="cpu", weights_only=False)\n'
        '    weights = {name: value.contiguous() for name, value in content["model"].items()}\n'
        f'    safetensors.torch.save_file(weights, "{clean}")\n'
        f"and load {clean}."
    )


def _check_fit(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Names and shapes must agree; another number of classes is told as such."""
    differing = sorted(
        name
        for name in state.keys() | own.keys()
        if name not in state or name not in own or state[name].shape != own[name].shape
    )
    if not differing:
        return
    stored, expected = _classes(state), _classes(own)
    if all(name.startswith("head.") for name in differing) and stored != expected:
        raise ValueError(
            f"load_as_mlp_checkpoint: {path} has {_described(stored)}, the model {_described(expected)}: load it into "
            f"a model made with num_classes={stored}, then call reset_classifier({expected})"
        )
    raise ValueError(
        f"load_as_mlp_checkpoint: {path} does not fit the model in {len(differing)} of its {len(own)} tensors, first "
        f"{differing[0]}: expected {_shape(own, differing[0])}, got {_shape(state, differing[0])}"
    )


def _classes(state: Mapping[str, Tensor]) -> int:
    return state["head.weight"].shape[0] if "head.weight" in state else 0


def _described(num_classes: int) -> str:
    return f"a head of {num_classes} classes" if num_classes else "no head"


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "none"
