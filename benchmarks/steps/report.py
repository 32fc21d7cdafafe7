"""What a run leaves behind: lines, JSON, the plot."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import timm
import torch

COLOURS = {
    "floor": "#8c8c8c",
    "full fine-tuning": "#4d4d4d",
    "this library": "#1f6fb4",
    "plain PyTorch": "#e08a1e",
    "PEFT": "#3f9b52",
}


def commit():
    """The checkout's commit, "-dirty" with local changes; a copy without .git is told it by ALORE_COMMIT."""
    told = os.environ.get("ALORE_COMMIT")
    if told:
        return told
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        run = subprocess.run(describe, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def environment(args, device):
    """The JSON's head: everything that a figure depends on."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "timm": timm.__version__,
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "dtype": args.dtype,
        "autocast": args.autocast,
        "channels_last": args.channels_last,
        "interleaved": args.interleave,
    }


def with_ratios(rows):
    """Rows of one batch and mode with `ratio` to their floor's median; None where no floor was timed."""
    floor = next((row["ms"] for row in rows if row["method"] == "floor"), None)
    return [{**row, "ratio": row["ms"] / floor if floor else None} for row in rows]


def line(row):
    ratio = f"{row['ratio']:>5.2f}x" if row["ratio"] else "     -"
    memory = f"{row['peak_mib']:>9,.0f} MiB" if row["peak_mib"] is not None else ""
    breaks = f"  {row['graph_breaks']} graph breaks" if row.get("graph_breaks") else ""
    return (
        f"{row['batch']:>5} {row['mode']:<8} {row['method']:<14} {row['ms']:>9.2f} ms (min {row['ms_min']:.2f}) {ratio}"
        f" {memory}  {row['trainable']:>12,} trainable{breaks}"
    )


def write(head, rows, failures, folder):
    """`train_step.json`, and `train_step.png` where there are ratios to show."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_step.json").write_text(json.dumps({**head, "rows": rows, "failures": failures}, indent=1) + "\n")
    if shown := [row for row in rows if row["ratio"]]:
        plot(head, shown, folder / "train_step.png")


def plot(head, rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    settings = list(dict.fromkeys((row["batch"], row["mode"]) for row in rows))
    panels = [[row for row in rows if (row["batch"], row["mode"]) == setting] for setting in settings]
    height = 1.9 + 0.32 * max(map(len, panels))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.2 + 3.6 * len(panels), height), squeeze=False, layout="constrained"
    )
    limit = 1.15 * max(row["ratio"] for row in rows)
    for axis, (batch, mode), panel in zip(axes[0], settings, panels, strict=True):
        bars = axis.barh(range(len(panel)), [row["ratio"] for row in panel], color=[COLOURS[r["kind"]] for r in panel])
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.set_yticks(range(len(panel)), [row["method"] for row in panel], fontsize=9)
        axis.invert_yaxis()
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlim(0, limit)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("training step / frozen backbone's step", fontsize=9)
        axis.set_title(f"batch {batch}, {mode}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    dtype = f"fp32 weights, {head['dtype']} autocast" if head["autocast"] else head["dtype"]
    figure.suptitle(f"{head['model']}, {dtype}, {head['machine']}", fontsize=10)
    kinds = [kind for kind in COLOURS if any(row["kind"] == kind for row in rows)]
    figure.legend(
        handles=[Patch(color=COLOURS[kind], label=kind) for kind in kinds],
        loc="outside lower center",
        ncols=min(len(kinds), 2 + len(panels)),
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
