"""``alore-ext merge``: fold an adapter into its backbone and write a plain state dict."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import alore_ext
from alore_ext._files import write_atomic
from alore_ext.training.errors import InputError
from alore_ext.training.report import human_bytes
from alore_ext.training.session import usage_errors
from alore_ext.training.state import seed_everything

from .loading import load_model, resolve
from .options import add_model_options

_PROBE_IMAGES = 8
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "merge",
        help="fold an adapter into its backbone: a plain state dict of the backbone's own shape",
        description="Merge an adapter and its classifier into the backbone. timm alone loads the output: "
        "timm.create_model(NAME, num_classes=N, checkpoint_path=FILE).",
        epilog="example:\n  alore-ext merge --adapter runs/birds/adapter.safetensors --output b.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--adapter",
        metavar="FILE",
        required=True,
        help="an adapter; a config.json beside it fills in --model and --weights",
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="the merged state dict, .safetensors")
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="fp32", help="of the written weights (default: fp32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    add_model_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    if output.suffix != ".safetensors":
        raise InputError(f"--output must end in .safetensors, got {output}")
    if output.exists() and not arguments.overwrite:
        raise InputError(f"--output: {output} exists (--overwrite replaces it)")
    if not output.parent.is_dir():
        raise InputError(f"--output: there is no folder {output.parent}")
    source = resolve(arguments)
    # load_adapter puts the file's own classifier in, whatever its size.
    model, spec = load_model(source, num_classes=len(source.class_names or (0, 1)))
    seed_everything(0)
    images = torch.randn(_PROBE_IMAGES, len(spec.mean), spec.size, spec.size)
    with torch.no_grad():
        before = model(images)
        with usage_errors():
            alore_ext.merge_and_unload(model)
        after = model(images)
    difference, largest = (after - before).abs().max().item(), before.abs().max().item()
    _write(model, source, output, _DTYPES[arguments.dtype])
    print(
        f"merged   {output} ({human_bytes(output.stat().st_size)}, {arguments.dtype}, "
        f"{before.shape[1]} classes)\n"
        f"check    largest logit difference {difference:.1e} over {_PROBE_IMAGES} random images, fp32 "
        f"(largest logit {largest:.2f})"
    )
    return 0


def _write(model: torch.nn.Module, source, output: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    state = {
        name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    metadata = {"format": "pt", "model": source.model, "alore_ext": alore_ext.__version__}
    if source.class_names is not None:
        metadata["class_names"] = json.dumps(source.class_names)
    write_atomic(output, lambda temporary: save_file(state, temporary, metadata=metadata))
