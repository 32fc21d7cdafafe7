"""Times whole training steps: frozen floor, full fine-tuning, this library, the same in plain PyTorch, PEFT.

    python benchmarks/train_step.py --model vit_base_patch16_224 --batch 32 256 --mode eager graph
    python benchmarks/train_step.py --model swin_base_patch4_window7_224 --batch 128 --interleave --out runs/swin
    python benchmarks/train_step.py --batch 32 --profile alore

Any timm ViT, Swin (v1) or ConvNeXt. All methods of one row share a process and a batch; `ratio` is to the median of the
floor of the same batch and mode. The floor is the frozen backbone's forward, the gradient of its first block's input,
and the head: what no adapter at all would cost.
"""

import argparse
import copy
import functools
import gc
import importlib.util
import sys
from pathlib import Path

import timm
import torch
import torch._dynamo
from steps import report
from steps.methods import METHODS
from steps.places import find_places
from steps.profiling import profile
from steps.timing import Step, milliseconds, summary, synchronize
from timm.models import is_model_in_modules
from timm.utils import ParseKwargs

from alore_ext.models import as_mlp

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLASSES = 100


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT, Swin or ConvNeXt")
    parser.add_argument("--img-size", type=int, help="image side; default: the model's own")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="key=value for timm")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=["eager", "graph", "compile"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--autocast", action="store_true", help="fp32 weights, forward under autocast to --dtype")
    parser.add_argument("--channels-last", action="store_true", help="images and kernels in NHWC memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed a method")
    parser.add_argument(
        "--interleave",
        action="store_true",
        help="build all methods first, then time them in turns; no peak memory then. For small differences",
    )
    parser.add_argument("--profile", nargs="+", metavar="METHOD", choices=list(METHODS), help="profile, don't time")
    parser.add_argument("--out", type=Path, help="folder for train_step.json, train_step.png and profiles")
    args = parser.parse_args(argv)
    if args.autocast and args.dtype == "fp32":
        parser.error("--autocast needs --dtype bf16 or fp16")
    if "graph" in args.mode and torch.device(args.device).type != "cuda":
        parser.error("--mode graph needs a CUDA device")
    return args


def make_model(args):
    """The plain model, on the CPU: on the GPU it would count into every method's peak memory."""
    kwargs = dict(args.model_kwargs)
    if args.img_size and not is_model_in_modules(args.model, ["convnext"]):  # a ConvNeXt takes any size as it is
        kwargs["img_size"] = args.img_size
    torch.manual_seed(0)
    if args.model.startswith("as_mlp"):
        model = getattr(as_mlp, args.model)(num_classes=CLASSES, **args.model_kwargs)
    else:
        model = timm.create_model(args.model, num_classes=CLASSES, **kwargs)
    model = model.to(torch.float32 if args.autocast else DTYPES[args.dtype])
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def make_batch(args, base, batch, device):
    """Random images and labels."""
    size = getattr(getattr(base, "patch_embed", None), "img_size", None)
    if size is None:
        size = getattr(base, "default_cfg", {"input_size": (3, 224, 224)})["input_size"][1:]
    if args.img_size:
        size = (args.img_size, args.img_size)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, *size, generator=generator).to(device, next(base.parameters()).dtype)
    if args.channels_last:
        images = images.to(memory_format=torch.channels_last)
    return images, torch.randint(0, CLASSES, (batch,), generator=generator).to(device)


class Bench:
    """One batch and mode: builds the methods' steps, times them, and keeps going where one fails."""

    def __init__(self, args, base, batch, mode, device):
        self.args, self.base, self.mode, self.batch, self.device = args, base, mode, batch, device
        self.places = find_places(base)
        self.images, self.labels = make_batch(args, base, batch, device)
        self.failures = []

    def build(self, name):
        """The step, warm where it was compiled, and what is known of it before it is timed."""
        method = METHODS[name]
        torch.manual_seed(2)
        model = method.build(copy.deepcopy(self.base).to(self.device), self.places).train()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        head = sum(p.numel() for p in self.base.get_classifier().parameters())
        row = {"method": name, "kind": method.kind, "batch": self.batch, "mode": self.mode, "peak_mib": None}
        row |= {"trainable": trainable, "trainable_without_head": trainable - head}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        autocast = DTYPES[self.args.dtype] if self.args.autocast else None
        step = Step(model, self.images, self.labels, self.mode, autocast)
        if self.mode == "compile":
            counters = torch._dynamo.utils.counters
            counters.clear()
            step()
            row["graph_breaks"] = sum(counters["graph_break"].values())
            if self.device.type == "cuda":
                synchronize(self.device)
                torch.cuda.reset_peak_memory_stats()  # compiling may have tried kernels out
        return step, row

    def attempt(self, name, work):
        """`work()`, or None with a line where it raises: the other methods' figures are still wanted."""
        try:
            return work()
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip() or '(no text)'}"
            print(f"{self.batch:>5} {self.mode:<8} {name:<14} failed: {text.splitlines()[0][:200]}", flush=True)
            self.failures.append({"method": name, "batch": self.batch, "mode": self.mode, "error": text[:2000]})
            return None

    def one_by_one(self):
        """Rows with peak memory; each method has the machine to itself."""
        rows = []
        for name in self.args.methods:
            row = self.attempt(name, functools.partial(self.time_one, name))
            self.clean_up()
            if row is not None:
                rows.append(row)
                print(report.line(report.with_ratios(rows)[-1]), flush=True)
        return report.with_ratios(rows)

    def time_one(self, name):
        step, row = self.build(name)
        row |= summary(milliseconds([step], self.device, self.args.seconds)[0])
        if self.device.type == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return row

    def in_turns(self):
        """Rows of methods timed in turns."""
        built = [self.attempt(name, functools.partial(self.build, name)) for name in self.args.methods]
        built = [entry for entry in built if entry is not None]
        samples = milliseconds([step for step, _ in built], self.device, self.args.seconds)
        rows = [{**row, **summary(times)} for (_, row), times in zip(built, samples, strict=True)]
        rows = report.with_ratios(rows)
        print("\n".join(map(report.line, rows)), flush=True)
        del built
        self.clean_up()
        return rows

    def profiles(self):
        """Prints a table for each method asked for; writes it too."""
        for name in self.args.profile:
            text = self.attempt(name, lambda name=name: profile(self.build(name)[0], self.device))
            self.clean_up()
            if text is None:
                continue
            text = f"{self.args.model} {name}, batch {self.batch}, {self.mode}, {self.args.dtype}: {text}\n"
            print(text, flush=True)
            if self.args.out:
                self.args.out.mkdir(parents=True, exist_ok=True)
                (self.args.out / f"profile_{name}_{self.batch}_{self.mode}.txt").write_text(text)

    def clean_up(self):
        """Nothing of a method, nor of its compiled code, is left for the next."""
        if self.mode == "compile":
            torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def skip_peft(args):
    """Takes PEFT's methods out, with one line."""
    skipped = [name for name in [*args.methods, *(args.profile or [])] if METHODS[name].kind == "PEFT"]
    if skipped:
        print(f"peft is not installed: {', '.join(dict.fromkeys(skipped))} skipped")
        args.methods = [name for name in args.methods if name not in skipped]
        args.profile = args.profile and [name for name in args.profile if name not in skipped]


def main(argv=None):
    """Returns the exit status: 1 where a method failed."""
    args = parse_args(argv)
    device = torch.device(args.device)
    if importlib.util.find_spec("peft") is None:
        skip_peft(args)
    if "compile" in args.mode:
        # All methods' compiled code lives side by side where they take turns; beyond its limit dynamo would run eagerly
        # without a word.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True

    head = report.environment(args, device)
    weights = f"fp32 under {args.dtype} autocast" if args.autocast else args.dtype
    print(f"{args.model} {weights} on {head['machine']}, torch {head['torch']}, commit {head['commit']}", flush=True)
    base = make_model(args)
    rows, failures = [], []
    for batch in args.batch:
        for mode in args.mode:
            bench = Bench(args, base, batch, mode, device)
            if args.profile is not None:
                bench.profiles()
            else:
                rows += bench.in_turns() if args.interleave else bench.one_by_one()
            failures += bench.failures
    if args.out and args.profile is None:
        report.write(head, rows, failures, args.out)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
