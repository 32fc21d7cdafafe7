"""Loads the compiled library, and turns the ways that fails into one readable line."""

import json
from pathlib import Path

import torch

_RECORD = Path(__file__).with_name("_build_record.json")


def _built_for() -> str | None:
    """The torch that this copy was compiled against, "2.14.1+cu130"; None where no library was ever built here."""
    try:
        return json.loads(_RECORD.read_text())["torch"]
    except (OSError, ValueError, KeyError):
        return None


def _explain(error: ImportError) -> ImportError:
    built_for = _built_for()
    if built_for is None:
        return ImportError(
            "alore_ext: its compiled library is missing. Install the package with `pip install --no-build-isolation .` "
            "from its source folder (importing the source tree itself is not enough)."
        )
    if built_for != torch.__version__:
        return ImportError(
            f"alore_ext was built for torch {built_for}, but torch {torch.__version__} is installed: reinstall it with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .`"
        )
    return ImportError(f"alore_ext: its compiled library does not load: {error}")


def load():
    """Imports `alore_ext._C`, which registers the operators. Raises ImportError, one line."""
    try:
        from alore_ext import _C
    except ImportError as error:
        raise _explain(error) from None
    return _C


_C = load()


def build_info() -> dict:
    """What this copy is: version, torch and CUDA it was built for, architectures, whether CUDA kernels are in.

    Returns:
        ``{"version": "0.1.0", "torch": "2.14.1+cu130", "cuda": "13.0" or None, "cuda_kernels": bool,
        "archs": ["9.0a", ...], "compiler": "12.2.0"}``
    """
    return _C.build_info()
