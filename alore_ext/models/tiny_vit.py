"""The small pretrained VisionTransformer that ships with the package.

It gives the demo and the tests a backbone with learned features and nothing to download: timm's
VisionTransformer for 32x32 images, pretrained on CIFAR-10 by ``benchmarks/pretrain_tiny_vit.py``, stored in
bf16. Architecture, input normalisation and provenance are in the file's own metadata, and only there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["tiny_vit", "tiny_vit_metadata"]

WEIGHTS = Path(__file__).parent / "weights" / "tiny_vit_cifar10.safetensors"

_JSON_FIELDS = ("architecture", "classes", "input", "recipe")  # safetensors metadata holds strings only


def tiny_vit(pretrained: bool = True, num_classes: int = 10, **kwargs: Any) -> VisionTransformer:
    """The bundled VisionTransformer, taking images [batch, 3, 32, 32].

    The input's mean and standard deviation are in ``model.pretrained_cfg``, where
    ``timm.data.resolve_model_data_config`` finds them.

    Args:
        pretrained: load the bundled weights; False gives the same architecture, freshly initialised.
        num_classes: 10 keeps the pretrained CIFAR-10 classifier, 0 has none, any other number a fresh one.
        **kwargs: further arguments of timm's VisionTransformer (``drop_path_rate``, ...). With ``pretrained``
            they must leave the weights' names and shapes as they are.

    Returns:
        The model in training mode, as timm's constructors return it, with fp32 parameters (the bf16 weights
        widened, so ``.to(torch.bfloat16)`` gives the stored bits back) unless ``kwargs`` has a ``dtype``.

    Raises:
        ModuleNotFoundError: timm is not installed.
        FileNotFoundError: the package lies here without its weights.
        ValueError: ``kwargs`` ask for another architecture than the bundled weights have.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "timm":
            raise  # timm is there but broken: its own message is the useful one
        raise ModuleNotFoundError("tiny_vit needs timm: pip install 'alore_ext[timm]'", name="timm") from error

    metadata = tiny_vit_metadata()
    model = VisionTransformer(**{**metadata["architecture"], **kwargs, "num_classes": num_classes})
    if pretrained:
        _load(model, keep_classifier=num_classes == len(metadata["classes"]))
    model.pretrained_cfg = model.default_cfg = _timm_config(metadata, num_classes)
    return model


def tiny_vit_metadata() -> dict[str, Any]:
    """Where the bundled weights come from and what they are for, as their file says.

    Returns:
        ``architecture`` (arguments of timm's VisionTransformer), ``input`` (``input_size``, ``mean``,
        ``std``), ``classes`` (names), ``recipe`` (arguments of the pretraining script), ``test_accuracy``
        (of the bf16 weights on CIFAR-10's test set, 0 to 1) and, as strings, the dataset, script, commit,
        versions, device and licence.

    Raises:
        FileNotFoundError: the package lies here without its weights.
    """
    with _open() as file:
        metadata: dict[str, Any] = dict(file.metadata())
    for field in _JSON_FIELDS:
        metadata[field] = json.loads(metadata[field])
    metadata["test_accuracy"] = float(metadata["test_accuracy"])
    return metadata


def _open() -> safe_open:
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is missing: install alore_ext from a complete checkout or wheel")
    return safe_open(WEIGHTS, framework="pt")


def _load(model: VisionTransformer, keep_classifier: bool) -> None:
    """Copy the bundled weights into the model, widened to its dtype, with or without the classifier."""
    with _open() as file:
        stored: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
    own = model.state_dict()
    if not keep_classifier:
        stored = {name: value for name, value in stored.items() if not name.startswith("head.")}
        own = {name: value for name, value in own.items() if not name.startswith("head.")}
    differing = sorted(
        name
        for name in own.keys() | stored.keys()
        if name not in own or name not in stored or own[name].shape != stored[name].shape
    )
    if differing:
        raise ValueError(
            f"tiny_vit: the bundled weights do not fit the architecture asked for, first at {differing[0]}: "
            f"expected {_shape(stored, differing[0])}, got {_shape(own, differing[0])}; pass pretrained=False"
        )
    with torch.no_grad():
        for name, value in stored.items():
            own[name].copy_(value)


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "none"


def _timm_config(metadata: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """What timm's data and fine-tuning helpers read off a model."""
    return {
        "architecture": "tiny_vit_cifar10",
        "num_classes": num_classes,
        "input_size": tuple(metadata["input"]["input_size"]),
        "mean": tuple(metadata["input"]["mean"]),
        "std": tuple(metadata["input"]["std"]),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": metadata["licence"],
    }
