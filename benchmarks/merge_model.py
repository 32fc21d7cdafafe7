"""Times folding a model's adapters into its weights: the grouped op alone, in place and as serving swaps adapters
(pristine weights in, live weights out), and whole merge_ and unmerge_ calls.

    python benchmarks/merge_model.py --json merge_model.json

The grouped op is timed on the device (CUDA events; the clock on a CPU), with the weights restored and the L2 cache
overwritten outside the timed region, and beside it, in turns, a device copy of the same weights: what reading and
writing them once costs; all in the same run. swap_host_us is what a swap's call takes on the host, its work
queued and not waited for. merge_ and unmerge_ are wall times from an idle device to an idle device, and so are PEFT's
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
from steps.timing import DeviceTimer, host_us, synchronize
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


def grouped_call(model, weights, source=None):
    """The model's merges as one grouped call into `weights`, by name, of those weights or of `source`."""
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
        return lambda: ops.merge_kron_grouped_(*lists, source=source)
    lists = [[weights[f"{record.module}.weight"] for record in records]]
    lists += [[parameters[f"{record.module}.{name}"] for record in records] for name in ("lora_a", "lora_b", "coeff")]
    return lambda: ops.merge_lora_grouped_(*lists, source=source)


@torch.no_grad()
def time_grouped(model, device, repeats):
    """Medians of a merge in place, of a swap and of a copy of the same weights, in turns; the bytes of the weights."""
    names = [linear.weight_name for record in model.__dict__["_alore_state"].records for linear in record.linears]
    weights = {name: model.get_parameter(name).detach().clone() for name in names}
    originals = [weight.clone() for weight in weights.values()]
    targets = list(weights.values())
    spare = [torch.empty_like(weight) for weight in targets]
    live = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    swap, timer = grouped_call(model, live, originals), DeviceTimer(device)
    calls = {
        "op_us": grouped_call(model, weights),
        "swap_us": swap,
        "copy_us": lambda: torch._foreach_copy_(spare, originals),
    }
    samples = {name: [] for name in calls}
    for repeat in range(repeats + 3):
        torch._foreach_copy_(targets, originals)
        for name, call in calls.items():
            elapsed = timer(call)
            if repeat >= 3:
                samples[name].append(elapsed)
    check(model, weights, originals)
    if not all(torch.equal(a, b) for a, b in zip(live.values(), targets, strict=True)):
        raise SystemExit("a swap's weights differ from those merged in place")
    row = {name: statistics.median(values) for name, values in samples.items()}
    row["swap_host_us"] = host_us(swap, device, repeats)
    return row | {"bytes": sum(weight.nbytes for weight in targets)}


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
        row = {"method": name} | time_grouped(model, device, repeats)
        merge_ms, unmerge_ms = wall_ms(lambda m=model: ae.merge_(m), lambda m=model: ae.unmerge_(m), device, repeats)
        ratios = {"ratio": row["op_us"] / row["copy_us"], "swap_ratio": row["swap_us"] / row["copy_us"]}
        rows.append(row | ratios | {"merge_ms": merge_ms, "unmerge_ms": unmerge_ms})
    rows += peft_rows(base, device, repeats)

    columns = {"op_us": 1, "swap_us": 1, "copy_us": 1, "ratio": 2, "swap_ratio": 2, "swap_host_us": 1}
    columns |= {"merge_ms": 2, "unmerge_ms": 2}
    print(f"{'method':<10}" + "".join(f"{name:>13}" for name in columns))
    for row in rows:
        cells = (f"{row[name]:>13.{digits}f}" if name in row else f"{'':>13}" for name, digits in columns.items())
        print(f"{row['method']:<10}" + "".join(cells))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "commit": commit(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
