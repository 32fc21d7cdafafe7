"""``alore-ext finetune``: train one method or compare several, on one's own data or as a demonstration."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from alore_ext.training.data import Data, load_data
from alore_ext.training.errors import Interrupted, require
from alore_ext.training.files import CHECKPOINT_FILE, PLOT_FILE
from alore_ext.training.recipe import METHODS, default_recipe
from alore_ext.training.report import TITLES, describe_merge, human_bytes, plot, table
from alore_ext.training.session import Result, Settings, deterministic, pick_device
from alore_ext.training.session import run as run_session
from alore_ext.training.state import StopSignals

from .options import (
    add_data_options,
    add_device_options,
    add_model_options,
    comma_list,
    read_config,
    run_folders,
)
from .planning import plan_runs, saved_runs, start_folder

_DEMO_FOLDER = Path("runs/demo")
_EPILOG = """\
With no arguments it is a demonstration: a small ViT that ships with the package learns scikit-learn's
digits by four methods, side by side. The papers' recipes are the defaults: AdamW, warm-up, cosine, and
{recipes}
The best learning rate depends on the task: ALoRE's authors pick from 0.05, 0.01, 0.005 and 0.001 on val.
MLAE's authors train 300 to 500 epochs.

examples:
  alore-ext finetune
  alore-ext finetune --model vit_base_patch16_224 --pretrained --data birds/ --method alore --out runs/birds
  alore-ext finetune --model vit_small_patch14_dinov2 --weights dinov2.safetensors --img-size 112 \\
      --data cifar10.npz --method linear,alore,mlae --epochs 60 --amp bf16 --out runs/cifar
  alore-ext finetune --resume --out runs/birds
"""
_AFTER_THE_DEMO = """\
         your own images:
           alore-ext finetune --model vit_base_patch16_224 --pretrained --data FOLDER --method alore --out DIR
         your own training script:
           import alore_ext as ae
           ae.patch(model, ae.AloreConfig())  # then train as before: only adapters and classifier change
           ae.save_adapter(model, "adapter.safetensors"); ae.merge_and_unload(model)\
"""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "finetune",
        help="train adapters (or a linear probe, or the whole model) on labelled images",
        description="Fine-tune a backbone and save a small adapter file.",
        epilog=_EPILOG.format(recipes="\n".join(map(_recipe_line, METHODS))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser).add_argument(
        "--random-init",
        action="store_true",
        help="accept a backbone without pretrained weights (for --method full, or to try things)",
    )
    add_data_options(parser).add_argument(
        "--train-split",
        choices=("train", "trainval"),
        help="trainval: also train on val, for a final run (VTAB-1k's protocol)",
    )
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        type=comma_list,
        metavar="M[,M...]",
        help=f"{', '.join(METHODS)}; several are compared, each in its own subfolder of --out "
        "(default: alore; the demonstration: all)",
    )
    method.add_argument("--num-experts", type=int, metavar="N", help="experts (alore 4, mlae 8)")
    method.add_argument("--rank", type=int, metavar="R", help="rank of an expert (alore 4, mlae 1)")
    method.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help="alore: on the branch (0); mlae: probability of masking an expert (0.5)",
    )
    method.add_argument("--locations", type=comma_list, metavar="L,L", help="alore: before_attn,before_ffn,...")
    method.add_argument("--targets", type=comma_list, metavar="T,T", help="mlae: qkv,proj,fc1,fc2")
    recipe = parser.add_argument_group("recipe", "Defaults depend on the method, see below.")
    recipe.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    recipe.add_argument("--batch-size", type=int, metavar="N", help="images a step")
    recipe.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    recipe.add_argument(
        "--weight-decay", type=float, metavar="X", help="not applied to biases, norms and other vectors"
    )
    recipe.add_argument("--warmup-epochs", type=float, metavar="N", help="linear warm-up, then cosine to zero")
    recipe.add_argument("--label-smoothing", type=float, metavar="X", help="default: 0")
    recipe.add_argument("--seed", type=int, metavar="N", help="of everything random (default: 0)")
    recipe.add_argument("--eval-every", type=int, metavar="N", help="epochs between evaluations (default: ten a run)")
    add_device_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help=f"where everything goes (the demonstration: {_DEMO_FOLDER})")
    output.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    output.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    output.add_argument("--checkpoint-every", type=int, metavar="N", help="epochs between checkpoints (default: 1)")
    output.add_argument(
        "--no-deterministic",
        action="store_true",
        help="let CUDA use faster kernels whose results vary in the last bits",
    )
    return parser


def _recipe_line(method: str) -> str:
    recipe = default_recipe(method)
    return (
        f"  {method:<7} lr {recipe.lr:g}, weight decay {recipe.weight_decay:g}, batch {recipe.batch_size}, "
        f"{recipe.epochs} epochs, warm-up {recipe.warmup_epochs:g}"
    )


def run(arguments: argparse.Namespace) -> int:
    for package in ("timm", "tqdm", "matplotlib"):
        require(package)  # now, not when the plot is due
    device = pick_device(arguments.device)
    out = Path(arguments.out or _DEMO_FOLDER)
    runs = saved_runs(arguments, out) if arguments.resume else plan_runs(arguments)
    first = next(iter(runs.values()))
    data = load_data(first.data, first.seed)
    if not arguments.resume:
        start_folder(out, runs, overwrite=arguments.overwrite or arguments.out is None)
    sizes = ", ".join(f"{len(members):,} {name}" for name, members in data.splits.items())
    print(f"{first.model} on {data.name} ({data.num_classes} classes; {sizes}), on {device}", flush=True)
    folders = run_folders(out, read_config(out))
    started = time.perf_counter()
    results = []
    with deterministic(not arguments.no_deterministic), StopSignals() as stop:
        for method, settings in runs.items():
            try:
                results.append(_run_or_read(settings, folders[method], arguments, data, device, stop))
            except Interrupted as stopped:
                where = "" if arguments.out is None else f" --out {out}"
                raise Interrupted(f"{method}: {stopped}. To go on: alore-ext finetune --resume{where}") from None
    _report(results, folders, out, time.perf_counter() - started)
    if arguments.out is None:
        print(_AFTER_THE_DEMO)
    wrong = [TITLES[result.method] for result in results if result.merge and not result.merge.agrees]
    if wrong:
        print(f"alore-ext finetune: merging changed {' and '.join(wrong)}: please report this", file=sys.stderr)
        return 1
    return 0


def _run_or_read(
    settings: Settings,
    folder: Path,
    arguments: argparse.Namespace,
    data: Data,
    device: torch.device,
    stop: StopSignals,
) -> Result:
    """The folder's result if its run has finished, else run it, from its checkpoint on with --resume."""
    return Result.read(folder) or run_session(
        settings,
        folder,
        device=device,
        workers=arguments.workers,
        resume=arguments.resume and (folder / CHECKPOINT_FILE).exists(),
        data=data,
        stop=stop,
    )


def _report(results: list[Result], folders: dict[str, Path], out: Path, seconds: float) -> None:
    plot(folders, results, out / PLOT_FILE)
    head = f"{results[0].trainable_head:,}"
    print(f"\n{table(results)}\n(the classifier's {head} parameters are counted in each)\n")
    print(f"plot     {out / PLOT_FILE}")
    for result in results:
        file = folders[result.method] / result.file
        kind = "adapter" if result.merge else "model"
        print(f"{kind:<8} {file} ({human_bytes(result.file_bytes)}, {TITLES[result.method]})")
    for result in results:
        if result.merge:
            print(f"merged   {TITLES[result.method]}: {describe_merge(result.merge)}")
    adapters = [folders[result.method] / result.file for result in results if result.merge]
    print(f"done in {seconds:.0f} s")
    if adapters:
        print(
            f"\nnext     alore-ext info {adapters[0]}\n"
            f"         alore-ext evaluate --adapter {adapters[0]}\n"
            f"         alore-ext merge --adapter {adapters[0]} --output {out / 'merged.safetensors'}"
        )
