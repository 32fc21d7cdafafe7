"""``alore-ext finetune``: train one method or compare several, on one's own data or as a demonstration."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace
from pathlib import Path

from alore_ext.training.backbone import BUNDLED
from alore_ext.training.data import load_data
from alore_ext.training.errors import InputError, Interrupted, require
from alore_ext.training.recipe import METHODS, Recipe, default_recipe, demo_recipe
from alore_ext.training.session import (
    ADAPTER_METHODS,
    CONFIG_FILE,
    RESULT_FILE,
    Result,
    Settings,
    pick_device,
    use_deterministic,
)
from alore_ext.training.session import run as run_session
from alore_ext.training.state import StopSignals, write_json

from .options import (
    add_data_options,
    add_device_options,
    add_model_options,
    comma_list,
    read_config,
    run_folders,
)

_DEMO_FOLDER = "alore_demo"
_PLOT_FILE = "curves.png"
_EPILOG = """\
With no arguments it is a demonstration: a small ViT that ships with the package learns scikit-learn's
digits by four methods, side by side. The papers' recipes are the defaults:
  alore   AdamW, lr 0.005, weight decay 0.01, batch 32, 100 epochs, warm-up 10, 4 experts of rank 4
  mlae    AdamW, lr 0.0005, weight decay 0.0001, batch 64, 100 epochs, warm-up 10, 8 experts, p 0.5
          (the paper trains 300 to 500 epochs)
  linear  lr 0.005, weight decay 0.0001      full  lr 0.0001, weight decay 0.05
The best learning rate depends on the task: ALoRE's authors pick from 0.05, 0.01, 0.005 and 0.001 on val.

examples:
  alore-ext finetune
  alore-ext finetune --model vit_base_patch16_224 --pretrained --data birds/ --method alore --out runs/birds
  alore-ext finetune --model vit_small_patch14_dinov2 --weights dinov2.safetensors --img-size 112 \\
      --data cifar10.npz --method linear,alore,mlae --epochs 60 --amp bf16 --out runs/cifar
  alore-ext finetune --resume --out runs/birds
"""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "finetune",
        help="train adapters (or a linear probe, or the whole model) on labelled images",
        description="Fine-tune a backbone and save a small adapter file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--random-init",
        action="store_true",
        help="accept a backbone without pretrained weights (for --method full, or to try things)",
    )
    add_data_options(parser)
    parser.add_argument(
        "--train-split",
        choices=("train", "trainval"),
        help="trainval: also train on val, for a final run (VTAB-1k's protocol)",
    )
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        type=comma_list,
        metavar="M[,M...]",
        help=f"{', '.join(METHODS)}; several are compared, each in its own subfolder of --out",
    )
    method.add_argument("--num-experts", type=int, metavar="N", help="experts (alore 4, mlae 8)")
    method.add_argument("--rank", type=int, metavar="R", help="rank of an expert (alore 4, mlae 1)")
    method.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help="alore: on the branch (0); mlae: probability of masking an expert (0.5)",
    )
    method.add_argument(
        "--locations", type=comma_list, metavar="L,L", help="alore: before_attn,before_ffn,..."
    )
    method.add_argument("--targets", type=comma_list, metavar="T,T", help="mlae: qkv,proj,fc1,fc2")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, metavar="N")
    recipe.add_argument("--batch-size", type=int, metavar="N")
    recipe.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    recipe.add_argument(
        "--weight-decay", type=float, metavar="X", help="not applied to biases, norms and other vectors"
    )
    recipe.add_argument(
        "--warmup-epochs", type=float, metavar="N", help="linear warm-up, then cosine to zero"
    )
    recipe.add_argument("--label-smoothing", type=float, metavar="X")
    recipe.add_argument("--seed", type=int, metavar="N")
    recipe.add_argument(
        "--eval-every", type=int, metavar="N", help="epochs between evaluations (default: ten a run)"
    )
    add_device_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="DIR", help=f"where everything goes (the demonstration: {_DEMO_FOLDER})"
    )
    output.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    output.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    output.add_argument(
        "--checkpoint-every", type=int, metavar="N", help="epochs between checkpoints (default: 1)"
    )
    output.add_argument(
        "--no-deterministic",
        action="store_true",
        help="let CUDA use faster kernels whose results vary in the last bits",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    for package in ("timm", "tqdm", "matplotlib"):
        require(package)  # now, not when the plot is due
    use_deterministic(not arguments.no_deterministic)
    device = pick_device(arguments.device)
    out = Path(arguments.out or _DEMO_FOLDER)
    if arguments.resume:
        runs = _saved_runs(arguments, out)
    else:
        runs = _new_runs(arguments, out)
    demo = arguments.out is None
    first = next(iter(runs.values()))
    data = load_data(first.data, first.seed)
    sizes = ", ".join(f"{len(members):,} {name}" for name, members in data.splits.items())
    print(f"{first.model} on {data.name} ({data.num_classes} classes; {sizes}), on {device}")
    folders = run_folders(out, read_config(out))
    results = []
    started = time.perf_counter()
    with StopSignals() as stop:
        for method, settings in runs.items():
            result = Result.read(folders[method])
            if result is None:
                has_checkpoint = (folders[method] / "checkpoint.pt").exists()
                try:
                    result = run_session(
                        settings,
                        folders[method],
                        device=device,
                        workers=arguments.workers,
                        resume=arguments.resume and has_checkpoint,
                        data=data,
                        stop=stop,
                    )
                except Interrupted as stopped:
                    where = "" if demo else f" --out {out}"
                    raise Interrupted(
                        f"{method}: {stopped}. To go on: alore-ext finetune --resume{where}"
                    ) from None
            results.append(result)
    _report(runs, results, folders, out, demo, time.perf_counter() - started)
    return 0


def _new_runs(arguments: argparse.Namespace, out: Path) -> dict[str, Settings]:
    """Settings of every method asked for, written to ``out``."""
    if arguments.data is not None and arguments.out is None:
        raise InputError("--data needs --out DIR, a folder for the adapter, the log and the checkpoint")
    runs = {method: _settings(arguments, method) for method in _methods(arguments)}
    load_data(next(iter(runs.values())).data)  # complain about the data before anything is written
    if (out / CONFIG_FILE).exists():
        if not (arguments.overwrite or arguments.out is None):
            raise InputError(f"{out} holds a run already: --resume goes on with it, --overwrite replaces it")
        _remove_run(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists and is not an empty folder or a run of alore-ext")
    out.mkdir(parents=True, exist_ok=True)
    if len(runs) == 1:
        write_json(out / CONFIG_FILE, next(iter(runs.values())).to_dict())
    else:
        for method, settings in runs.items():
            (out / method).mkdir(exist_ok=True)
            write_json(out / method / CONFIG_FILE, settings.to_dict())
        write_json(out / CONFIG_FILE, {"runs": list(runs)})
    return runs


def _saved_runs(arguments: argparse.Namespace, out: Path) -> dict[str, Settings]:
    """Settings of the run in ``out``; options given beside --resume must agree with them."""
    folders = run_folders(out, read_config(out))
    runs = {method: Settings.from_dict(read_config(folder)) for method, folder in folders.items()}
    if arguments.method is not None and tuple(arguments.method) != tuple(runs):
        raise InputError(
            f"--resume: the run in {out} is of {','.join(runs)}, not {','.join(arguments.method)}"
        )
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
        raise InputError(
            f"--method takes {', '.join(METHODS)} (commas between), got {','.join(methods) or 'nothing'}"
        )
    return tuple(methods)


def _settings(arguments: argparse.Namespace, method: str) -> Settings:
    given = _given(arguments)
    model = given.setdefault("model", BUNDLED)
    data = given.setdefault("data", "digits")
    if model == BUNDLED and "weights" not in given and not arguments.random_init:
        given["pretrained"] = True
    if not (given.get("pretrained") or given.get("weights") or arguments.random_init):
        raise InputError(
            f"--model {model}: give --pretrained, --weights FILE, or --random-init if that is meant"
        )
    recipe = (demo_recipe if (model, data) == (BUNDLED, "digits") else default_recipe)(method)
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
            raise InputError(
                f"--{name.replace('_', '-')} is for {' and '.join(methods)}, not {settings.method}"
            )
        settings = replace(settings, **{name: None})
    return settings


def _given(arguments: argparse.Namespace) -> dict:
    """The options that were given and decide the result; paths absolute, so that a resumed run finds them."""
    names = [
        field.name for field in (*fields(Settings), *fields(Recipe)) if field.name not in ("method", "recipe")
    ]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name in ("weights", "data"):
        if name in given and given[name] != "digits":
            given[name] = str(Path(given[name]).absolute())
    return given


def _remove_run(out: Path) -> None:
    """Take an earlier run's files away, and nothing else that lies in the folder."""
    for folder in run_folders(out, read_config(out)).values():
        for name in (
            CONFIG_FILE,
            RESULT_FILE,
            "log.jsonl",
            "checkpoint.pt",
            "adapter.safetensors",
            "model.safetensors",
            _PLOT_FILE,
        ):
            (folder / name).unlink(missing_ok=True)
        if folder != out and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for name in (CONFIG_FILE, _PLOT_FILE):
        (out / name).unlink(missing_ok=True)


def _report(
    runs: dict[str, Settings],
    results: list[Result],
    folders: dict[str, Path],
    out: Path,
    demo: bool,
    seconds: float,
) -> None:
    from alore_ext.training.report import TITLES, describe_merge, human_bytes, plot, table

    plot(folders, results, out / _PLOT_FILE)
    print(f"\n{table(results)}\n\nplot     {out / _PLOT_FILE}")
    for result in results:
        file = folders[result.method] / result.file
        kind = "adapter" if result.merge else "model"
        print(f"{kind:<8} {file} ({human_bytes(result.file_bytes)}, {TITLES[result.method]})")
    for result in results:
        if result.merge:
            print(f"merged   {TITLES[result.method]}: {describe_merge(result.merge)}")
    adapters = [result for result in results if result.merge]
    if adapters:
        file = folders[adapters[-1].method] / adapters[-1].file
        print(
            f"\nnext     alore-ext evaluate --adapter {file}\n"
            f"         alore-ext merge --adapter {file} --output {out / 'merged.safetensors'}"
        )
    if demo:
        print(
            "         your own images: alore-ext finetune --model vit_base_patch16_224 --pretrained "
            "--data FOLDER --method alore --out DIR\n"
            "         in your own training script: import alore_ext as ae; ae.patch(model, ae.AloreConfig())"
        )
    print(f"\ndone in {seconds:.0f} s")
