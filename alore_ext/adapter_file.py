"""What an adapter file is: safetensors with the adapters, the classifier head, and what is needed to put them back.

Tensors carry their names in the patched model ("alore_scale", "blocks.0.norm1.down", "head.weight"). The
metadata holds the format's version, the family, the configs, the head's names, the base's fingerprint and, where
given, the names of the classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import Config, config_from_dict
from .fingerprint import Fingerprint, fingerprint, parse_fingerprint
from .patching.state import PatchState

_FORMAT = "alore_ext_adapter"
_VERSION = 1


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file's contents, checked to be one.

    Attributes:
        path: where it was read, for messages.
        base: the fingerprint of the backbone that it was trained on; None where that is not known.
        labels: names of the classes; None where the file has none.
    """

    path: str
    family: str
    configs: tuple[Config, ...]
    head_names: tuple[str, ...]
    base: Fingerprint | None
    tensors: dict[str, Tensor]
    labels: tuple[str, ...] | None = None
    caller: str = "load_adapter"

    def head_tensors(self) -> dict[str, Tensor]:
        """The tensors of the classifier."""
        return {n: t for n, t in self.tensors.items() if any(n.startswith(f"{head}.") for head in self.head_names)}

    def error(self, text: str) -> ValueError:
        """A ValueError that names the file."""
        return ValueError(f"{self.caller}: {self.path}: {text}")


def adapter_metadata(model: nn.Module, state: PatchState, labels: Sequence[str] | None = None) -> dict[str, str]:
    """What a file says about a patched model's adapters besides their tensors.

    No fingerprint of the base where there is none to take: of a model that was merged with `keep_base=None`, or that
    is on the meta device.
    """
    metadata = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "family": state.family,
        "configs": json.dumps([config.to_dict() for config in state.configs]),
        "head": json.dumps(list(state.head_names)),
    }
    on_meta = any(tensor.is_meta for tensor in model.state_dict().values() if isinstance(tensor, Tensor))
    if not on_meta and (state.merged is None or state.merged.weights is not None):
        metadata["base"] = json.dumps(fingerprint(model, state))
    if labels is not None:
        try:
            _check_text(labels, "labels")
        except ValueError as error:
            raise ValueError(f"save_adapter: {error}") from None
        metadata["labels"] = json.dumps(list(labels))
    return metadata


def read_adapter(path: str | os.PathLike, caller: str = "load_adapter") -> AdapterFile:
    """Read a file that `save_adapter` wrote.

    Raises as `load_adapter` does for what the file alone can be wrong in.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{caller}: no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{caller}: {path} is not a safetensors file, or is truncated: {error}") from None
    if "base" not in metadata and metadata.get("format") == _FORMAT:
        raise ValueError(f"{caller}: {path}: damaged metadata: no fingerprint of the base")
    return parse_adapter(metadata, tensors, path, caller)


def is_adapter_metadata(metadata: object) -> bool:
    """Whether this is what `adapter_metadata` gives."""
    return isinstance(metadata, Mapping) and metadata.get("format") == _FORMAT


def parse_adapter(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: str, caller: str = "load_adapter"
) -> AdapterFile:
    """Metadata and tensors as one checked object. Raises ValueError naming `caller` and `path`."""
    if not is_adapter_metadata(metadata):
        raise ValueError(f"{caller}: {path} is not an adapter file: format is {metadata.get('format')!r}")
    if metadata.get("format_version") != str(_VERSION):
        raise ValueError(f"{caller}: {path}: format_version must be {_VERSION}, got {metadata.get('format_version')!r}")
    try:
        configs = tuple(config_from_dict(fields) for fields in json.loads(metadata["configs"]))
        if not configs:
            raise ValueError("expected at least one config")
        return AdapterFile(
            path=path,
            family=metadata["family"],
            configs=configs,
            head_names=_strings(metadata["head"], "names of modules"),
            base=parse_fingerprint(metadata["base"]) if "base" in metadata else None,
            tensors=dict(tensors),
            labels=_strings(metadata["labels"], "names of classes") if "labels" in metadata else None,
            caller=caller,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{caller}: {path}: damaged metadata: {error!r}") from None


def _strings(text: str, what: str) -> tuple[str, ...]:
    values = json.loads(text)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"expected {what}, got {values}")
    _check_text(values, what)
    return tuple(values)


def _check_text(values: Sequence[str], what: str) -> None:
    """Raises for strings that no file or answer can hold: with halves of surrogate pairs, which JSON lets through."""
    for value in values:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} must be text that UTF-8 can hold, got {value!r}") from None
