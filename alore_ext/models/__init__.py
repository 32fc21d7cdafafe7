"""Backbones that come with the package."""

from .as_mlp import AsMlp, as_mlp_base, as_mlp_small, as_mlp_tiny
from .as_mlp_checkpoint import load_as_mlp_checkpoint
from .tiny_vit import tiny_vit, tiny_vit_metadata

__all__ = [
    "AsMlp",
    "as_mlp_base",
    "as_mlp_small",
    "as_mlp_tiny",
    "load_as_mlp_checkpoint",
    "tiny_vit",
    "tiny_vit_metadata",
]
