"""Backbones that come with the package."""

from .tiny_vit import tiny_vit, tiny_vit_metadata

__all__ = ["tiny_vit", "tiny_vit_metadata"]
