"""``alore-ext info``: the build, and what an adapter file holds."""

from __future__ import annotations

import argparse
from pathlib import Path

import alore_ext


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "info",
        help="the build, and what an adapter file holds",
        description="Print the build; given an adapter file, its config, sizes and base.",
    )
    parser.add_argument("adapter", nargs="?", type=Path, metavar="ADAPTER", help="an adapter file")
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.adapter is None:
        for name, value in alore_ext.build_info().items():
            print(f"{name:<14} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
        return 0
    raise NotImplementedError
