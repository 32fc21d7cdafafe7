"""Build a backbone for a task: timm's or the bundled one, with its weights, and say what input it takes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import InputError, require
from .loader import InputSpec

__all__ = ["BUNDLED", "build_backbone", "check_input", "input_spec", "load_weights"]

BUNDLED = "tiny_vit"


def build_backbone(
    name: str,
    num_classes: int,
    *,
    img_size: int | None = None,
    pretrained: bool = False,
    weights: str | None = None,
    keep_classifier: bool = False,
) -> nn.Module:
    """A backbone with a fresh classifier of ``num_classes``.

    Args:
        name: "tiny_vit" (bundled) or any timm model.
        img_size: side of the square input, where the architecture depends on it; None for its own.
        pretrained: timm's weights for the name (a download), or the bundled ones.
        weights: a ``.safetensors`` or ``.pth`` file instead, see `load_weights`.
        keep_classifier: take the classifier from ``weights`` too.

    Raises:
        InputError: unknown name, an input size it cannot take, or weights that do not fit.
    """
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"--weights: {weights} does not exist")
    build = _bundled if name == BUNDLED else partial(_timm_model, name)
    model = build(num_classes, img_size, pretrained and weights is None)
    if weights is not None:
        load_weights(model, weights, keep_classifier)
    if not keep_classifier:
        model.reset_classifier(num_classes)  # classes of the same number need not be the same classes
    return model


def _bundled(num_classes: int, img_size: int | None, pretrained: bool) -> nn.Module:
    require("timm")
    from alore_ext.models import tiny_vit

    if img_size not in (None, 32):
        raise InputError(f"--img-size: the bundled {BUNDLED} takes 32, got {img_size}")
    return tiny_vit(pretrained=pretrained, num_classes=num_classes)


def _timm_model(name: str, num_classes: int, img_size: int | None, pretrained: bool) -> nn.Module:
    timm = require("timm")
    if not timm.is_model(name):
        known = timm.list_models(f"*{name.partition('.')[0]}*")[:5]
        hint = f"; close names: {', '.join(known)}" if known else ""
        raise InputError(f"--model: timm {timm.__version__} has no model {name!r}{hint}")
    options: dict = {"pretrained": pretrained, "num_classes": num_classes}
    if img_size is not None:
        options["img_size"] = img_size
    try:
        try:
            return timm.create_model(name, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            options.pop("img_size")  # a convolutional model: any size will do
            return timm.create_model(name, **options)
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        what = "its pretrained weights" if pretrained else "it"
        raise InputError(f"--model: {name}: timm cannot build {what}: {_first_line(error)}") from error


def input_spec(model: nn.Module, img_size: int | None) -> InputSpec:
    """The size, mean and std that the model was trained with; ``img_size`` overrides the size."""
    config = require("timm.data").resolve_model_data_config(model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # it will take no other
    size = built_for[-1] if built_for else img_size or config["input_size"][-1]
    return InputSpec(size, tuple(config["mean"]), tuple(config["std"]))


@torch.no_grad()
def check_input(model: nn.Module, spec: InputSpec, num_classes: int) -> None:
    """Run one blank image through the model, on CPU in eval mode: better now than after the data are loaded.

    Raises:
        InputError: it takes no such image, or does not give ``num_classes`` logits.
    """
    was_training = model.training
    model.eval()
    try:
        logits = model(torch.zeros(1, len(spec.mean), spec.size, spec.size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"--img-size: {type(model).__name__} takes no {spec.size}x{spec.size} image: {_first_line(error)}"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise InputError(f"--model: {type(model).__name__} does not end in a classifier of {num_classes} classes")


def load_weights(model: nn.Module, file: str, with_classifier: bool = False) -> None:
    """Load a state dict into the backbone, with or without the classifier.

    Position embeddings and the like are adapted by the architecture's own ``checkpoint_filter_fn`` of timm.

    Raises:
        InputError: not a state dict, or one of another architecture: names the first keys that do not fit.
    """
    state = _read_state(file)
    if any(not torch.isfinite(value).all() for value in state.values() if value.is_floating_point()):
        raise InputError(f"--weights: {file} holds NaN or infinite values")
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        options = {"adapt_layer_scale": True} if any(key.endswith(".gamma_1") for key in state) else {}
        try:
            state = convert(state, model, **options)
        except (KeyError, RuntimeError, ValueError, AttributeError, AssertionError, TypeError) as error:
            raise InputError(
                f"--weights: {file} does not convert to {type(model).__name__}: {_first_line(error)}"
            ) from error
    own = model.state_dict()
    if not with_classifier:
        heads = _classifier_prefixes(model)
        own = {name: value for name, value in own.items() if not name.startswith(heads)}
        state = {name: value for name, value in state.items() if not name.startswith(heads)}
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    for problem, names in (("lacks", missing), ("has unknown", unexpected), ("", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            text = f"{problem} {', '.join(names[:3])}{more}".strip()
            raise InputError(f"--weights: {file} is not for this {type(model).__name__}: {text}")
    model.load_state_dict(state, strict=False)


def _read_state(file: str) -> dict[str, Tensor]:
    try:
        state = require("timm.models").load_state_dict(file, use_ema=True, device="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch, pickle, zipfile and safetensors each have their own
        raise InputError(f"--weights: cannot read {file}: {_first_line(error)}") from error
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"--weights: {file} holds no state dict")
    return state


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier (distilled DeiT has two), each with a dot at its end."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is head for head in heads))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
