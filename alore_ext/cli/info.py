"""``alore-ext info``: the build, and what an adapter file holds."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path

import torch

import alore_ext
from alore_ext.adapter_file import AdapterFile, read_adapter
from alore_ext.training.report import human_bytes
from alore_ext.training.session import usage_errors


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "info",
        help="the build, and what an adapter file holds",
        description="Print the build; given an adapter file, its configuration, sizes and base instead.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="ADAPTER", help="an adapter file")
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="the same, as the other commands take it")
    return parser


def run(arguments: argparse.Namespace) -> int:
    path = arguments.adapter or arguments.file
    if path is None:
        _print_rows(_build_rows())
        return 0
    with usage_errors():
        file = read_adapter(path)
    _print_rows(_adapter_rows(path, file))
    return 0


def _build_rows() -> list[tuple[str, str]]:
    rows = [(name, _text(value)) for name, value in alore_ext.build_info().items()]
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [*rows, ("GPUs found", ", ".join(devices) or "none")]


def _adapter_rows(path: Path, file: AdapterFile) -> list[tuple[str, str]]:
    head = file.head_tensors()
    adapters = {name: tensor for name, tensor in file.tensors.items() if name not in head}
    rows = [("file", f"{path} ({human_bytes(path.stat().st_size)})"), ("family", file.family)]
    for config in file.configs:
        fields = config.to_dict()
        method = fields.pop("method")
        rows.append(("method", f"{method}: " + ", ".join(f"{name}={_text(v)}" for name, v in fields.items())))
    rows.append(("adapters", _count(adapters)))
    rows.append(("head", f"{', '.join(file.head_names)}: {_count(head)}" if head else "not in the file"))
    if file.labels:
        rows.append(
            ("classes", _text(file.labels[:5]) + (f" and {len(file.labels) - 5} more" if file.labels[5:] else ""))
        )
    parameters = sum(math.prod(shape) for shape, _ in file.base.values())
    digest = hashlib.sha256(json.dumps(file.base, sort_keys=True).encode()).hexdigest()[:16]
    rows.append(("base", f"{len(file.base)} tensors, {parameters:,} numbers, fingerprint {digest}"))
    return rows


def _count(tensors: dict[str, torch.Tensor]) -> str:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    total = sum(tensor.numel() for tensor in tensors.values())
    return f"{total:,} parameters in {len(tensors)} tensors, {', '.join(dtypes)}"


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
