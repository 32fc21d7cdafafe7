"""What ``merge`` and ``export`` share: their options, and writing the merged model of a run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import alore_ext
from alore_ext.exporting import SUFFIXES
from alore_ext.training.errors import InputError
from alore_ext.training.report import human_bytes
from alore_ext.training.session import usage_errors
from alore_ext.training.state import seed_everything

from .loading import load_model, resolve
from .options import add_model_options

__all__ = ["add_merged_options", "write_merged"]

_PROBE_IMAGES = 8
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_merged_options(parser: argparse.ArgumentParser, output_help: str) -> None:
    parser.add_argument(
        "--adapter",
        metavar="FILE",
        required=True,
        help="an adapter; a config.json beside it fills in --model and --weights",
    )
    parser.add_argument("--output", metavar="FILE", required=True, help=output_help)
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="fp32", help="of the written weights (default: fp32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    add_model_options(parser)


def write_merged(
    arguments: argparse.Namespace,
    format: str,
    done: str,
    *,
    batch_size: int | None = None,
    opset: int | None = None,
    check: bool = True,
) -> int:
    """Merge the adapter into its base in fp32, check that it is the same model, and write it in ``--dtype``.

    Args:
        format: of `alore_ext.export`.
        done: the word for what was done with the model.
        batch_size: the number of images that a graph takes; None for any.
        opset, check: as of `alore_ext.export`.

    Returns:
        The exit code: 1 where the file does not compute what the merged model does.

    Raises:
        InputError: an option, an adapter or a base that cannot be used, or a package that is missing.
    """
    output = _output_file(arguments, format)
    source = resolve(arguments)
    # load_adapter puts the file's own classifier in, whatever its size.
    model, spec = load_model(source, num_classes=len(source.class_names or (0, 1)))
    seed_everything(0)
    images = torch.randn(batch_size or _PROBE_IMAGES, len(spec.mean), spec.size, spec.size)
    with torch.no_grad():
        before = model(images)
        with usage_errors():
            alore_ext.merge_and_unload(model)
        after = model(images)
    difference, largest = (after - before).abs().max().item(), before.abs().max().item()
    metadata = {"model": source.model, "input": json.dumps({"size": spec.size, "mean": spec.mean, "std": spec.std})}
    if source.class_names is not None:
        metadata["class_names"] = json.dumps(source.class_names)
    try:
        with usage_errors():
            alore_ext.export(
                model.to(_DTYPES[arguments.dtype]),
                output,
                format,
                example_input=images,
                dynamic_batch=batch_size is None,
                opset=opset,
                check=check,
                metadata=metadata,
            )
    except ImportError as error:
        raise InputError(str(error)) from error
    except alore_ext.VerificationError as error:
        print(f"alore-ext {arguments.command}: {error}", file=sys.stderr)
        return 1
    print(
        f"{done:<8} {output} ({human_bytes(output.stat().st_size)}, {arguments.dtype}, {before.shape[1]} classes)\n"
        f"check    largest logit difference {difference:.1e} over {len(images)} random images, fp32 "
        f"(largest logit {largest:.2f})"
    )
    return 0


def _output_file(arguments: argparse.Namespace, format: str) -> Path:
    """Where to write. Raises InputError, before anything is loaded, where it cannot or must not be."""
    output = Path(arguments.output)
    if output.suffix != SUFFIXES[format]:
        raise InputError(f"--output must end in {SUFFIXES[format]}, got {output}")
    if output.exists() and not arguments.overwrite:
        raise InputError(f"--output: {output} exists (--overwrite replaces it)")
    if not output.parent.is_dir():
        raise InputError(f"--output: there is no folder {output.parent}")
    return output
