"""``alore-ext evaluate``: accuracy of a run, an adapter or a plain state dict on a split."""

from __future__ import annotations

import argparse
import time

from alore_ext.training.errors import InputError
from alore_ext.training.loader import make_loader
from alore_ext.training.loop import Precision
from alore_ext.training.loop import evaluate as evaluate_model
from alore_ext.training.session import pick_device

from .loading import load_model, load_test_data, resolve
from .options import add_data_options, add_device_options, add_model_options

_EPILOG = """\
examples:
  alore-ext evaluate --out runs/birds
  alore-ext evaluate --adapter adapter.safetensors --model vit_base_patch16_224 --pretrained --data birds/
  alore-ext evaluate --model vit_base_patch16_224 --weights merged.safetensors --data birds/
"""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "evaluate",
        help="accuracy on the test split",
        epilog=_EPILOG,
        description="Accuracy of a finished run, of an adapter on its base, or of a plain (merged) model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--out", metavar="DIR", help="a finished run: model, weights and data come from its config.json"
    )
    source.add_argument("--adapter", metavar="FILE", help="an adapter; a config.json beside it fills in the rest")
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: test, or val if there is no test")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    add_device_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    device = pick_device(arguments.device)
    source = resolve(arguments)
    data = load_test_data(source)
    split = arguments.split or data.final_split
    if split not in data.splits:
        raise InputError(f"--split: {data.name} has {', '.join(data.splits)}, not {split}")
    model, spec = load_model(source, data.num_classes)
    model.to(device)
    loader = make_loader(
        data.splits[split],
        spec,
        arguments.batch_size,
        device,
        augment=source.augment,
        workers=arguments.workers,
    )
    started = time.perf_counter()
    result = evaluate_model(model, loader, Precision(arguments.amp or "off", device))
    print(
        f"{split} accuracy {100 * result.accuracy:.2f} % ({loader.count:,} images of {data.name}, "
        f"loss {result.loss:.4f}, {time.perf_counter() - started:.1f} s on {device})"
    )
    return 0
