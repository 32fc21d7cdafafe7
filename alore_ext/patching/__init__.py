"""Patching: from a config and a backbone to a backbone with adapters, and back."""

from . import vit  # noqa: F401  (registers the family)
from .apply import patch, patch_vit, unpatch

__all__ = ["patch", "patch_vit", "unpatch"]
