"""Serving one backbone with many adapters: merged weights, swaps, mixed batches, memory, a loaded server.

    python benchmarks/serving.py --json serving.json --plot serving.png            # a GPU: ViT-B/16, bf16
    python benchmarks/serving.py --parts server --seconds 20                       # the server; a CPU will do

All ratios are of one run: each call takes turns with the plain backbone on the same images. Before it is timed, a mixed
batch is compared with each adapter's own merged model. PEFT's counterparts run where peft is importable. The exit
status is 1 where the server lost a request, answered one wrongly, held one for ever, or did not end well.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from serve.pool_parts import PARTS
from serve.subject import DTYPES, build
from steps.report import COLOURS, commit

FAULTS = ("lost", "wrong", "stuck", "exit")  # of the server's row: what must be 0


def main(argv=None):
    args = _arguments(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    head = {"model": args.model, "dtype": args.dtype, "batch": args.batch, "machine": machine}
    head |= {"torch": torch.__version__, "commit": commit()}
    rows = []

    def keep(new):
        """Printed at once: a run that is cut short leaves what it had measured."""
        for row in new:
            if "ms" in row:
                row["per_s"] = args.batch / row["ms"] * 1e3
            print(_line(row), flush=True)
        rows.extend(new)

    try:
        _run(args, device, head, machine, keep)
    finally:  # a part that fails does not take the others' rows with it
        if args.json:
            Path(args.json).write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if args.plot:
        _plot(head, [row for row in rows if row["part"] == "mixed" and "ratio" in row], args.plot)
    for row in rows:
        if bad := {key: row[key] for key in FAULTS if row.get(key)}:
            sys.exit(f"{row['part']} failed: {', '.join(f'{key} {value}' for key, value in bad.items())}")
    return rows


def _run(args, device, head, machine, keep):
    pool_parts = [part for part in args.parts if part in PARTS]
    subject = f"{args.model} {args.dtype} batch {args.batch} on " if pool_parts else ""
    print(f"{subject}{machine}, torch {torch.__version__}, {head['commit']}")
    if pool_parts:
        torch.manual_seed(0)
        base = build(args, device)
        size = base.patch_embed.img_size
        images = torch.randn(args.batch, 3, *size, device=device, dtype=DTYPES[args.dtype])
        for part in pool_parts:
            keep(PARTS[part](args, base, images, device))
            _free(device)
    if "server" in args.parts:
        from serve.server_part import server

        keep(server(args))


def _arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*PARTS, "server"]
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=[*PARTS], help=f"{','.join(known)}; all but the last"
    )
    parser.add_argument("--model", default="vit_base_patch16_224", help="a ViT of timm")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="JSON, for timm.create_model")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of timing for each comparison; of load for the server"
    )
    parser.add_argument("--clients", type=int, default=32, help="concurrent clients of the server")
    parser.add_argument("--compile", action="store_true", help="merged: with torch.compile too (takes minutes)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in known]:
        parser.error(f"--parts: {', '.join(map(repr, unknown))} is none of {', '.join(known)}")
    return args


def _line(row):
    fields = []
    if "ratio" in row:
        fields.append(f"{row['ratio']:6.3f}x  {row['ms']:8.2f} ms  base {row['base_ms']:8.2f} ms")
        fields.append(f"{row['per_s']:6.0f} images/s")
    for key in ("wall_us", "host_us", "device_us", "copy_us", "mb"):
        if row.get(key) is not None:
            bound = "<= " if key == "device_us" and not row["queued_ahead"] else ""
            fields.append(f"{row[key]:.2f} MB" if key == "mb" else f"{key} {bound}{row[key]:.1f}")
    if "file_mb" in row:
        fields.append(f"file {row['file_mb']:.2f} MB")
    if row.get("launches"):
        fields.append("launches {} and {}".format(*row["launches"]))
    if row.get("check"):
        fields.append(f"check {row['check']:.0e}")
    if "text" in row:
        fields.append(row["text"])
    return f"{row['part']:<7} {row['what']:<46} {'  '.join(fields)}"


def _free(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _plot(head, rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    colours = [
        COLOURS["PEFT"] if "PEFT" in r["what"] else COLOURS["plain PyTorch" if "loop" in r["what"] else "this library"]
        for r in rows
    ]
    bars = axis.barh(range(len(rows)), [row["ratio"] for row in rows], color=colours)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xlabel(f"time of a batch of {head['batch']} / the backbone's (log scale)", fontsize=9)
    axis.set_title(f"{head['model']}, {head['dtype']}, {head['machine']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
