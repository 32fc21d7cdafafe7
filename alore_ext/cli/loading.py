"""Rebuild a model from what a run left: its folder, its adapter file, or a plain state dict."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import alore_ext
from alore_ext.training.backbone import BUNDLED, build_backbone, input_spec, load_weights
from alore_ext.training.data import Data, load_data
from alore_ext.training.errors import InputError
from alore_ext.training.loader import InputSpec
from alore_ext.training.session import ADAPTER_FILE, CONFIG_FILE, MODEL_FILE, usage_errors

from .options import read_config

__all__ = ["Source", "load_model", "load_test_data", "resolve"]


@dataclass(frozen=True)
class Source:
    """Where a model comes from, after the run's config.json has filled in what the command line left out."""

    model: str
    pretrained: bool
    weights: str | None
    img_size: int | None
    adapter: Path | None  # else the model is plain
    trained: Path | None  # a whole trained model's state dict
    data: str | None
    augment: str
    train_split: str
    seed: int
    class_names: tuple[str, ...] | None


def resolve(arguments: argparse.Namespace) -> Source:
    """Combine options with the config.json of ``--out`` or of the folder that holds ``--adapter``.

    Raises:
        InputError: no run there, several runs there, or a missing --model.
    """
    config: dict = {}
    adapter = Path(arguments.adapter) if arguments.adapter else None
    trained = None
    out = getattr(arguments, "out", None)
    if out is not None:
        folder = Path(out)
        config = read_config(folder)
        if "runs" in config:
            raise InputError(
                f"{folder} holds several runs; name one: {', '.join(str(folder / r) for r in config['runs'])}"
            )
        file = folder / (ADAPTER_FILE if config["method"] in ("alore", "mlae") else MODEL_FILE)
        if not file.exists():
            raise InputError(
                f"the run in {folder} has not finished: alore-ext finetune --resume --out {folder}"
            )
        adapter, trained = (file, None) if file.name == ADAPTER_FILE else (None, file)
    elif adapter is not None:
        if not adapter.is_file():
            raise InputError(f"--adapter: {adapter} does not exist")
        if (adapter.parent / CONFIG_FILE).exists():
            config = read_config(adapter.parent)
            if "runs" in config or adapter.name != ADAPTER_FILE:
                config = {}
    model = arguments.model or config.get("model")
    if model is None:
        raise InputError("--model NAME is needed: there is no config.json beside the adapter to take it from")
    same = model == config.get("model")
    chosen = arguments.weights is not None or arguments.pretrained
    weights = arguments.weights if chosen or not same else config.get("weights")
    pretrained = bool(arguments.pretrained) if chosen or not same else bool(config.get("pretrained"))
    if model == BUNDLED and weights is None:
        pretrained = True
    class_names = config.get("class_names")
    return Source(
        model=model,
        pretrained=pretrained,
        weights=weights,
        img_size=arguments.img_size or config.get("img_size"),
        adapter=adapter,
        trained=trained,
        data=getattr(arguments, "data", None) or config.get("data"),
        augment=getattr(arguments, "augment", None) or config.get("augment", "none"),
        train_split=config.get("train_split", "train"),
        seed=config.get("seed", 0),
        class_names=None if class_names is None else tuple(class_names),
    )


def load_model(source: Source, num_classes: int) -> tuple[nn.Module, InputSpec]:
    """The model on CPU in eval mode: patched and unmerged if the source has an adapter, else plain.

    Raises:
        InputError: the base or the adapter cannot be loaded, or do not belong together.
    """
    if source.adapter and not (source.pretrained or source.weights):
        raise InputError("an adapter needs its base: --pretrained or --weights FILE")
    model = build_backbone(
        source.model,
        num_classes,
        img_size=source.img_size,
        pretrained=source.pretrained,
        weights=source.weights,
    )
    spec = input_spec(model, source.img_size)
    if source.trained:
        load_weights(model, str(source.trained))
    if source.adapter:
        with usage_errors():
            alore_ext.load_adapter(model, str(source.adapter))
    return model.eval(), spec


def load_test_data(source: Source) -> Data:
    """The data to test on, its classes checked against those the run was trained on."""
    if source.data is None:
        raise InputError("--data PATH is needed: there is no config.json to take it from")
    data = load_data(source.data, source.seed)
    if source.class_names is not None and data.class_names != source.class_names:
        here, there = (", ".join(names[:3]) for names in (data.class_names, source.class_names))
        raise InputError(
            f"--data: {source.data} has {data.num_classes} classes ({here}, ...), "
            f"the model was trained on {len(source.class_names)} ({there}, ...)"
        )
    return data
