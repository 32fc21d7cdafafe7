"""Times the operators of mixed batches, one adapter a sample, at ViT-B/16's sizes against what a batch without adapters
takes.

    python benchmarks/grouped_ops.py --json grouped_ops.json

x is [256, 197, 768] bf16; ALoRE has 4 experts of rank 4, MLAE 8 rank rows on qkv (2,304 outputs); samples take the
adapters in turn. Beside each op, in turns with it, stands its floor: F.layer_norm, a copy, F.linear. "added" is what
the op takes beyond its floor, and a row says how it was planned. Each op is first compared with the float64 reference
on some samples; then device times are medians, of CUDA events (the clock on a CPU), with the L2 cache overwritten
before each call, and "host" is the time until a call returns, its work queued.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from steps.report import commit
from steps.timing import DeviceTimer, host_us

from alore_ext import ops, reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OUT_FEATURES, EXPERTS, RANK, LORA_RANK = 2304, 4, 4, 8


def drawn(*shape, spread, like, dtype=torch.float32):
    return torch.randn(*shape, device=like.device, dtype=dtype) * spread


def kron_adapters(x, count):
    block = x.shape[-1] // EXPERTS
    return [
        [drawn(EXPERTS, EXPERTS, EXPERTS, spread=0.5, like=x) for _ in range(count)],
        [drawn(EXPERTS, block, RANK, spread=block**-0.5, like=x) for _ in range(count)],
        [drawn(EXPERTS, RANK, block, spread=0.25, like=x) for _ in range(count)],
    ]


def lora_adapters(x, count):
    return [
        [drawn(LORA_RANK, x.shape[-1], spread=x.shape[-1] ** -0.5, like=x) for _ in range(count)],
        [drawn(OUT_FEATURES, LORA_RANK, spread=0.1, like=x) for _ in range(count)],
        [drawn(LORA_RANK, spread=1.0, like=x) for _ in range(count)],
    ]


def cases(x, count):
    """Each op's name, its arguments, and its floor."""
    index = torch.arange(x.shape[0], device=x.device) % count
    affine = [1 + drawn(x.shape[-1], spread=0.1, like=x, dtype=x.dtype)]
    affine += [drawn(x.shape[-1], spread=0.1, like=x, dtype=x.dtype), 1e-6]
    weight = drawn(OUT_FEATURES, x.shape[-1], spread=x.shape[-1] ** -0.5, like=x, dtype=x.dtype)
    linear = [weight, drawn(OUT_FEATURES, spread=0.1, like=x, dtype=x.dtype)]
    kron, lora, room = kron_adapters(x, count), lora_adapters(x, count), torch.empty_like(x)
    yield (
        "layer_norm_alore_grouped",
        [x, *affine, *kron, index],
        ("layer_norm", lambda: F.layer_norm(x, x.shape[-1:], *affine)),
    )
    yield "alore_grouped", [x, *kron, index], ("copy", lambda: room.copy_(x))
    yield "masked_lora_linear_grouped", [x, *linear, *lora, index], ("linear", lambda: F.linear(x, *linear))


def plan_of(op, args):
    """Whether the fused kernels take the call: the adapters are all of one shape."""
    x = args[0]
    if x.device.type != "cuda":
        return "-"
    if op == "masked_lora_linear_grouped":
        plan = ops.plan_lora_grouped(x, args[1], args[3])
    else:
        plan = ops.plan_alore(x, *(values[0] for values in args[-4:-1]), norm=op == "layer_norm_alore_grouped")
    return "fused" if plan.fused else "composed"


def wide(value):
    if isinstance(value, list):
        return [wide(v) for v in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(op, args, samples=4):
    """Some samples against the reference, relative to the largest element: three roundings, in fp32 the sums' own."""
    got = getattr(ops, op)(*args)
    some = torch.linspace(0, args[0].shape[0] - 1, samples, device=args[0].device).long()
    exact = getattr(reference, op)(wide(args[0][some]), *(wide(a) for a in args[1:-1]), args[-1][some])
    error = ((got[some].double() - exact).abs().max() / exact.abs().max()).item()
    allowed = torch.finfo(args[0].dtype).eps * (3 if args[0].dtype.itemsize == 2 else 64)
    if not error <= allowed:
        raise SystemExit(f"{op}: off by {error:.2e} of the largest element, allowed {allowed:.2e}")


def medians(calls, timer, repeats):
    samples = [[] for _ in calls]
    for repeat in range(repeats + 3):
        for call, own in zip(calls, samples, strict=True):
            elapsed = timer(call)
            if repeat >= 3:
                own.append(elapsed)
    return [statistics.median(own) for own in samples]


@torch.no_grad()
def rows(x, counts, repeats):
    timer, device = DeviceTimer(x.device), x.device
    for count in counts:
        for op, args, (floor, plain) in cases(x, count):
            check(op, args)

            def call(op=op, args=args):
                return getattr(ops, op)(*args)

            us, floor_us = medians([call, plain], timer, repeats)
            yield {
                "op": op,
                "adapters": count,
                "plan": plan_of(op, args),
                "us": us,
                "floor": floor,
                "floor_us": floor_us,
                "added_us": us - floor_us,
                "ratio": us / floor_us,
                "host_us": host_us(call, device, repeats),
                "floor_host_us": host_us(plain, device, repeats),
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="default: 50 on a GPU, 3 on a CPU")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()

    device = torch.device(args.device)
    repeats = args.repeats or (50 if device.type == "cuda" else 3)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"[{args.batch}, {args.tokens}, {args.dim}] {args.dtype} on {machine}, torch {torch.__version__}, {commit()}")
    torch.manual_seed(0)
    x = torch.randn(args.batch, args.tokens, args.dim, device=device).to(DTYPES[args.dtype])

    table = []
    print(
        f"{'op':27} {'adapters':>8} {'plan':8} {'us':>8} {'floor':10} {'us':>8} {'added':>7} {'ratio':>6} "
        f"{'host us':>8} {'floor':>6}"
    )
    for row in rows(x, args.adapters, repeats):
        table.append(row)
        print(
            f"{row['op']:27} {row['adapters']:8} {row['plan']:8} {row['us']:8.1f} {row['floor']:10} "
            f"{row['floor_us']:8.1f} {row['added_us']:7.1f} {row['ratio']:6.2f} {row['host_us']:8.1f} "
            f"{row['floor_host_us']:6.1f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "commit": commit(), "rows": table}, indent=1))


if __name__ == "__main__":
    main()
