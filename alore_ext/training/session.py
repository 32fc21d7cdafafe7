"""One fine-tuning run from settings to files: build, patch, train, test, save, merge and compare."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

import alore_ext
from alore_ext._files import write_atomic

from .backbone import BUNDLED, build_backbone, check_input, input_spec
from .data import Data, load_data
from .errors import InputError, Interrupted
from .files import ADAPTER_FILE, CONFIG_FILE, MODEL_FILE, RESULT_FILE
from .loader import InputSpec, make_loader
from .loop import Evaluation, Precision, Trainer, evaluate
from .recipe import METHODS, Recipe
from .state import StopSignals, seed_everything, write_json

__all__ = [
    "ADAPTER_METHODS",
    "MergeCheck",
    "Result",
    "Settings",
    "adapter_config",
    "compare_merged",
    "pick_device",
    "run",
    "deterministic",
    "usage_errors",
]

ADAPTER_METHODS = ("alore", "mlae")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class Settings:
    """All that decides a run's result; ``config.json`` in its folder. None leaves the library's default."""

    method: str
    model: str
    data: str
    recipe: Recipe
    pretrained: bool = False
    weights: str | None = None
    img_size: int | None = None
    num_experts: int | None = None
    rank: int | None = None
    dropout: float | None = None
    locations: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = None
    augment: str = "none"
    train_split: str = "train"
    seed: int = 0
    amp: str = "off"
    eval_every: int | None = None
    checkpoint_every: int = 1

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Settings:
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for name in ("locations", "targets"):
            known[name] = None if known.get(name) is None else tuple(known[name])
        return cls(**known | {"recipe": Recipe.from_dict(values["recipe"])})


@dataclass(frozen=True)
class MergeCheck:
    """The merged model beside the unmerged one, both fp32, on the test images."""

    max_logit_difference: float
    max_logit: float
    accuracy_unmerged: float
    accuracy_merged: float
    changed_predictions: int

    @property
    def agrees(self) -> bool:
        """Whether fp32 rounding explains the difference (it is about 1e-6 of the largest logit)."""
        return self.max_logit_difference <= 1e-3 * max(1.0, self.max_logit)


@dataclass(frozen=True)
class Result:
    """What a finished run reports; ``result.json`` in its folder."""

    method: str
    trainable: int
    trainable_head: int
    total: int
    accuracy: float
    split: str
    seconds: float
    file: str
    file_bytes: int
    merge: MergeCheck | None = None

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The folder's result, or None if its run has not finished."""
        file = folder / RESULT_FILE
        if not file.exists():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            values["merge"] = values["merge"] and MergeCheck(**values["merge"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file} is damaged: {error!r}; without it --resume makes it anew") from error


def run(
    settings: Settings,
    folder: Path,
    *,
    device: torch.device,
    workers: int = 0,
    resume: bool = False,
    data: Data | None = None,
    stop: StopSignals,
) -> Result:
    """Fine-tune, test and save.

    Files: config.json, log.jsonl, checkpoint.pt, result.json, and adapter.safetensors (ALoRE, MLAE: adapters
    and classifier) or model.safetensors (linear, full: the whole model's state dict).

    Raises:
        InputError: settings that do not work together or with the data.
        Interrupted: stopped by ``stop``; the checkpoint is written.
    """
    precision = Precision(settings.amp, device)
    data = data or load_data(settings.data, settings.seed)
    if settings.train_split == "trainval":
        data = data.with_val_in_train()
    seed_everything(settings.seed)
    model = build_backbone(
        settings.model,
        data.num_classes,
        img_size=settings.img_size,
        pretrained=settings.pretrained,
        weights=settings.weights,
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    spec = input_spec(model, settings.img_size)
    check_input(model, spec, data.num_classes)
    _apply_method(model, settings)
    model.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, _config(settings, data, spec))
    loaders = _loaders(settings, data, spec, device, workers)
    trainer = Trainer(
        model,
        loaders["train"],
        loaders["curve"],
        settings.recipe,
        precision,
        folder,
        set_train_mode=_train_head_only if settings.method == "linear" else nn.Module.train,
        eval_every=settings.eval_every or max(1, settings.recipe.epochs // 10),
        checkpoint_every=settings.checkpoint_every,
        resume=resume,
        title=settings.method,
    )
    trainer.fit(stop)
    final = trainer.last_evaluation if loaders["curve"] is loaders["final"] else None
    final = final or evaluate(model, loaders["final"], precision, lambda: stop.requested, "testing")
    if final is None:
        raise Interrupted("stopped while testing the trained model")
    file = _save(model, settings, data, folder)
    merge = None
    if settings.method in ADAPTER_METHODS:
        merge = compare_merged(model, loaders["final"], device, final if settings.amp == "off" else None)
    head = {id(parameter) for parameter in _head(model).parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    result = Result(
        method=settings.method,
        trainable=sum(parameter.numel() for parameter in trainable),
        trainable_head=sum(parameter.numel() for parameter in trainable if id(parameter) in head),
        total=total,
        accuracy=final.accuracy,
        split=data.final_split,
        seconds=trainer.progress.seconds,
        file=file.name,
        file_bytes=file.stat().st_size,
        merge=merge,
    )
    trainer.log.write("end", **{f"{result.split}_accuracy": result.accuracy}, seconds=round(result.seconds, 3))
    write_json(folder / RESULT_FILE, asdict(result))
    return result


def adapter_config(settings: Settings) -> alore_ext.AloreConfig | alore_ext.MlaeConfig:
    """The method's configuration; what the settings leave open keeps the library's default."""
    if settings.method == "alore":
        kind, options = (
            alore_ext.AloreConfig,
            {
                "num_experts": settings.num_experts,
                "rank": settings.rank,
                "dropout": settings.dropout,
                "locations": settings.locations,
            },
        )
    else:
        kind, options = (
            alore_ext.MlaeConfig,
            {
                "num_experts": settings.num_experts,
                "expert_rank": settings.rank,
                "dropout": settings.dropout,
                "targets": settings.targets,
            },
        )
    with usage_errors():
        return kind(**{name: value for name, value in options.items() if value is not None})


def compare_merged(model: nn.Module, loader, device: torch.device, unmerged: Evaluation | None = None) -> MergeCheck:
    """Merge, evaluate, unmerge; fp32 both times. ``unmerged`` spares an evaluation if it was made in fp32."""
    precision = Precision("off", device)
    unmerged = unmerged or evaluate(model, loader, precision)
    alore_ext.merge_(model)
    try:
        merged = evaluate(model, loader, precision)
    finally:
        alore_ext.unmerge_(model)
    return MergeCheck(
        max_logit_difference=(merged.logits - unmerged.logits).abs().max().item(),
        max_logit=unmerged.logits.abs().max().item(),
        accuracy_unmerged=unmerged.accuracy,
        accuracy_merged=merged.accuracy,
        changed_predictions=int((merged.logits.argmax(1) != unmerged.logits.argmax(1)).sum()),
    )


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a GPU and the package has CUDA kernels.

    Raises:
        InputError: the device is not there.
    """
    if name == "auto":
        usable = torch.cuda.is_available() and alore_ext.build_info()["cuda_kernels"]
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device: {name!r} is not a device (auto, cpu, cuda, cuda:1, ...)") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {name} asked for, {torch.cuda.device_count()} CUDA devices found")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: {name!r} is not supported (cpu or cuda)")
    return device


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Same run, same bits, on CUDA too where torch has a way (CPU is so by itself); it warns where it has none.

    Enter it before CUDA is first used: cuBLAS reads its setting then.
    """
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, workspace = torch.utils.deterministic.fill_uninitialized_memory, os.environ.get(_CUBLAS)
    if on:
        os.environ.setdefault(_CUBLAS, ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: a fill for every empty
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


@contextmanager
def usage_errors() -> Iterator[None]:
    """The library's complaints about its arguments and files become the command line's."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise InputError(str(error)) from error


def _apply_method(model: nn.Module, settings: Settings) -> None:
    if settings.method not in METHODS:
        raise InputError(f"--method must be one of {', '.join(METHODS)}, got {settings.method}")
    if settings.method in ADAPTER_METHODS:
        with usage_errors():
            alore_ext.patch(model, adapter_config(settings))
    elif settings.method == "linear":
        model.requires_grad_(False)
        _head(model).requires_grad_(True)


def _head(model: nn.Module) -> nn.Module:
    """The classifier, or both of distilled DeiT."""
    head = model.get_classifier()
    return nn.ModuleList(head) if isinstance(head, (tuple, list)) else head


def _train_head_only(model: nn.Module) -> None:
    # A linear probe's features do not move: no dropout and no batch statistics in the backbone.
    model.eval()
    _head(model).train()


def _loaders(settings: Settings, data: Data, spec: InputSpec, device: torch.device, workers: int) -> dict:
    options = {"augment": settings.augment, "seed": settings.seed, "workers": workers}
    test_batch = max(64, settings.recipe.batch_size)
    loaders = {
        split: make_loader(data.splits[split], spec, test_batch, device, **options)
        for split in data.splits
        if split != "train"
    }
    train = make_loader(data.splits["train"], spec, settings.recipe.batch_size, device, train=True, **options)
    curve = loaders.get("val", loaders[data.final_split])
    return {"train": train, "curve": curve, "final": loaders[data.final_split]}


def _config(settings: Settings, data: Data, spec: InputSpec) -> dict:
    return settings.to_dict() | {
        "class_names": list(data.class_names),
        "input": {"size": spec.size, "mean": list(spec.mean), "std": list(spec.std)},
        "versions": {"alore_ext": alore_ext.__version__, "torch": torch.__version__},
        "bundled_model": settings.model == BUNDLED,
    }


def _save(model: nn.Module, settings: Settings, data: Data, folder: Path) -> Path:
    if settings.method in ADAPTER_METHODS:
        file = folder / ADAPTER_FILE
        return alore_ext.save_adapter(model, file, labels=data.class_names)  # atomic by itself
    from safetensors.torch import save_file

    file = folder / MODEL_FILE
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "model": settings.model, "method": settings.method}
    write_atomic(file, lambda temporary: save_file(state, temporary, metadata=metadata))
    return file
