"""Options of runs that take a second, and how to read what they leave and print."""

import json
import re

from processes import environment

VIT = ("--model", "test_vit", "--random-init", "--img-size", "32")
QUICK = ("--epochs", "3", "--warmup-epochs", "1", "--batch-size", "16")
COMMAND = "import sys; from alore_ext.cli import main; sys.exit(main())"


def outside(folder):
    """For subprocess: run in ``folder`` with the package under test, one thread, so that no other copy is found."""
    return {"cwd": folder, "env": environment(OMP_NUM_THREADS="1")}


def accuracy_printed(capsys):
    return float(re.search(r"accuracy ([\d.]+) %", capsys.readouterr().out)[1])


def result_of(folder):
    return json.loads((folder / "result.json").read_text())
