"""docs/serving.md: its snippets print what it says, and its defaults are the server's."""

import re
from pathlib import Path

import pytest

pytest.importorskip("timm")

from alore_ext.serving.settings import Settings, option_of

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_the_snippets_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for code, printed in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, re.DOTALL):
        exec(code, names)
        assert capsys.readouterr().out == printed
    assert names["pool"].active is None


def test_the_defaults_are_those_of_the_server():
    table = dict(re.findall(r"`(--[a-z-]+) ([\d.]+)`", PAGE))
    defaults = {option_of(name): default for name, default in vars(Settings()).items()}
    assert len(table) == 8 and {option: float(value) for option, value in table.items()} == {
        option: defaults[option] for option in table
    }
