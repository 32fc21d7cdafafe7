"""LoRA adapters in the folders that PEFT reads and writes: adapter_config.json beside adapter_model.safetensors.

PEFT's tensors are "base_model.model.<layer>.lora_A.weight" [rank, in_features] and "...lora_B.weight" [out_features,
rank], with two axes of size 1 behind for a 1x1 convolution, and "base_model.model.<layer>.<name>" for layers that were
trained as a whole, such as the classifier. Nothing in such a folder tells one base model from another.

Some attentions read the weights of their linears and never call them. PEFT's layer on such a linear would not run; this
library makes those attentions call it. Adapters there are refused in both directions, and so are those of
`nn.MultiheadAttention`, for which PEFT has a layout of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._files import write_atomic
from .adapter_file import AdapterFile
from .checkpoint import adapter_state_dict, checked_values, copy_, restore_head
from .config import LoraConfig
from .patching.apply import apply_plan, check_unpatched, empty_parameters
from .patching.attaching import undo_on_error
from .patching.methods.lora import LoraRecord, linear_sites
from .patching.plan import make_plan
from .patching.registry import Structure, find_structure
from .patching.state import PatchState, require_state

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}
# Fields of PEFT's config that make something else of its tensors than a low-rank update, where they are set.
_REFUSED_FIELDS = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Starts that also change the base's weights, so that the tensors mean nothing without the changed base.
_REFUSED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def export_peft(model: nn.Module, directory: str | os.PathLike, include_head: bool = True) -> Path:
    """Write a model's LoRA adapters, and by default its head, as a folder for `peft.PeftModel.from_pretrained`.

    Args:
        model: patched with one or several `LoraConfig` and nothing else.
        directory: made where it does not exist; files of these names in it are replaced.
        include_head: the classifier goes in too, as PEFT's `modules_to_save`. The base that PEFT loads it on must have
            a classifier of the same size.

    Returns:
        The folder's path.

    Raises:
        ValueError: not patched; merged; an adapter of another method, or one on a layer that PEFT cannot adapt.
    """
    state = require_state(model, "export_peft")
    if state.merged is not None:
        raise ValueError(f"export_peft: {type(model).__name__} is merged; call unmerge_ first")
    for record in state.records:
        if not isinstance(record, LoraRecord):
            raise ValueError(
                f"export_peft: {record.module} has an adapter of method {record.method!r}; PEFT's format holds those "
                f"of LoraConfig alone"
            )
        if reason := _unknown_to_peft(model, record):
            raise ValueError(f"export_peft: {reason}; merge_and_unload gives weights that need no adapter")
    values = adapter_state_dict(model, include_head=False)
    tensors: dict[str, Tensor] = {}
    for record in state.records:
        is_conv = isinstance(model.get_submodule(record.module), nn.Conv2d)
        for suffix, name in _FACTORS.items():
            value = values[f"{record.module}.{name}"]
            tensors[f"{_PREFIX}{record.module}{suffix}"] = value[:, :, None, None] if is_conv else value
    heads: list[str] = []
    if include_head:
        head = {name: value for name, value in model.state_dict().items() if state.is_head(name)}
        heads = [name for name in state.head_names if any(key.startswith(f"{name}.") for key in head)]
        tensors.update({_PREFIX + name: value.detach() for name, value in head.items()})
    config = _config_for_peft(model, state, heads)

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contents = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomic(directory / TENSORS_FILE, lambda path: save_file(contents, path, {"format": "pt"}))
    text = json.dumps(config, indent=2) + "\n"
    write_atomic(directory / CONFIG_FILE, lambda path: Path(path).write_text(text, encoding="utf-8"))
    return directory


def _unknown_to_peft(model: nn.Module, record: LoraRecord) -> str | None:
    """Why PEFT could not run this adapter; None where it can."""
    if isinstance(model.get_submodule(record.linears[0].module), nn.MultiheadAttention):
        return f"{record.module} is an nn.MultiheadAttention, for whose in_proj_weight PEFT has another layout"
    if record.host is not None:
        return (
            f"{record.host.module} reads the weight of {record.module} and does not call the layer, so PEFT's layer in "
            f"its place would never run"
        )
    return None


def _config_for_peft(model: nn.Module, state: PatchState, heads: list[str]) -> dict[str, Any]:
    names = [record.module for record in state.records]
    ranks = {record.module: record.rank for record in state.records}
    alphas = {record.module: record.scaling * record.rank for record in state.records}
    rank, alpha = ranks[names[0]], alphas[names[0]]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain_number(alpha),
        "lora_dropout": 0.0,
        "target_modules": _targets_for_peft(model, names),
        "modules_to_save": heads or None,
        # PEFT takes the keys for regular expressions.
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): _plain_number(a) for name, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _targets_for_peft(model: nn.Module, names: list[str]) -> list[str] | str:
    """The names; or a regular expression where PEFT, which compares the ends of names, would find others as well."""
    known = set(names)
    for other, _ in model.named_modules():
        parts = other.split(".")
        if other not in known and any(".".join(parts[i:]) in known for i in range(1, len(parts))):
            return "|".join(map(re.escape, names))
    return names


def _plain_number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def load_peft(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Put a LoRA adapter that PEFT saved on a plain model: patch it, and load factors and classifier.

    Which layers are adapted, and at what rank, is read from the tensors; the scaling from the config. Layers of PEFT's
    `modules_to_save` become the head; without any, the model's own classifier is the head, as for `patch`.

    Args:
        model: the base that the adapter was trained on. The folder cannot tell whether it is.
        directory: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The same model, patched with one `LoraConfig` for each rank and scaling in the folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no LoRA of the plain kind (DoRA, trained biases, a start that changed the base's weights); a layer
            that is not there or cannot be adapted, or that PEFT's layer went around; a tensor of another shape; a model
            that is patched already. The model is left as it was.
    """
    check_unpatched(model)
    directory = Path(directory)
    fields, tensors = _read_folder(directory)
    _check_fields(directory, fields)
    factors, rest = _split(tensors)
    file = AdapterFile(
        path=os.fspath(directory),
        family="",
        configs=(),
        head_names=tuple(_head_names(model, fields, rest)),
        base={},
        tensors={**factors, **rest},
        caller="load_peft",
    )
    if unknown := sorted(rest.keys() - file.head_tensors().keys()):
        raise file.error(f"holds {unknown[0]}, which is neither lora_A, lora_B nor of modules_to_save")
    structure = find_structure(model)
    configs = _configs(structure, fields, factors, file)
    try:
        plan = make_plan(model, configs, file.head_names or None, structure.family)
    except ValueError as error:
        raise file.error(str(error)) from error
    parameters = empty_parameters(model, plan)
    values = checked_values(parameters, file)
    with undo_on_error() as on_error:
        restore_head(model, file, on_error)
        for name, parameter in parameters.items():
            copy_(parameter, values[name])
        apply_plan(model, plan, parameters)
    return model


def _read_folder(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (directory / name).is_file():
            other = " (a .bin file is a pickle, which may run code; it is not read)" if name == TENSORS_FILE else ""
            raise FileNotFoundError(f"load_peft: no {name} in {directory}{other}")
    try:
        fields = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(directory / TENSORS_FILE)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"load_peft: {directory} holds a damaged file: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"load_peft: {directory}: {CONFIG_FILE} must hold an object, got {type(fields).__name__}")
    return fields, tensors


def _check_fields(directory: Path, fields: dict[str, Any]) -> None:
    def refuse(field: str, expected: str) -> None:
        raise ValueError(f"load_peft: {directory}: {field} must be {expected}, got {fields.get(field)!r}")

    if fields.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    if fields.get("bias", "none") != "none":
        refuse("bias", "'none'")
    for field in _REFUSED_FIELDS:
        if fields.get(field):
            refuse(field, "unset")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REFUSED_STARTS):
        refuse("init_lora_weights", "a start that leaves the base's weights as they are")
    alpha = fields.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        refuse("lora_alpha", "a number")


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The factors by our names, and all other tensors by the model's."""
    factors: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        suffix = next((suffix for suffix in _FACTORS if name.endswith(suffix)), None)
        if suffix is None:
            rest[name] = tensor
        else:
            is_conv = tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
            factors[f"{name.removesuffix(suffix)}.{_FACTORS[suffix]}"] = tensor.flatten(1) if is_conv else tensor
    return factors, rest


def _head_names(model: nn.Module, fields: dict[str, Any], tensors: Iterable[str]) -> Iterator[str]:
    """The modules that the ends of names in modules_to_save speak of, where the folder has tensors of them."""
    ends = fields.get("modules_to_save") or ()
    for name, _ in model.named_modules():
        if name and any(name.endswith(end) for end in ends) and any(key.startswith(f"{name}.") for key in tensors):
            yield name


def _configs(
    structure: Structure, fields: dict[str, Any], factors: dict[str, Tensor], file: AdapterFile
) -> list[LoraConfig]:
    """One config for each rank and alpha."""
    sites = linear_sites(structure)
    layers: dict[tuple[int, float], list[str]] = {}
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in factors))
    if unknown := [module for module in modules if module not in sites]:
        raise file.error(
            f"adapts {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}, which this library cannot adapt in "
            f"this model: it adapts the linears of the blocks ({next(iter(sites), 'none')}, ...)"
        )
    for module in modules:
        _, _, site = sites[module]
        if site.host is not None or site.adapter is not None:
            raise file.error(
                f"adapts {module}, whose attention reads the weight and does not call the layer: PEFT's layer never ran"
            )
        lora_a = factors.get(f"{module}.lora_a")
        if lora_a is None or lora_a.dim() != 2:
            raise file.error(f"misses lora_A of {module}, as a matrix [rank, in_features]")
        rank = lora_a.shape[0]
        said = fields.get("rank_pattern", {}) or {}
        expected = said.get(_pattern_of(said, module), fields.get("r"))
        if rank != expected:
            raise file.error(f"lora_A of {module} must have the config's {expected} rows, got {rank}")
        alphas = fields.get("alpha_pattern", {}) or {}
        alpha = float(alphas.get(_pattern_of(alphas, module), fields["lora_alpha"]))
        if fields.get("use_rslora"):  # scaled by alpha / sqrt(rank)
            alpha *= math.sqrt(rank)
        layers.setdefault((rank, alpha), []).append(module)
    if not layers:
        raise file.error("holds no lora_A")
    return [LoraConfig(rank=rank, alpha=alpha, modules=modules) for (rank, alpha), modules in layers.items()]


def _pattern_of(patterns: Iterable[str], module: str) -> str | None:
    """The key of PEFT's rank_pattern or alpha_pattern that speaks of this layer: a regular expression of its end."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
