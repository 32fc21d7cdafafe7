"""Options that several subcommands share, and the settings of an earlier run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from alore_ext.training.errors import InputError
from alore_ext.training.files import CONFIG_FILE
from alore_ext.training.images import AUGMENTATIONS

__all__ = [
    "add_data_options",
    "add_device_options",
    "add_model_options",
    "comma_list",
    "read_config",
    "run_folders",
]


def comma_list(text: str) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_model_options(parser: argparse.ArgumentParser, *names: str) -> argparse._ArgumentGroup:
    """Options that say which backbone; its name is ``--model`` unless ``names`` say otherwise."""
    group = parser.add_argument_group("backbone")
    group.add_argument(
        *(names or ("--model",)), dest="model", metavar="NAME", help="any timm model, or the bundled tiny_vit"
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--pretrained",
        action="store_const",
        const=True,
        help="timm's weights for the name (downloaded, cached)",
    )
    source.add_argument(
        "--weights",
        metavar="FILE",
        help=".safetensors or .pth state dict; position embeddings are resized to --img-size",
    )
    group.add_argument("--img-size", type=int, metavar="N", help="side of the square input (default: the model's own)")
    return group


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="PATH",
        help="folder with train/ and val/ or test/ of class folders; one folder of class folders (a fifth "
        "becomes the test split); .npz with x_train, y_train, x_test, y_test; or 'digits'",
    )
    group.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        help="none: resize to the input (VTAB-1k); flip: and mirror; crop: random resized crop and "
        "mirror, central crop to test (FGVC) (default: none)",
    )
    return group


def add_device_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    group.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 (default: auto)")
    group.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="processes that decode image files (default: 2; .npz needs none)",
    )
    group.add_argument("--amp", choices=("off", "bf16", "fp16"), help="autocast (default: off)")


def read_config(folder: Path) -> dict:
    """A run folder's config.json.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no run ({CONFIG_FILE} is missing)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict) or not ({"runs", "method"} & set(config)):
        raise InputError(f"{file} is not a configuration of alore-ext")
    return config


def run_folders(folder: Path, config: dict) -> dict[str, Path]:
    """method -> folder: one for a single run, a subfolder each for several."""
    if "runs" in config:
        return {method: folder / method for method in config["runs"]}
    return {config["method"]: folder}
