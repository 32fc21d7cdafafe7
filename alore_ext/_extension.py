"""Loads the compiled library, and turns the ways that fails into one readable line."""

import json
import platform
import re
from pathlib import Path

import torch

_RECORD = Path(__file__).with_name("_build_record.json")
_REINSTALL = "reinstall it with `pip install --no-build-isolation --force-reinstall --no-deps .`"


def _abi(version: str) -> tuple[str, ...]:
    """What two torches must agree in to share an extension: "2.14.1+cu130" -> 2, 14, cu130."""
    match = re.match(r"(\d+)\.(\d+)[^+]*(?:\+(.*))?$", version)
    return match.groups(default="") if match else (version,)


def _check_record() -> None:
    """Compares what the library was built for with what runs, before it is loaded: some mismatches crash instead of
    failing to load."""
    try:
        record = json.loads(_RECORD.read_text())
        torch_then, python_then = record["torch"], record["python"]
    except (OSError, ValueError, KeyError):
        raise ImportError(
            "alore_ext: its compiled library is missing. Install the package with `pip install --no-build-isolation .` "
            "from its source folder (importing the source tree itself is not enough)."
        ) from None
    if _abi(torch_then) != _abi(torch.__version__):
        raise ImportError(
            f"alore_ext was built for torch {torch_then}, but torch {torch.__version__} is installed: {_REINSTALL}"
        )
    if python_then.split(".")[:2] != platform.python_version().split(".")[:2]:
        raise ImportError(
            f"alore_ext was built for Python {python_then}, but Python {platform.python_version()} runs: {_REINSTALL}"
        )


def load():
    """Imports `alore_ext._C`, which registers the operators. Raises ImportError, one line."""
    _check_record()
    try:
        from alore_ext import _C
    except ImportError as error:
        raise ImportError(f"alore_ext: its compiled library does not load ({error}): {_REINSTALL}") from None
    return _C


_C = load()


def build_info() -> dict:
    """What this copy is: version, torch and CUDA it was built for, architectures, whether CUDA kernels are in.

    Returns:
        ``{"version": "0.1.0", "torch": "2.14.1+cu130", "cuda": "13.0" or None, "cuda_kernels": bool,
        "archs": ["9.0a", ...], "compiler": "12.2.0"}``
    """
    return _C.build_info()
