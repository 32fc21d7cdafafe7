"""What survives an interruption: atomic files, a run's checkpoint, signals that wait for the step's end."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import nn

from alore_ext._files import write_atomic

from .errors import InputError

__all__ = [
    "Log",
    "Progress",
    "StopSignals",
    "load_checkpoint",
    "save_checkpoint",
    "seed_everything",
    "write_json",
]

_FORMAT = 1


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write one JSON document, indented, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


class Log:
    """A JSON-lines file that a resumed run can cut back to where its checkpoint was written."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        with open(path, "ab"):
            pass
        os.truncate(path, min(offset, path.stat().st_size))

    def write(self, event: str, **values: object) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    @property
    def offset(self) -> int:
        return self.path.stat().st_size


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, all devices."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass
class Progress:
    """Where a run is. ``step`` counts the epoch's finished steps; sums are over those.

    ``step`` equal to the number of steps an epoch means trained but not yet evaluated.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0

    def next_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.correct, self.seen = 0.0, 0, 0


def save_checkpoint(
    path: Path,
    model: nn.Module,
    parts: dict[str, object],
    progress: Progress,
    log: Log,
    identity: dict[str, int],
) -> None:
    """Write all that a run needs to go on exactly.

    Args:
        model: its trainables and buffers are written.
        parts: name -> object with ``state_dict``: optimizer, scheduler, scaler.
        identity: numbers that must be the same when the run goes on, such as the count of training images.
    """
    numpy_state = numpy.random.get_state()
    checkpoint = {
        "format": _FORMAT,
        "identity": identity,
        "frozen": _frozen_checksum(model),
        "model": _changing(model),
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "progress": asdict(progress),
        "log_offset": log.offset,
        "random": {
            "python": random.getstate(),
            "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(numpy.int64)), *numpy_state[2:]],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        },
    }
    write_atomic(path, lambda temporary: torch.save(checkpoint, temporary))


def load_checkpoint(
    path: Path, model: nn.Module, parts: dict[str, object], identity: dict[str, int]
) -> tuple[Progress, int]:
    """Put a checkpoint back; returns the place and the log's length then.

    Raises:
        InputError: not a checkpoint of this model, method and data. Nothing has changed then.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, states, streams = checkpoint["model"], checkpoint["parts"], checkpoint["random"]
        progress, offset = Progress(**checkpoint["progress"]), checkpoint["log_offset"]
        if checkpoint["format"] != _FORMAT:
            raise InputError(f"--resume: {path} has format {checkpoint['format']}, this version reads {_FORMAT}")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--resume: {path} is not a readable checkpoint: {error!r}".splitlines()[0]) from error
    current = _changing(model)
    if {n: v.shape for n, v in saved.items()} != {n: v.shape for n, v in current.items()} or set(states) != set(parts):
        raise InputError(f"--resume: {path} is of another model or method")
    for name, value in identity.items():
        if checkpoint["identity"].get(name) != value:
            raise InputError(f"--resume: {name} was {checkpoint['identity'].get(name)} before, is {value} now")
    if not math.isclose(checkpoint["frozen"], _frozen_checksum(model), rel_tol=1e-9):
        raise InputError("--resume: the frozen weights are not those that the run began with")
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved[name])
    for name, part in parts.items():
        part.load_state_dict(states[name])
    random.setstate(streams["python"])
    kind, keys, *rest = streams["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(streams["torch"])
    if torch.cuda.is_available() and streams["cuda"]:
        torch.cuda.set_rng_state_all(streams["cuda"][: torch.cuda.device_count()])
    return progress, offset


def _changing(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes: what requires a gradient, and buffers (batch norm's statistics)."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return tensors | dict(model.named_buffers())


def _frozen_checksum(model: nn.Module) -> float:
    sums = [parameter.detach().double().abs().sum() for parameter in model.parameters() if not parameter.requires_grad]
    return torch.stack(sums).sum().item() if sums else 0.0


class StopSignals:
    """While active, the first SIGINT or SIGTERM sets ``requested``; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(f"\n{signal.Signals(number).name}: finishing the step, then writing the checkpoint", flush=True)
