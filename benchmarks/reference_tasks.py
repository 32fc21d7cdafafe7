"""Fine-tunes one backbone on small tasks with every method through the command line, and picks the rate on val.

    python benchmarks/reference_tasks.py --weights dinov2_vits14_fp16.safetensors --data cifar10.npz sprites_loc.npz

Each method trains with two learning rates on the train split; the one with the better last validation accuracy is
reported, by its accuracy on the test split.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RATES = {
    "linear": (1e-2, 1e-3),
    "alore": (5e-3, 2e-3),
    "mlae": (5e-3, 2e-3),
    "full": (1e-4, 3e-5),
}


def finetune(args, data, method, lr):
    out = args.out / f"{data.stem}-{method}-{lr:g}"
    command = [sys.executable, "-m", "alore_ext.cli", "finetune", "--model", args.model, "--weights", args.weights]
    command += ["--img-size", args.img_size, "--data", data, "--method", method, "--lr", lr, "--out", out]
    command += ["--epochs", args.epochs, "--batch-size", 32, "--seed", args.seed, "--amp", args.amp, "--overwrite"]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{data.stem} {method} lr {lr:g}: {run.stderr.strip()[-600:]}")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    val = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry][-1]
    result = json.loads((out / "result.json").read_text())
    return {**result, "data": data.stem, "method": method, "lr": lr, "val": val}


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
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    args = parser.parse_args()

    grid = [(data, method, lr) for data in args.data for method in args.methods for lr in RATES[method]]
    with ThreadPoolExecutor(args.parallel) as pool:
        rows = list(pool.map(lambda point: finetune(args, *point), grid))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "reference_tasks.json").write_text(json.dumps(rows, indent=1))
    print(f"{'task':<12} {'method':<8} {'lr':>7} {'val':>6} {'test':>6} {'trainable':>11} {'seconds':>8}")
    for data in args.data:
        for method in args.methods:
            tried = [row for row in rows if (row["data"], row["method"]) == (data.stem, method)]
            best = max(tried, key=lambda row: row["val"])
            print(
                f"{data.stem:<12} {method:<8} {best['lr']:>7g} {best['val']:>6.3f} {best['accuracy']:>6.3f}"
                f" {best['trainable']:>11,} {best['seconds']:>8.1f}"
            )


if __name__ == "__main__":
    main()
