"""Python processes beside the tests'."""

import os
from pathlib import Path

import alore_ext


def environment(**more: str) -> dict[str, str]:
    """This process's, with the package under test before all else, whatever copies lie elsewhere on the path."""
    paths = [str(Path(alore_ext.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
