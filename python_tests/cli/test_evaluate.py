"""alore-ext evaluate: the accuracy of what a run left."""

import json

import pytest
from tiny_runs import accuracy_printed, result_of

from alore_ext.cli import main


@pytest.mark.parametrize("method", ["linear", "alore", "mlae", "full"])
def test_evaluate_repeats_the_runs_accuracy(finished, method, capsys):
    assert main(["evaluate", "--out", str(finished / method)]) == 0
    assert accuracy_printed(capsys) == round(100 * result_of(finished / method)["accuracy"], 2)


def test_evaluate_another_split(finished, capsys):
    assert main(["evaluate", "--out", str(finished / "full"), "--split", "val", "--batch-size", "5"]) == 0
    log = [json.loads(line) for line in (finished / "full" / "log.jsonl").read_text().splitlines()]
    assert accuracy_printed(capsys) == round(100 * log[-2]["eval_accuracy"], 2)


def test_evaluate_an_adapter_by_itself(moved, finished, task, capsys):
    adapter, base = moved
    options = ["--model", "test_vit", "--weights", str(base), "--img-size", "32", "--data", task]
    assert main(["evaluate", "--adapter", str(adapter), *options]) == 0
    assert accuracy_printed(capsys) == round(100 * result_of(finished / "alore")["accuracy"], 2)


def test_evaluate_errors(moved, finished, task, tmp_path, fails, finetune):
    adapter, base = moved
    known = ("--model", "test_vit", "--weights", base, "--img-size", "32")
    assert f"name one: {finished / 'linear'}" in fails("evaluate", "--out", finished)
    assert "holds no run" in fails("evaluate", "--out", tmp_path)
    assert "--model NAME is needed" in fails("evaluate", "--data", task)
    assert "--data PATH is needed" in fails("evaluate", "--adapter", adapter, *known)
    assert "has 10 classes" in fails("evaluate", "--out", finished / "alore", "--data", "digits")
    assert "--batch-size must be at least 1" in fails("evaluate", "--out", finished, "--batch-size", "0")
    (tmp_path / "unfinished").mkdir()
    config = (finished / "alore" / "config.json").read_text()
    (tmp_path / "unfinished" / "config.json").write_text(config)
    assert "has not finished: alore-ext finetune --resume" in fails("evaluate", "--out", tmp_path / "unfinished")
    line = fails("evaluate", *known, "--data", "digits")
    assert "head.weight is [3, 64], expected [10, 64]" in line


def test_evaluate_split_that_is_not_there(tmp_path, task, finetune, fails):
    assert finetune("linear", tmp_path / "a", "--epochs", "1", "--data", "digits") == 0
    assert fails("evaluate", "--out", tmp_path / "a", "--split", "val") == "--split: digits has train, test, not val"
