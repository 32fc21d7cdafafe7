"""``alore-ext merge``: fold an adapter into its backbone and write a plain state dict."""

from __future__ import annotations

import argparse

from .merged import add_merged_options, write_merged


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "merge",
        help="fold an adapter into its backbone: a plain state dict of the backbone's own shape",
        description="Merge an adapter and its classifier into the backbone. timm alone loads the output: "
        "timm.create_model(NAME, num_classes=N, checkpoint_path=FILE).",
        epilog="example:\n  alore-ext merge --adapter runs/birds/adapter.safetensors --output b.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_merged_options(parser, "the merged state dict, .safetensors")
    return parser


def run(arguments: argparse.Namespace) -> int:
    return write_merged(arguments, "state-dict", "merged")
