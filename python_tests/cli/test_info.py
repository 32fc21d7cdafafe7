"""alore-ext info: the build and adapter files."""

import re

import pytest
from tiny_runs import result_of

import alore_ext
from alore_ext.cli import main


def test_info_of_the_build(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name, value in alore_ext.build_info().items():
        assert name in out and (isinstance(value, list) or str(value) in out)


@pytest.mark.parametrize("option", [(), ("--adapter",)])
def test_info_of_an_adapter(finished, capsys, option):
    assert main(["info", *option, str(finished / "mlae" / "adapter.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "mlae: num_experts=8, expert_rank=1, dropout=0.5" in out
    summary = result_of(finished / "mlae")
    assert f"{summary['trainable'] - summary['trainable_head']:,} parameters" in out
    assert re.search(r"base +\d+ tensors, [\d,]+ numbers, fingerprint [0-9a-f]{16}", out)


def test_info_errors(fails, tmp_path, finished):
    assert "no file at" in fails("info", tmp_path / "none.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    assert "not a safetensors file, or is truncated" in fails("info", tmp_path / "a.safetensors")
    assert "not an adapter file" in fails("info", finished / "full" / "model.safetensors")
