"""From the command line's options to the settings of every run, and back from an earlier run's folder."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from alore_ext.training.backbone import BUNDLED
from alore_ext.training.errors import InputError
from alore_ext.training.files import (
    ADAPTER_FILE,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    LOG_FILE,
    MODEL_FILE,
    PLOT_FILE,
    RESULT_FILE,
)
from alore_ext.training.recipe import DEMO_MLAE_DROPOUT, METHODS, Recipe, default_recipe, demo_recipe
from alore_ext.training.session import ADAPTER_METHODS, Settings
from alore_ext.training.state import write_json

from .options import read_config, run_folders

__all__ = ["plan_runs", "saved_runs", "start_folder"]


def plan_runs(arguments: argparse.Namespace) -> dict[str, Settings]:
    """Settings of every method asked for.

    Raises:
        InputError: options that are missing, out of range or for another method.
    """
    if arguments.data is not None and arguments.out is None:
        raise InputError("--data needs --out DIR, a folder for the adapter, the log and the checkpoint")
    return {method: _settings(arguments, method) for method in _methods(arguments)}


def start_folder(out: Path, runs: dict[str, Settings], overwrite: bool) -> None:
    """Make ``out`` ready for new runs: an earlier run's files go, if they may, and nothing else does.

    Raises:
        InputError: ``out`` holds what may not be replaced.
    """
    if (out / CONFIG_FILE).exists():
        folders = run_folders(out, read_config(out)).values()
        began = any((folder / name).exists() for folder in folders for name in (CHECKPOINT_FILE, RESULT_FILE))
        if began and not overwrite:
            raise InputError(f"{out} holds a run already: --resume goes on with it, --overwrite replaces it")
        _remove_run(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists and is not an empty folder or a run of alore-ext")
    out.mkdir(parents=True, exist_ok=True)
    if len(runs) > 1:
        write_json(out / CONFIG_FILE, {"runs": list(runs)})
    for method, settings in runs.items():
        folder = out / method if len(runs) > 1 else out
        folder.mkdir(exist_ok=True)
        write_json(folder / CONFIG_FILE, settings.to_dict())


def saved_runs(arguments: argparse.Namespace, out: Path) -> dict[str, Settings]:
    """Settings of the runs in ``out``.

    Raises:
        InputError: there are none, or an option given beside --resume disagrees with them.
    """
    folders = run_folders(out, read_config(out))
    runs = {method: Settings.from_dict(read_config(folder)) for method, folder in folders.items()}
    if arguments.method is not None and tuple(arguments.method) != tuple(runs):
        raise InputError(f"--resume: the run in {out} is of {','.join(runs)}, not {','.join(arguments.method)}")
    for settings in runs.values():
        saved = settings.to_dict() | settings.recipe.to_dict()
        for name, value in _given(arguments).items():
            if saved[name] != value:
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"--resume goes on with the run's own {option} ({saved[name]}), not {value}: leave it out"
                )
    return runs


def _methods(arguments: argparse.Namespace) -> tuple[str, ...]:
    methods = arguments.method
    if methods is None:
        methods = METHODS if arguments.data is None else ("alore",)
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) != len(methods):
        raise InputError(f"--method takes {', '.join(METHODS)} (commas between), got {','.join(methods) or 'nothing'}")
    return tuple(methods)


def _settings(arguments: argparse.Namespace, method: str) -> Settings:
    given = _given(arguments)
    model = given.setdefault("model", BUNDLED)
    data = given.setdefault("data", "digits")
    if model == BUNDLED and "weights" not in given and not arguments.random_init:
        given["pretrained"] = True
    if not (given.get("pretrained") or given.get("weights") or arguments.random_init):
        raise InputError(f"--model {model}: give --pretrained, --weights FILE, or --random-init if that is meant")
    demo = (model, data) == (BUNDLED, "digits")
    if demo and method == "mlae":
        given.setdefault("dropout", DEMO_MLAE_DROPOUT)
    recipe = (demo_recipe if demo else default_recipe)(method)
    recipe = recipe.override(**{field.name: given.pop(field.name, None) for field in fields(Recipe)})
    for name, minimum in (("eval_every", 1), ("checkpoint_every", 1), ("img_size", 1), ("seed", 0)):
        if given.get(name, minimum) < minimum:
            raise InputError(f"--{name.replace('_', '-')} must be at least {minimum}, got {given[name]}")
    if arguments.workers < 0:
        raise InputError(f"--workers must be at least 0, got {arguments.workers}")
    return _without_other_methods_options(Settings(method=method, recipe=recipe, **given), arguments)


def _without_other_methods_options(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """Options of an adapter method go to those methods alone; given for none of them, they are a mistake."""
    owners = {
        "num_experts": ADAPTER_METHODS,
        "rank": ADAPTER_METHODS,
        "dropout": ADAPTER_METHODS,
        "locations": ("alore",),
        "targets": ("mlae",),
    }
    for name, methods in owners.items():
        if getattr(settings, name) is None or settings.method in methods:
            continue
        if not set(methods) & set(_methods(arguments)):
            raise InputError(f"--{name.replace('_', '-')} is for {' and '.join(methods)}, not {settings.method}")
        settings = replace(settings, **{name: None})
    return settings


def _given(arguments: argparse.Namespace) -> dict:
    """The options that were given and decide the result; paths absolute, so that a resumed run finds them."""
    names = [field.name for field in (*fields(Settings), *fields(Recipe)) if field.name not in ("method", "recipe")]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name in ("weights", "data"):
        if name in given and given[name] != "digits":
            given[name] = str(Path(given[name]).absolute())
    return given


def _remove_run(out: Path) -> None:
    """Take an earlier run's files away, and nothing else that lies in the folder."""
    for folder in run_folders(out, read_config(out)).values():
        for name in (CONFIG_FILE, RESULT_FILE, LOG_FILE, CHECKPOINT_FILE, ADAPTER_FILE, MODEL_FILE):
            (folder / name).unlink(missing_ok=True)
        if folder != out and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for name in (CONFIG_FILE, PLOT_FILE):
        (out / name).unlink(missing_ok=True)
