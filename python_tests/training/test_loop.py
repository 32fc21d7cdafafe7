"""The loop: what it logs, that it learns, and that interrupting it anywhere changes nothing."""

import json
import math

import pytest
import torch
from torch import nn

from alore_ext.training.data import ArraySplit
from alore_ext.training.errors import InputError, Interrupted
from alore_ext.training.loader import InputSpec, make_loader
from alore_ext.training.loop import Precision, Trainer, evaluate
from alore_ext.training.recipe import Recipe
from alore_ext.training.state import seed_everything

CPU = torch.device("cpu")
SPEC = InputSpec(8, (0.5,) * 3, (0.25,) * 3)
RECIPE = Recipe(epochs=3, batch_size=8, lr=1e-2, weight_decay=0.05, warmup_epochs=1)
STEPS_PER_EPOCH = 5  # of 37 images: the last batch is short


def make_split(count):
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for index, label in enumerate(labels.tolist()):
        images[index, :, :, 2 * label : 2 * label + 3] += 120
    return ArraySplit(images, labels)


def make_model():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(216, 3)
    )


class Stop:
    """Asked once a training step, once before an evaluation, once an evaluation batch and once after."""

    def __init__(self, after=math.inf):
        self.asked, self.after = 0, after

    @property
    def requested(self):
        self.asked += 1
        return self.asked > self.after


def make_trainer(folder, resume=False, recipe=RECIPE, amp="off", **options):
    seed_everything(0)
    model = make_model()
    train = make_loader(make_split(37), SPEC, recipe.batch_size, CPU, train=True, augment="crop", seed=0)
    test = make_loader(make_split(20), SPEC, 8, CPU)
    options = {"eval_every": 2, "set_train_mode": nn.Module.train} | options
    return Trainer(model, train, test, recipe, Precision(amp, CPU), folder, resume=resume, **options)


def entries(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    return lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its final state, log, and how often it asked whether to stop."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, stop = make_trainer(folder), Stop()
    trainer.fit(stop)
    return trainer.model.state_dict(), entries(folder), stop.asked


def test_it_learns_and_logs(whole, tmp_path):
    _, log, _ = whole
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert [line["step"] for line in log] == [5, 10, 15]
    assert log[2]["train_loss"] < log[0]["train_loss"]
    assert ["eval_accuracy" in line for line in log] == [False, True, True]  # every second epoch and the last
    assert log[2]["eval_accuracy"] > 0.8
    assert log[-1]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("first_part", range(27))
def test_stopping_anywhere_and_resuming_gives_the_same_bits(whole, tmp_path, first_part):
    state, log, asked = whole
    assert asked == 27  # every place at which a run can stop is in the range above
    stopped = make_trainer(tmp_path)
    with pytest.raises(Interrupted, match="stopped in epoch"):
        stopped.fit(Stop(first_part))
    torch.rand(7)  # a new process has other random streams
    resumed = make_trainer(tmp_path, resume=True)
    resumed.fit(Stop())
    for name, expected in state.items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name
    assert entries(tmp_path) == log


def test_being_killed_between_checkpoints_gives_the_same_bits(whole, tmp_path):
    state, log, _ = whole
    killed = make_trainer(tmp_path, checkpoint_every=2)

    class Kill(Stop):
        @property
        def requested(self):
            if super().requested:
                raise MemoryError  # no clean-up runs
            return False

    with pytest.raises(MemoryError):
        killed.fit(Kill(26))  # in epoch 3: steps of it are lost, and so is nothing else
    resumed = make_trainer(tmp_path, resume=True, checkpoint_every=2)
    assert (resumed.progress.epoch, resumed.progress.step) == (2, 0)
    resumed.fit(Stop())
    assert all(torch.equal(resumed.model.state_dict()[name], expected) for name, expected in state.items())
    assert entries(tmp_path) == log


def test_resuming_a_finished_run_does_nothing(whole, tmp_path):
    make_trainer(tmp_path).fit(Stop())
    before = (tmp_path / "log.jsonl").read_bytes()
    finished = make_trainer(tmp_path, resume=True)
    finished.fit(Stop())
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert all(torch.equal(finished.model.state_dict()[name], value) for name, value in whole[0].items())


def test_non_finite_loss_stops_with_advice(tmp_path):
    with pytest.raises(InputError, match="not finite in epoch 1.*lower --lr"):
        make_trainer(tmp_path, recipe=RECIPE.override(lr=1e30, warmup_epochs=0)).fit(Stop())


def test_evaluate_leaves_every_mode_as_it_was():
    model = make_model().train()
    model[3].eval()
    loader = make_loader(make_split(20), SPEC, 8, CPU)
    result = evaluate(model, loader, Precision("off", CPU))
    assert [module.training for module in model] == [True, True, True, False, True, True]
    assert result.logits.shape == (20, 3) and 0 <= result.accuracy <= 1
    model.eval()
    images, labels = next(make_loader(make_split(20), SPEC, 20, CPU).batches())
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(result.logits, logits)
    assert result.accuracy == (logits.argmax(1) == labels).sum().item() / 20
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


def test_bf16_autocast_trains_fp32_weights(tmp_path):
    trainer = make_trainer(tmp_path, amp="bf16")
    seen = []
    trainer.model[5].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    trainer.fit(Stop())
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert entries(tmp_path)[-1]["eval_accuracy"] > 0.8


def test_precision_errors():
    with pytest.raises(InputError, match="--amp fp16 needs a CUDA device"):
        Precision("fp16", CPU)
    with pytest.raises(InputError, match="--amp must be one of off, bf16, fp16"):
        Precision("int8", CPU)
