"""The table, the merge line and the plot."""

import json

import pytest
from matplotlib.figure import Figure

from alore_ext.training.files import LOG_FILE
from alore_ext.training.report import describe_merge, human_bytes, plot, table
from alore_ext.training.session import MergeCheck, Result

CHECK = MergeCheck(2.4e-6, 12.5, 0.9573, 0.9573, 0)


def result(method, trainable, accuracy):
    return Result(method, trainable, 650, 1_000_000, accuracy, "test", 12.34, "adapter.safetensors", 99_000)


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (88_240, "88.2 kB"),
        (344_000_000, "344.0 MB"),
        (1_234_567_890, "1.23 GB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_table_has_a_row_a_method():
    lines = table([result("linear", 650, 0.911), result("alore", 12_986, 0.9674)]).splitlines()
    assert lines[0].split() == [
        "method",
        "trainable",
        "parameters",
        "of",
        "the",
        "model",
        "test",
        "accuracy",
        "time",
    ]
    assert lines[2].split() == ["linear", "probe", "650", "0.07", "%", "91.10", "%", "12.3", "s"]
    assert lines[3].split() == ["ALoRE", "12,986", "1.30", "%", "96.74", "%", "12.3", "s"]
    assert len({len(line) for line in lines}) == 1


def test_merge_line_says_whether_accuracy_is_equal():
    assert describe_merge(CHECK) == (
        "largest logit difference 2.4e-06 (largest logit 12.5), accuracy equal (95.73 %), 0 predictions changed"
    )
    unequal = MergeCheck(0.1, 12.5, 0.9573, 0.95, 3)
    assert "accuracy 95.00 % against 95.73 %, 3 predictions changed" in describe_merge(unequal)


@pytest.mark.parametrize("methods, panels", [(("alore",), 2), (("linear", "alore", "mlae", "full"), 3)])
def test_plot_draws_what_the_logs_hold(tmp_path, methods, panels, monkeypatch):
    folders = {}
    for method in methods:
        folders[method] = tmp_path / method
        folders[method].mkdir()
        lines = [{"event": "epoch", "epoch": e, "train_loss": 2 / e} for e in (1, 2, 3)]
        lines[1]["eval_accuracy"], lines[2]["eval_accuracy"] = 0.5, 0.75
        lines.append({"event": "end", "test_accuracy": 0.75})
        (folders[method] / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    plot(folders, [result(method, 1000, 0.75) for method in methods], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes
    assert len(axes) == panels
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[2.0, 1.0, 2 / 3]] * len(methods)
    assert [list(line.get_xdata()) for line in axes[1].lines] == [[2, 3]] * len(methods)
    assert [list(line.get_ydata()) for line in axes[1].lines] == [[50.0, 75.0]] * len(methods)
