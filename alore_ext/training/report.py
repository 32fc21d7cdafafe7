"""What a person sees at the end: the table, the plot, the merge check."""

from __future__ import annotations

import json
from pathlib import Path

from alore_ext._files import write_atomic

from .errors import require
from .files import LOG_FILE
from .session import MergeCheck, Result

__all__ = ["describe_merge", "human_bytes", "plot", "table"]

TITLES = {"linear": "linear probe", "alore": "ALoRE", "mlae": "MLAE", "full": "full fine-tuning"}
# Categorical colours in fixed order; a method keeps its colour whichever methods are drawn.
_COLOURS = {"linear": "#767676", "alore": "#2a78d6", "mlae": "#eb6834", "full": "#1baf7a"}


def human_bytes(count: int) -> str:
    """12345 -> "12.3 kB"."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def table(results: list[Result]) -> str:
    """One row a method. The classifier is counted: it trains in every method."""
    head = ("method", "trainable parameters", "of the model", f"{results[0].split} accuracy", "time")
    rows = [head]
    for result in results:
        rows.append(
            (
                TITLES[result.method],
                f"{result.trainable:,}",
                f"{100 * result.trainable / result.total:.2f} %",
                f"{100 * result.accuracy:.2f} %",
                f"{result.seconds:.1f} s",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for index, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
        if index == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def describe_merge(check: MergeCheck) -> str:
    """One line: how far the merged model is from the unmerged one."""
    if check.accuracy_merged == check.accuracy_unmerged:
        accuracy = f"accuracy equal ({100 * check.accuracy_merged:.2f} %)"
    else:
        accuracy = f"accuracy {100 * check.accuracy_merged:.2f} % against {100 * check.accuracy_unmerged:.2f} %"
    return (
        f"largest logit difference {check.max_logit_difference:.1e} (largest logit {check.max_logit:.1f}), "
        f"{accuracy}, {check.changed_predictions} predictions changed"
    )


def plot(folders: dict[str, Path], results: list[Result], file: Path) -> None:
    """Draw loss and accuracy by epoch, and accuracy by trainable parameters if there are several methods.

    Args:
        folders: method -> the folder with its log.jsonl.
    """
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot")

    panels = 3 if len(results) > 1 else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(4.6 * panels, 3.6), layout="constrained")
    for method, folder in folders.items():
        epochs = _epochs(folder)
        axes[0].plot(
            [e["epoch"] for e in epochs],
            [e["train_loss"] for e in epochs],
            color=_COLOURS[method],
            marker="o",
            markersize=3,
            label=TITLES[method],
        )
        tested = [e for e in epochs if "eval_accuracy" in e]
        axes[1].plot(
            [e["epoch"] for e in tested],
            [100 * e["eval_accuracy"] for e in tested],
            color=_COLOURS[method],
            marker="o",
            markersize=3,
            label=TITLES[method],
        )
    axes[0].set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    axes[1].set(xlabel="epoch", ylabel="held-out accuracy (%)")
    axes[0].legend(frameon=False, fontsize="small")
    if panels == 3:
        for result in results:
            axes[2].scatter(result.trainable, 100 * result.accuracy, color=_COLOURS[result.method])
            axes[2].annotate(
                TITLES[result.method],
                (result.trainable, 100 * result.accuracy),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
        axes[2].set(xlabel="trainable parameters", ylabel=f"{results[0].split} accuracy (%)", xscale="log")
        axes[2].margins(0.2)
    for axis in axes[:2]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    write_atomic(file, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)


def _epochs(folder: Path) -> list[dict]:
    with open(folder / LOG_FILE, encoding="utf-8") as file:
        return [entry for entry in map(json.loads, file) if entry["event"] == "epoch"]
