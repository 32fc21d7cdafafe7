"""Rebuild a model from what a run left: its folder, its adapter file, or a plain state dict."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import alore_ext
from alore_ext.training.backbone import BUNDLED, build_backbone, check_input, input_spec
from alore_ext.training.data import Data, load_data
from alore_ext.training.errors import InputError
from alore_ext.training.files import ADAPTER_FILE, CONFIG_FILE, MODEL_FILE
from alore_ext.training.loader import InputSpec
from alore_ext.training.session import ADAPTER_METHODS, usage_errors
from alore_ext.training.state import seed_everything

from .options import read_config

__all__ = ["Source", "load_model", "load_test_data", "resolve"]


@dataclass(frozen=True)
class Source:
    """Where a model comes from, after the run's config.json has filled in what the command line left out."""

    model: str
    pretrained: bool
    weights: str | None  # of the base, or, without an adapter, of the whole trained model
    img_size: int | None
    adapter: Path | None
    data: str | None
    augment: str
    seed: int
    class_names: tuple[str, ...] | None


def resolve(arguments: argparse.Namespace) -> Source:
    """Combine options with the config.json of ``--out`` or of the folder that holds ``--adapter``.

    Raises:
        InputError: no finished run there, several runs there, or no model, weights or adapter given.
    """
    adapter, trained, config = _run_files(arguments)
    model = arguments.model or config.get("model")
    if model is None:
        raise InputError("--model NAME is needed: there is no config.json of a run to take it from")
    base = config if model == config.get("model") else {}
    if arguments.weights or arguments.pretrained:
        base = {"weights": arguments.weights, "pretrained": arguments.pretrained}
    elif not base and model == BUNDLED:
        base = {"pretrained": True}
    elif not base:
        raise InputError(f"--model {model}: give --pretrained or --weights FILE")
    class_names = config.get("class_names")
    return Source(
        model=model,
        pretrained=trained is None and bool(base.get("pretrained")),
        weights=base.get("weights") if trained is None else str(trained),
        img_size=arguments.img_size or config.get("img_size"),
        adapter=adapter,
        data=getattr(arguments, "data", None) or config.get("data"),
        augment=getattr(arguments, "augment", None) or config.get("augment", "none"),
        seed=config.get("seed", 0),
        class_names=None if class_names is None else tuple(class_names),
    )


def _run_files(arguments: argparse.Namespace) -> tuple[Path | None, Path | None, dict]:
    """The adapter, or the trained whole model, and the run's config ({} if there is none)."""
    out = getattr(arguments, "out", None)
    if out is not None:
        folder = Path(out)
        config = read_config(folder)
        if "runs" in config:
            names = ", ".join(str(folder / method) for method in config["runs"])
            raise InputError(f"{folder} holds several runs; name one: {names}")
        is_adapter = config["method"] in ADAPTER_METHODS
        file = folder / (ADAPTER_FILE if is_adapter else MODEL_FILE)
        if not file.exists():
            raise InputError(f"the run in {folder} has not finished: alore-ext finetune --resume --out {folder}")
        return (file, None, config) if is_adapter else (None, file, config)
    if arguments.adapter is None:
        return None, None, {}
    adapter = Path(arguments.adapter)
    if not adapter.is_file():
        raise InputError(f"--adapter: {adapter} does not exist")
    beside = adapter.name == ADAPTER_FILE and (adapter.parent / CONFIG_FILE).exists()
    return adapter, None, read_config(adapter.parent) if beside else {}


def load_model(source: Source, num_classes: int) -> tuple[nn.Module, InputSpec]:
    """The model on CPU in eval mode: patched and unmerged if the source has an adapter, else plain.

    Raises:
        InputError: the base or the adapter cannot be loaded, or do not belong together.
    """
    seed_everything(source.seed)  # a run with --random-init drew its base from its seed
    model = build_backbone(
        source.model,
        num_classes,
        img_size=source.img_size,
        pretrained=source.pretrained,
        weights=source.weights,
        keep_classifier=source.adapter is None,
    )
    spec = input_spec(model, source.img_size)
    check_input(model, spec, num_classes)
    if source.adapter:
        with usage_errors():
            alore_ext.load_adapter(model, source.adapter)
    return model.eval(), spec


def load_test_data(source: Source) -> Data:
    """The data to test on, its classes checked against those that the run was trained on."""
    if source.data is None:
        raise InputError("--data PATH is needed: there is no config.json of a run to take it from")
    data = load_data(source.data, source.seed)
    if source.class_names is not None and data.class_names != source.class_names:
        here, there = (", ".join(names[:3]) for names in (data.class_names, source.class_names))
        raise InputError(
            f"--data: {source.data} has {data.num_classes} classes ({here}, ...), "
            f"the model was trained on {len(source.class_names)} ({there}, ...)"
        )
    return data
