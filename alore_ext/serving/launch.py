"""A server from the names of things: a backbone, a folder of adapters, limits. What the command line and Ray share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alore_ext.adapter_file import read_adapter
from alore_ext.training.backbone import BUNDLED, build_backbone, check_input, input_spec
from alore_ext.training.errors import InputError, require
from alore_ext.training.loader import InputSpec
from alore_ext.training.session import pick_device

from .errors import listing
from .reload import AdapterDirectory, ReloadReport
from .settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from . import AdapterPool

__all__ = ["DTYPES", "Server", "ServerOptions", "open_server"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_ANY_CLASSES = 2  # of the backbone's own head, which no adapter uses: each brings its own


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Settings):
    """What to serve, and how."""

    backbone: str
    adapters: str  # the folder
    pretrained: bool = False
    weights: str | None = None
    img_size: int | None = None
    device: str = "auto"
    dtype: str = "fp32"
    activate: str | None = None  # the adapter to merge into the backbone: it runs at the backbone's own speed
    graph_batches: str = ""  # "1,8,32": batch sizes to capture CUDA graphs for

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.weights is None and not self.pretrained and self.backbone != BUNDLED:
            raise InputError(f"--backbone {self.backbone}: give --pretrained or --weights FILE")
        if self.graph_sizes() and self.activate is None:
            raise InputError("--graph-batches records the merged forward: name the adapter with --activate")

    def graph_sizes(self) -> list[int]:
        """The batch sizes of `graph_batches`."""
        parts = [part.strip() for part in self.graph_batches.split(",") if part.strip()]
        if any(not part.isdecimal() or int(part) < 1 for part in parts):
            raise InputError(f"--graph-batches must be numbers like 1,8,32, got {self.graph_batches}")
        return [int(part) for part in parts]


@dataclass(frozen=True)
class Server:
    """A pool with its adapters loaded, and what it takes to answer requests from it."""

    options: ServerOptions
    pool: AdapterPool
    spec: InputSpec
    directory: AdapterDirectory
    report: ReloadReport  # which adapters were loaded, and which failed

    def app(self) -> FastAPI:
        """The ASGI application."""
        from .app import create_app

        return create_app(self.pool, self.spec, self.options, self.directory)


def open_server(options: ServerOptions) -> Server:
    """Build the backbone, and load the folder's adapters.

    Raises:
        InputError: a package is missing; the backbone, its weights or the folder cannot be used. A broken adapter
            file is no error: it is in `Server.report`.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "PIL", "timm"):
        require(package, extra="serve")
    from . import AdapterPool

    if not Path(options.adapters).is_dir():
        raise InputError(f"--adapters: there is no folder {options.adapters}")
    device = pick_device(options.device)
    if options.graph_sizes() and device.type != "cuda":
        raise InputError(f"--graph-batches needs a CUDA device, got {device}")
    model = build_backbone(
        options.backbone,
        _ANY_CLASSES,
        img_size=options.img_size,
        pretrained=options.pretrained or options.weights is None,
        weights=options.weights,
    )
    spec = input_spec(model, options.img_size)
    check_input(model, spec, _ANY_CLASSES)
    pool = AdapterPool(model, device=device, dtype=DTYPES[options.dtype])
    directory = AdapterDirectory(options.adapters, pool, _check_classifier)
    report = directory.reload()
    if options.activate is not None:
        if options.activate not in pool.names:
            reason = report.failed.get(options.activate, listing(pool.names))
            raise InputError(f"--activate: there is no adapter {options.activate}; {reason}")
        pool.activate(options.activate)
    if options.graph_sizes():
        pool.capture(options.graph_sizes())
    return Server(options, pool, spec, directory, report)


def _check_classifier(file: Path) -> None:
    if not read_adapter(file).head_tensors():
        raise ValueError("the file has no classifier; it must be saved with include_head=True to be served")
