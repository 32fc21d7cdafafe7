"""The command itself: help, usage errors, and packages that are not installed."""

import subprocess
import sys

import pytest
from tiny_runs import COMMAND, VIT, outside

from alore_ext.cli import main

_COMMANDS = ("finetune", "evaluate", "merge", "export", "info", "serve")


@pytest.mark.parametrize("command", [(), *((name,) for name in _COMMANDS)])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0 and "usage: alore-ext" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("train",), ("finetune", "--epochs", "many"), ("merge",)])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    "missing, pip_name",
    [("timm", "timm"), ("tqdm", "tqdm"), ("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")],
)
def test_a_missing_package_is_one_line(missing, pip_name, task, tmp_path):
    data = "digits" if missing == "sklearn" else task
    code = f"import sys; sys.modules[{missing!r}] = None; {COMMAND}"
    options = (*VIT, "--data", data, "--method", "linear", "--epochs", "1", "--out", str(tmp_path / "a"))
    done = subprocess.run(
        [sys.executable, "-c", code, "finetune", *options], capture_output=True, text=True, **outside(tmp_path)
    )
    assert done.returncode == 2, done.stderr
    expected = f"alore-ext finetune: error: this command needs {pip_name}: pip install 'alore_ext[demo]'"
    assert done.stderr.strip().splitlines()[-1] == expected
    assert "Traceback" not in done.stderr
