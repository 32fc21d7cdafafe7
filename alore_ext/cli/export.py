"""``alore-ext export``: fold an adapter into its backbone and write a graph that needs no alore_ext to run."""

from __future__ import annotations

import argparse

from alore_ext.exporting import SUFFIXES
from alore_ext.training.errors import InputError

from .merged import add_merged_options, write_merged

_EPILOG = """\
examples:
  alore-ext export --adapter runs/birds/adapter.safetensors --format onnx --output birds.onnx
  alore-ext export --adapter runs/birds/adapter.safetensors --output birds.pt2 --dtype bf16
"""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "export",
        help="fold an adapter into its backbone: a torch.export program, an ONNX graph or a state dict",
        description="Merge an adapter and its classifier into the backbone, and write a file that runs without "
        "alore_ext: by torch alone, by an ONNX runtime, or in the backbone's own class. Preprocessing (size, mean and "
        "std) and class names are in the file's metadata.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="torch-export", help="default: torch-export")
    add_merged_options(parser, f"the file: {', '.join(f'{suffix} ({name})' for name, suffix in SUFFIXES.items())}")
    parser.add_argument("--batch-size", type=int, metavar="N", help="the graph takes N images (default: any number)")
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX (default: torch's)")
    parser.add_argument("--no-check", action="store_true", help="do not run the file to compare it with the model")
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch_size is not None:
        if arguments.format == "state-dict":
            raise InputError("--batch-size is for graphs, and a state dict is none")
        if arguments.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    return write_merged(
        arguments,
        arguments.format,
        "exported",
        batch_size=arguments.batch_size,
        opset=arguments.opset,
        check=not arguments.no_check,
    )
