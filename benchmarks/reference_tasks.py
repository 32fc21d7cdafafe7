"""Fine-tunes one backbone on small tasks with every method, through the command line, by VTAB-1k's protocol.

    python benchmarks/reference_tasks.py --weights dinov2_vits14_fp16.safetensors --data cifar10.npz sprites_loc.npz

Each method trains on the train split with a few learning rates; the one with the best last validation accuracy trains
once more on train and val together, and that model's accuracy on the test split is reported.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

RATES = {
    "linear": (1e-2, 1e-3),
    "alore": (1e-2, 5e-3, 2e-3),
    "mlae": (5e-3, 2e-3),
    "full": (1e-4, 3e-5, 1e-5),
}


def finetune(args, data, method, lr, split="train"):
    out = args.out / f"{data.stem}-{method}-{lr:g}-{split}"
    command = [sys.executable, "-m", "alore_ext.cli", "finetune", "--model", args.model, "--weights", args.weights]
    command += ["--img-size", args.img_size, "--data", data, "--method", method, "--lr", lr, "--out", out]
    command += ["--epochs", args.epochs, "--batch-size", 32, "--seed", args.seed, "--amp", args.amp, "--overwrite"]
    command += ["--train-split", split]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{data.stem} {method} lr {lr:g}: {run.stderr.strip()[-600:]}")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    curve = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry][-1]
    result = json.loads((out / "result.json").read_text())
    return {**result, "data": data.stem, "lr": lr, "train_split": split, "val": curve if split == "train" else None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--img-size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--parallel", type=int, default=6, help="runs at a time")
    parser.add_argument("--selection", type=Path, help="reference_tasks.json whose rates are not tried again")
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    args = parser.parse_args()

    rows = json.loads(args.selection.read_text()) if args.selection else []
    known = {(row["data"], row["method"], row["lr"]) for row in rows}
    tasks = [(data, method) for data in args.data for method in args.methods]
    grid = [(data, method, lr) for data, method in tasks for lr in RATES[method]]
    with ThreadPoolExecutor(args.parallel) as pool:
        untried = [point for point in grid if (point[0].stem, *point[1:]) not in known]
        rows += pool.map(lambda point: finetune(args, *point), untried)

        def best(data, method):
            return max(
                (row for row in rows if (row["data"], row["method"]) == (data.stem, method)), key=itemgetter("val")
            )

        chosen = [best(data, method) for data, method in tasks]
        final = list(pool.map(lambda task, row: finetune(args, *task, row["lr"], "trainval"), tasks, chosen))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "reference_tasks.json").write_text(json.dumps(rows + final, indent=1))
    print(f"{'task':<12} {'method':<8} {'lr':>7} {'val':>6} {'test':>6} {'trainable':>11} {'seconds':>8}")
    for row, tried in zip(final, chosen, strict=True):
        print(
            f"{row['data']:<12} {row['method']:<8} {row['lr']:>7g} {tried['val']:>6.3f} {row['accuracy']:>6.3f}"
            f" {row['trainable']:>11,} {row['seconds']:>8.1f}"
        )


if __name__ == "__main__":
    main()
