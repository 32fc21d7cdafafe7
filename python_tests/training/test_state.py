"""Atomic files, the log, checkpoints and signals."""

import json
import os
import random
import signal
import stat

import numpy
import pytest
import torch
from torch import nn

from alore_ext._files import write_atomic
from alore_ext.training.errors import InputError
from alore_ext.training.state import (
    Log,
    Progress,
    StopSignals,
    load_checkpoint,
    save_checkpoint,
    seed_everything,
    write_json,
)

IDENTITY = {"training images": 10}


def make_model(seed=0, width=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def make_parts(model):
    return {"optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])}


def train(model, parts):
    model.zero_grad()
    model(torch.randn(5, 3)).sum().backward()
    parts["optimizer"].step()


def draws():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "a.bin"
    write_atomic(file, lambda temporary: open(temporary, "w").write("old"))

    def fail(temporary):
        with open(temporary, "w") as out:
            out.write("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomic(file, fail)
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.bin"]


def test_written_files_have_the_usual_permissions(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(os.stat(tmp_path / "a.json").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_log_is_cut_back(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write("epoch", epoch=1)
    offset = log.offset
    log.write("epoch", epoch=2)
    resumed = Log(tmp_path / "log.jsonl", offset)
    resumed.write("epoch", epoch=3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 3]


def test_checkpoint_brings_everything_back(tmp_path):
    seed_everything(1)
    model = make_model()
    parts = make_parts(model)
    train(model, parts)
    log = Log(tmp_path / "log.jsonl")
    log.write("epoch")
    progress = Progress(epoch=2, step=5, seconds=1.5, loss_sum=0.1, correct=3, seen=20)
    save_checkpoint(tmp_path / "c.pt", model, parts, progress, log, IDENTITY)
    expected_draws = draws()
    train(model, parts)

    seed_everything(2)
    other = make_model()
    other_parts = make_parts(other)
    got_progress, offset = load_checkpoint(tmp_path / "c.pt", other, other_parts, IDENTITY)
    assert got_progress == progress and offset == log.offset
    assert draws() == expected_draws
    train(other, other_parts)
    for (name, expected), (_, got) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(expected, got), name


def saved(tmp_path):
    model = make_model()
    file = tmp_path / "c.pt"
    save_checkpoint(file, model, make_parts(model), Progress(), Log(tmp_path / "log.jsonl"), IDENTITY)
    return file


@pytest.mark.parametrize(
    "model, identity, message",
    [
        (make_model(width=5), IDENTITY, "frozen weights are not those"),
        (make_model(seed=1), IDENTITY, "frozen weights are not those"),
        (nn.Linear(2, 2), IDENTITY, "another model or method"),
        (make_model(), {"training images": 11}, "training images was 10 before, is 11 now"),
    ],
)
def test_checkpoint_of_something_else_is_refused(tmp_path, model, identity, message):
    file = saved(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_checkpoint(file, model, make_parts(model), identity)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_damaged_checkpoint_is_refused(tmp_path):
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="not a readable checkpoint") as raised:
        load_checkpoint(file, make_model(), make_parts(make_model()), IDENTITY)
    assert "\n" not in str(raised.value)
    torch.save({"format": 1}, file)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(file, make_model(), make_parts(make_model()), IDENTITY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_second_interrupts(number, capsys):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert number.name in capsys.readouterr().out
