"""Patching: from a config and a backbone to a backbone with adapters, and back."""

# Each import registers a family. ViT comes last: it takes any list of blocks that looks like a transformer's.
from . import swin, convnext, as_mlp, vit  # noqa: F401, I001
from .apply import patch, patch_as_mlp, patch_convnext, patch_swin, patch_vit, unpatch

__all__ = ["patch", "patch_as_mlp", "patch_convnext", "patch_swin", "patch_vit", "unpatch"]
