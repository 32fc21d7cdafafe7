"""Images to run a model on where the user gave none: of the size that the model itself names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def example_images(model: nn.Module, given: Tensor | None, caller: str, argument: str = "example_input") -> Tensor:
    """Images [batch, channels, height, width] on the model's device and in its dtype.

    Args:
        given: the user's; None for two random images, the same each time, of the size that the model names.
        caller, argument: who is named in the errors, and what the user gives to it.

    Raises:
        TypeError: what was given is no tensor.
        ValueError: it is no batch of images; none was given, and the model names no size.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if given is None:
        images = torch.randn(2, *_image_shape(model, caller, argument), generator=torch.Generator().manual_seed(0))
    elif not isinstance(given, Tensor):
        raise TypeError(f"{caller}: {argument} must be a tensor of images, got {type(given).__name__}")
    elif given.dim() != 4 or given.numel() == 0:
        raise ValueError(
            f"{caller}: {argument} must be images [batch, channels, height, width], got {list(given.shape)}"
        )
    else:
        images = given.detach().clone()  # a tensor made in inference mode becomes a normal one
    return images.to(like.device, like.dtype)


def image_channels(model: nn.Module) -> int:
    """How many channels the model's images have: those of its first convolution."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


def _image_shape(model: nn.Module, caller: str, argument: str) -> tuple[int, int, int]:
    """Channels, height and width.

    timm's patch embedding knows what it was built for, which goes before what its weights were trained at.
    """
    timm = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = getattr(model, "config", None)  # of transformers
    for size in (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        timm.get("input_size"),
        getattr(config, "image_size", None),
        getattr(model, "image_size", None),  # of torchvision's ViT
    ):
        if size is not None:
            return (image_channels(model), *_height_and_width(size))
    raise ValueError(
        f"{caller}: {type(model).__name__} does not say what size of image it takes; give "
        f"{argument}=torch.randn(2, channels, height, width)"
    )


def _height_and_width(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]
