"""Times folding a model's adapters into its weights: the grouped op alone, and whole merge_ and unmerge_ calls.

    python benchmarks/merge_model.py --json merge_model.json

The grouped op is timed on the device (CUDA events; the clock on a CPU), with the weights restored and the L2 cache
overwritten outside the timed region, and beside it, in turns, a device copy of the same weights: what reading and
writing them once costs. merge_ and unmerge_ are wall times from an idle device to an idle device, and so are PEFT's
merge_adapter and unmerge_adapter where peft is importable.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import timm
import torch
from steps.report import commit
from steps.timing import synchronize
from train_step import DTYPES

import alore_ext as ae
from alore_ext import ops

CONFIGS = {
    "alore": ae.AloreConfig(num_experts=4, rank=4),  # before qkv and fc1
    "mlae": ae.MlaeConfig(num_experts=8, targets=("qkv", "fc1")),
}
PEFT_TARGETS = r".*\.(qkv|fc1)"


@torch.no_grad()
def train_adapters_(model):
    """Stand in for training: no factor stays at zero."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("up", "lora_b"):
            parameter.normal_(0.0, 0.02)
    return model


class DeviceTimer:
    """Microseconds of one call on the device, after the L2 cache has been overwritten."""

    def __init__(self, device):
        self.device = device
        self.flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, call):
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        self.flush.zero_()
        # The device is kept busy while the host prepares the launches, so that their cost on the host is not timed.
        torch.cuda._sleep(4_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3


def grouped_call(model, weights):
    """The model's merges as one grouped call into `weights`, the same tensors as the model's, by name."""
    records = model.__dict__["_alore_state"].records
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if records[0].method == "alore":
        own = [(record, linear) for record in records for linear in record.linears]
        lists = [
            [weights[linear.weight_name] for _, linear in own],
            [None] * len(own),
            [parameters["alore_scale"]] * len(own),
            [parameters[f"{record.module}.down"] for record, _ in own],
            [parameters[f"{record.module}.up"] for record, _ in own],
            [record.side for record, _ in own],
        ]
        return lambda: ops.merge_kron_grouped_(*lists)
    lists = [[weights[f"{record.module}.weight"] for record in records]]
    lists += [[parameters[f"{record.module}.{name}"] for record in records] for name in ("lora_a", "lora_b", "coeff")]
    return lambda: ops.merge_lora_grouped_(*lists)


@torch.no_grad()
def time_grouped(model, device, repeats):
    """Medians of the grouped op and of a copy of the same weights, taken in turns, and the bytes of the weights."""
    names = [linear.weight_name for record in model.__dict__["_alore_state"].records for linear in record.linears]
    weights = {name: model.get_parameter(name).detach().clone() for name in names}
    originals = [weight.clone() for weight in weights.values()]
    targets = list(weights.values())
    spare = [torch.empty_like(weight) for weight in targets]
    merge, timer = grouped_call(model, weights), DeviceTimer(device)
    merge_us, copy_us = [], []
    for repeat in range(repeats + 3):
        torch._foreach_copy_(targets, originals)
        merge_time = timer(merge)
        copy_time = timer(lambda: torch._foreach_copy_(spare, originals))
        if repeat >= 3:
            merge_us.append(merge_time)
            copy_us.append(copy_time)
    check(model, weights, originals)
    return statistics.median(merge_us), statistics.median(copy_us), sum(w.nbytes for w in targets)


def check(model, weights, originals):
    """The last timed merge against the float64 reference, within two roundings of the weight's dtype."""
    records = model.__dict__["_alore_state"].records
    record_of = {linear.weight_name: record for record in records for linear in record.linears}
    for (name, merged), original in zip(weights.items(), originals, strict=True):
        record = record_of[name]
        own = {key: model.get_parameter(f"{record.module}.{key}").double() for key in record.parameter_shapes()}
        if record.method == "alore":
            dense = ae.reference.kron_weight(model.alore_scale.double(), own["down"], own["up"])
            exact = original.double() + original.double() @ dense.T
        else:
            exact = original.double() + (own["lora_b"] * own["coeff"]) @ own["lora_a"]
        error = (merged.double() - exact).abs().max() / exact.abs().max()
        if not error <= 2 * torch.finfo(merged.dtype).eps:
            raise SystemExit(f"{name}: the merged weight is off by {error.item():.2e} of its largest element")


def wall_ms(call, undo, device, repeats):
    """Medians of `call` and of `undo`, run in turns."""
    times = [], []
    for repeat in range(repeats + 1):
        for step, samples in zip((call, undo), times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if repeat > 0:
                samples.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(samples) for samples in times]


def peft_rows(base, device, repeats):
    try:
        import peft
    except ImportError:
        return []
    configs = {
        "peft_lora": peft.LoraConfig(r=8, target_modules=PEFT_TARGETS),
        "peft_lokr": peft.LoKrConfig(r=4, target_modules=PEFT_TARGETS),
    }
    rows = []
    for name, config in configs.items():
        model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
        merge, unmerge = wall_ms(model.merge_adapter, model.unmerge_adapter, device, repeats)
        rows.append({"method": name, "merge_ms": merge, "unmerge_ms": unmerge})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="default: 50 on a GPU, 5 on a CPU")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()

    device = torch.device(args.device)
    repeats = args.repeats or (50 if device.type == "cuda" else 5)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model} {args.dtype} on {machine}, torch {torch.__version__}, commit {commit()}")
    torch.manual_seed(0)
    base = timm.create_model(args.model, num_classes=100).to(device, DTYPES[args.dtype])

    rows = []
    for name, config in CONFIGS.items():
        model = train_adapters_(ae.patch(copy.deepcopy(base), config))
        merge_us, copy_us, size = time_grouped(model, device, repeats)
        merge_ms, unmerge_ms = wall_ms(lambda m=model: ae.merge_(m), lambda m=model: ae.unmerge_(m), device, repeats)
        row = {"method": name, "op_us": merge_us, "copy_us": copy_us, "ratio": merge_us / copy_us, "bytes": size}
        rows.append(row | {"merge_ms": merge_ms, "unmerge_ms": unmerge_ms})
    rows += peft_rows(base, device, repeats)

    print(
        f"{'method':<10} {'op, us':>10} {'copy, us':>10} {'ratio':>6} {'MB':>7} {'merge, ms':>10} {'unmerge, ms':>12}"
    )
    for row in rows:
        op = f"{'':>10} {'':>10} {'':>6} {'':>7}"
        if "op_us" in row:
            op = f"{row['op_us']:>10.1f} {row['copy_us']:>10.1f} {row['ratio']:>6.2f} {row['bytes'] / 1e6:>7.1f}"
        print(f"{row['method']:<10} {op} {row['merge_ms']:>10.2f} {row['unmerge_ms']:>12.2f}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "commit": commit(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
