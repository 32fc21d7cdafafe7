"""Serving many adapters over one frozen backbone: a pool in your own process, and a server.

Imports neither fastapi nor ray: `app` and `ray` do, where they are used.
"""

from .pool import AdapterPool
from .report import LayerError, MergeError, MergeReport

__all__ = ["AdapterPool", "LayerError", "MergeError", "MergeReport"]
