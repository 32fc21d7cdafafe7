"""The ``alore-ext`` command: finetune, evaluate, merge, export, info, serve."""

from __future__ import annotations

import argparse
import sys

from alore_ext.training.errors import InputError, Interrupted

from . import evaluate, export, finetune, info, merge, serve

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done; 1 out of memory, or merging or exporting changed the model; 2 bad input (one line on stderr);
    130 interrupted.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except InputError as error:
        if arguments.debug:
            raise
        print(f"alore-ext {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except _out_of_memory() as error:
        if arguments.debug:
            raise
        print(
            f"alore-ext {arguments.command}: out of GPU memory: lower --batch-size or --img-size, or use "
            f"--amp bf16 ({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alore-ext",
        description="Parameter-efficient fine-tuning of vision backbones with ALoRE and MLAE.",
        epilog="`alore-ext finetune` with no arguments is a demonstration that needs no data and no GPU.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (finetune, evaluate, merge, export, info, serve):
        command = module.add_parser(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


def _out_of_memory() -> type[BaseException]:
    import torch

    return torch.OutOfMemoryError
