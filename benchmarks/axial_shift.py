"""Times the axial shifts at AS-MLP-B's four stages (batch 128, 224 px) against device copies of the same tensors.

    python benchmarks/axial_shift.py --json axial_shift.json

Each call walks through inputs, and writes outputs, that are several times the L2 cache, so none is found in it.
A row first compares the result with the reference. Its copy moves the same bytes: `axial_shift` reads and writes one
tensor, as one copy does; the pair reads one and writes two, its backward reads two and writes one, and the copy beside
them is 1.5 copies. Medians, in microseconds; the issue asks for a ratio of at most 1.2.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from steps.report import commit

import alore_ext  # noqa: F401  (registers the operators)
from alore_ext import reference

STAGES = [(128, 56), (256, 28), (512, 14), (1024, 7)]  # channels, height and width
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ROTATED_BYTES = 400 * 2**20  # several times an H200's L2 cache
SHIFT_SIZE = 5

namespace = torch.ops.alore_ext
# Name: the op, how many of its tensors are read, and its whole traffic in copies.
CASES = {
    "shift_w": (lambda x: namespace.axial_shift(x, SHIFT_SIZE, 3), 1, 1.0),
    "shift_h": (lambda x: namespace.axial_shift(x, SHIFT_SIZE, 2), 1, 1.0),
    "shift_w_backward": (lambda g: namespace.axial_shift_backward(g, SHIFT_SIZE, 3), 1, 1.0),
    "shift_h_backward": (lambda g: namespace.axial_shift_backward(g, SHIFT_SIZE, 2), 1, 1.0),
    "pair": (lambda x: namespace.axial_shift_pair(x, SHIFT_SIZE), 1, 1.5),
    "pair_backward": (lambda w, h: namespace.axial_shift_pair_backward(w, h, SHIFT_SIZE), 2, 1.5),
}


def expected(name, inputs):
    """What the reference gives; of a backward, the gradient that autograd finds through it."""
    if name == "pair":
        return reference.axial_shift_pair(inputs[0], SHIFT_SIZE)
    if not name.endswith("_backward"):
        return (reference.axial_shift(inputs[0], SHIFT_SIZE, 3 if name == "shift_w" else 2),)
    dims = (3, 2) if name == "pair_backward" else (3 if name == "shift_w_backward" else 2,)
    parts = []
    for grad, dim in zip(inputs, dims, strict=True):
        x = torch.zeros_like(grad, requires_grad=True)
        parts += torch.autograd.grad(reference.axial_shift(x, SHIFT_SIZE, dim), x, grad)
    return (sum(parts[1:], parts[0]),)


def check(name, call, inputs):
    got = call(*inputs)
    for a, b in zip(got if isinstance(got, tuple) else (got,), expected(name, inputs), strict=True):
        if not torch.equal(a, b):
            raise SystemExit(f"{name} {list(b.shape)} {b.dtype}: not what the reference gives")


def copy(x, *_):
    return x.clone()


def microseconds(calls, sets, repeats):
    """Medians for each of `calls`, taken in turns. One timing is a pass over all sets, as one CUDA graph: what the host
    spends on a launch is not in it. All outputs of a pass are kept, so that none takes the place of another."""
    graphs, kept = [], []
    for call in calls:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for inputs in sets:
                call(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept.append([call(*inputs) for inputs in sets])
        graphs.append(graph)
    samples = [[] for _ in calls]
    for repeat in range(repeats + 3):
        for graph, own in zip(graphs, samples, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 3:
                own.append(begin.elapsed_time(end) * 1e3 / len(sets))
    return [statistics.median(own) for own in samples]


def rows(args):
    for channels, side in STAGES:
        shape = (args.batch, channels, side, side)
        for dtype in args.dtypes:
            for layout in args.layouts:
                size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
                count = max(3, -(-ROTATED_BYTES // size))
                options = {"device": "cuda", "dtype": DTYPES[dtype]}
                tensors = [torch.randn(shape, **options).to(memory_format=LAYOUTS[layout]) for _ in range(count)]
                for name, (call, reads, copies) in CASES.items():
                    sets = [tuple(tensors[(i + k) % count] for k in range(reads)) for i in range(count)]
                    check(name, call, sets[0])
                    us, copy_us = microseconds([call, copy], sets, args.repeats)
                    copy_us *= copies
                    yield {
                        "op": name,
                        "shape": list(shape),
                        "dtype": dtype,
                        "layout": layout,
                        "us": round(us, 2),
                        "copy_us": round(copy_us, 2),
                        "ratio": round(us / copy_us, 3),
                    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("axial_shift.py times CUDA kernels, and there is no CUDA device")
    torch.manual_seed(0)
    table = []
    print(f"{'op':18} {'shape':22} {'dtype':5} {'layout':6} {'us':>9} {'copy us':>9} {'ratio':>6}")
    for row in rows(args):
        table.append(row)
        print(
            f"{row['op']:18} {row['shape']!s:22} {row['dtype']:5} {row['layout']:6} {row['us']:9.2f} "
            f"{row['copy_us']:9.2f} {row['ratio']:6.3f}",
            flush=True,
        )
    print(f"largest ratio {max(row['ratio'] for row in table)}")
    if args.json:
        head = {"commit": commit(), "machine": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**head, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
