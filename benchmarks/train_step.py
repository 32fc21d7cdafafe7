"""Times whole training steps: frozen floor, full fine-tuning, this library, the same in plain PyTorch, PEFT.

    python benchmarks/train_step.py --model vit_base_patch16_224 --batch 32 256 --mode eager graph

All methods of one row share a process and a batch; `ratio` is to the floor of the same batch and mode. The floor is
the frozen backbone's forward, the gradient of its input, and the head: what no adapter at all would cost.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import timm
import torch
from torch import nn

import alore_ext as ae

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class EinsumAlore(nn.Module):
    """A norm with ALoRE behind it, in plain PyTorch: the form one would write without this library."""

    def __init__(self, norm: nn.LayerNorm, scale: nn.Parameter, rank: int):
        super().__init__()
        n, dim = scale.shape[0], norm.weight.numel()
        self.norm, self.scale = norm, scale
        self.down = nn.Parameter(torch.randn(n, dim // n, rank, device=scale.device, dtype=scale.dtype) * 0.05)
        self.up = nn.Parameter(torch.zeros(n, rank, dim // n, device=scale.device, dtype=scale.dtype))

    def forward(self, x):
        x = self.norm(x)
        code = torch.einsum("...ak,ikr->...air", x.unflatten(-1, (self.scale.shape[0], -1)), self.down)
        mixed = torch.einsum("...air,iab->...bir", code, self.scale)
        return x + torch.einsum("...bir,irp->...bp", mixed, self.up).flatten(-2)


def freeze(model):
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    return model


def floor(model):
    """The gradient of the first block's input is asked for, so that backward runs through every block."""
    model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].detach().requires_grad_(),))
    return freeze(model)


def alore_einsum(model):
    freeze(model)
    like = next(model.parameters())
    model.alore_scale = nn.Parameter(torch.randn(4, 4, 4, device=like.device, dtype=like.dtype) / 2)
    for block in model.blocks:
        block.norm1 = EinsumAlore(block.norm1, model.alore_scale, rank=4)
        block.norm2 = EinsumAlore(block.norm2, model.alore_scale, rank=4)
    return model


def peft(config_name, **options):
    """PEFT with its adapters in the model's own dtype: upcast ones, its default, are slower."""

    def build(model):
        import peft as library

        config = getattr(library, config_name)(modules_to_save=["head"], **options)
        return library.get_peft_model(model, config, autocast_adapter_dtype=False)

    return build


METHODS = {
    "floor": floor,
    "full": lambda model: model.requires_grad_(True),
    "alore": lambda model: ae.patch(model, ae.AloreConfig(num_experts=4, rank=4)),
    "alore_einsum": alore_einsum,
    "mlae": lambda model: ae.patch(model, ae.MlaeConfig(num_experts=8)),
    "peft_lora": peft("LoraConfig", r=8, target_modules=r".*\.qkv"),
    "peft_lokr": peft("LoKrConfig", r=4, target_modules=r".*\.(qkv|fc1)"),
}


class Step:
    """One optimisation step on fixed images, eager, compiled or as a CUDA graph."""

    def __init__(self, model, images, labels, mode):
        self.images, self.labels = images, labels
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, fused=images.is_cuda, capturable=mode == "graph")
        self.forward = torch.compile(model) if mode == "compile" else model
        self.graph = None
        if mode == "graph":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()

    def run(self):
        loss = nn.functional.cross_entropy(self.forward(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self):
        return self.graph.replay() if self.graph is not None else self.run()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(step, device, seconds):
    """Median over groups of steps, each timed from an idle device to an idle device."""
    for _ in range(5):
        step()
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    group = max(1, int(0.1 / (time.perf_counter() - start)))
    samples, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 3:
        start = time.perf_counter()
        for _ in range(group):
            step()
        synchronize(device)
        samples.append((time.perf_counter() - start) / group * 1e3)
    return statistics.median(samples)


def measure(name, base, images, labels, mode, seconds):
    device = images.device
    model = METHODS[name](copy.deepcopy(base)).train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = Step(model, images, labels, mode)
    ms = milliseconds(step, device, seconds)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return {"method": name, "ms": ms, "peak_mib": peak, "trainable": trainable}


def commit():
    """The checkout's commit; a copy without .git is told it by ALORE_COMMIT."""
    told = os.environ.get("ALORE_COMMIT")
    if told:
        return told
    try:
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = sorted({(r["batch"], r["mode"]) for r in rows})
    figure, axes = plt.subplots(1, len(settings), figsize=(4 * len(settings), 3.2), squeeze=False)
    for axis, (batch, mode) in zip(axes[0], settings, strict=True):
        chosen = [r for r in rows if (r["batch"], r["mode"]) == (batch, mode)]
        axis.barh([r["method"] for r in chosen], [r["ratio"] for r in chosen])
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(f"batch {batch}, {mode}")
        axis.set_xlabel("step time / frozen floor")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=["eager", "graph", "compile"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed a method")
    parser.add_argument("--out", type=Path, help="folder for train_step.json and train_step.png")
    args = parser.parse_args()

    device = torch.device(args.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model} {args.dtype} on {machine}, torch {torch.__version__}, commit {commit()}")
    torch.manual_seed(0)
    base = timm.create_model(args.model, num_classes=100).to(device, DTYPES[args.dtype])
    size = base.patch_embed.img_size
    rows = []
    for batch in args.batch:
        images = torch.randn(batch, 3, *size, device=device, dtype=DTYPES[args.dtype])
        labels = torch.randint(0, 100, (batch,), device=device)
        for mode in args.mode:
            group = []
            for name in args.methods:
                try:
                    row = measure(name, base, images, labels, mode, args.seconds)
                except Exception as error:
                    print(f"{batch:>5} {mode:<8} {name:<14} failed: {type(error).__name__}: {str(error)[:120]}")
                    continue
                finally:
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                group.append({**row, "batch": batch, "mode": mode, "ratio": row["ms"] / (group or [row])[0]["ms"]})
                memory = f"{row['peak_mib']:>9,.0f} MiB" if row["peak_mib"] is not None else ""
                print(
                    f"{batch:>5} {mode:<8} {name:<14} {row['ms']:>9.2f} ms  {group[-1]['ratio']:>5.2f}x {memory}"
                    f"  {row['trainable']:>12,} trainable",
                    flush=True,
                )
            rows += group
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "train_step.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        plot(rows, args.out / "train_step.png")


if __name__ == "__main__":
    main()
