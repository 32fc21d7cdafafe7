"""Errors of the command line, and imports of optional dependencies."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["InputError", "Interrupted", "require"]


class InputError(ValueError):
    """What the user gave cannot be used. The command line prints it as one line and exits with 2."""


class Interrupted(Exception):
    """A run stopped at the user's wish after writing its checkpoint. The message says how to go on."""


_PIP_NAMES = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}


def require(module: str, extra: str = "demo") -> ModuleType:
    """Import an optional dependency, which ``extra`` of this package installs.

    Raises:
        InputError: it is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the package is there but broken: its own message is the useful one
        name = _PIP_NAMES.get(top, top)
        raise InputError(f"this command needs {name}: pip install 'alore_ext[{extra}]'") from error
