"""Train and evaluate one model: the same code for every method."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import InputError, Interrupted, require
from .files import CHECKPOINT_FILE, LOG_FILE
from .loader import Loader
from .recipe import Recipe, learning_rate_factor, make_optimizer
from .state import Log, Progress, StopSignals, load_checkpoint, save_checkpoint

__all__ = ["Evaluation", "Precision", "Trainer", "evaluate"]

_AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_SYNC_EVERY_SECONDS = 0.5  # how often the bar's figures are fetched from the device


@dataclass(frozen=True)
class Precision:
    """``amp``: "off" (fp32), "bf16" or "fp16" autocast; weights and optimizer stay fp32."""

    amp: str
    device: torch.device

    def __post_init__(self) -> None:
        if self.amp not in _AMP_DTYPES:
            raise InputError(f"--amp must be one of {', '.join(_AMP_DTYPES)}, got {self.amp}")
        if self.amp == "fp16" and self.device.type != "cuda":
            raise InputError("--amp fp16 needs a CUDA device; bf16 works on CPU too")

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = _AMP_DTYPES[self.amp]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, fraction correct, and the logits float32 [count, num_classes] on CPU."""

    loss: float
    accuracy: float
    logits: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    stop: Callable[[], bool] = lambda: False,
    title: str = "evaluating",
) -> Evaluation | None:
    """Run the model over a split in eval mode and leave its mode as it was.

    ``stop`` is asked after every batch; once it says True the result is None.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    chunks, labels = [], []
    try:
        batches = require("tqdm").tqdm(loader.batches(), title, len(loader), leave=False, delay=3)
        for images, target in batches:
            with precision.autocast():
                logits = model(images)
            chunks.append(logits.float())
            labels.append(target)
            if stop():
                return None
    finally:
        for module in was_training:
            module.training = True
    logits, target = torch.cat(chunks), torch.cat(labels)
    loss = nn.functional.cross_entropy(logits, target).item()
    accuracy = (logits.argmax(1) == target).sum().item() / len(target)
    return Evaluation(loss, accuracy, logits.cpu())


class Trainer:
    """One run of one method: steps, evaluations, log and checkpoints, resumable at any step.

    Args:
        model: on its device, requires_grad set. ``set_train_mode(model)`` puts it into training mode.
        eval_loader: what the curve is drawn from. It chooses nothing: the last epoch's model is the result.
        folder: gets log.jsonl and checkpoint.pt.
        resume: go on from the folder's checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Loader,
        eval_loader: Loader,
        recipe: Recipe,
        precision: Precision,
        folder: Path,
        *,
        set_train_mode: Callable[[nn.Module], object],
        eval_every: int,
        checkpoint_every: int = 1,
        resume: bool = False,
        title: str = "",
    ) -> None:
        self.model, self.recipe, self.precision = model, recipe, precision
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.set_train_mode, self.title = set_train_mode, title
        self.eval_every, self.checkpoint_every = eval_every, checkpoint_every
        self.steps_per_epoch = len(train_loader)
        self.optimizer = make_optimizer(model, recipe)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, self.steps_per_epoch, recipe)
        )
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.amp == "fp16")
        self.checkpoint = folder / CHECKPOINT_FILE
        self.last_evaluation: Evaluation | None = None
        self.progress, offset = Progress(), 0
        if resume:
            self.progress, offset = load_checkpoint(self.checkpoint, model, self._parts, self._identity)
        self.log = Log(folder / LOG_FILE, offset)

    @property
    def _parts(self) -> dict[str, object]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    @property
    def _identity(self) -> dict[str, int]:
        return {
            "training images": self.train_loader.count,
            "batch size": self.recipe.batch_size,
            "epochs": self.recipe.epochs,
        }

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.checkpoint, self.model, self._parts, self.progress, self.log, self._identity)

    def fit(self, stop: StopSignals) -> None:
        """Train to the last epoch.

        Raises:
            Interrupted: ``stop`` was requested; the checkpoint is written.
            InputError: the loss is not finite.
        """
        total = self.recipe.epochs * self.steps_per_epoch
        done = self.progress.epoch * self.steps_per_epoch + self.progress.step
        interval = 0.25 if sys.stderr.isatty() else 10  # a log file wants no thousand lines
        with require("tqdm").tqdm(
            total=total,
            initial=done,
            desc=self.title,
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
        ) as bar:
            while self.progress.epoch < self.recipe.epochs:
                self._train_epoch(stop, bar)
                evaluation = self._evaluate_if_due(stop)
                if stop.requested:
                    self._interrupt()
                self._end_epoch(evaluation, bar)

    def _train_epoch(self, stop: StopSignals, bar) -> None:
        progress = self.progress
        started = time.perf_counter() - progress.seconds
        self.set_train_mode(self.model)
        sums = _Sums(progress, self.precision.device)
        shown = time.perf_counter()
        for images, target in self.train_loader.batches(progress.epoch, progress.step):
            if stop.requested:
                break
            loss, correct = self._step(images, target)
            sums.add(loss, correct, len(target))
            progress.step += 1
            bar.update()
            if time.perf_counter() - shown > _SYNC_EVERY_SECONDS:
                sums.fetch()
                self._check_finite()
                loss_mean = progress.loss_sum / progress.seen
                bar.set_postfix(refresh=False, epoch=progress.epoch + 1, loss=f"{loss_mean:.3f}")
                shown = time.perf_counter()
        sums.fetch()
        self._check_finite()
        progress.seconds = time.perf_counter() - started

    def _step(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the batch's summed loss and number correct, on the device."""
        with self.precision.autocast():
            logits = self.model(images)
        loss = nn.functional.cross_entropy(logits.float(), target, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.detach() * len(target), (logits.detach().argmax(1) == target).sum()

    def _evaluate_if_due(self, stop: StopSignals) -> Evaluation | None:
        epoch = self.progress.epoch + 1
        if stop.requested or (epoch % self.eval_every and epoch != self.recipe.epochs):
            return None
        self.last_evaluation = evaluate(self.model, self.eval_loader, self.precision, lambda: stop.requested)
        return self.last_evaluation

    def _end_epoch(self, evaluation: Evaluation | None, bar) -> None:
        progress = self.progress
        values = {
            "epoch": progress.epoch + 1,
            "step": (progress.epoch + 1) * self.steps_per_epoch,
            "lr": self.scheduler.get_last_lr()[0],
            "train_loss": progress.loss_sum / progress.seen,
            "train_accuracy": progress.correct / progress.seen,
            "seconds": round(progress.seconds, 3),
        }
        if evaluation is not None:
            values |= {"eval_loss": evaluation.loss, "eval_accuracy": evaluation.accuracy}
            bar.set_postfix(
                epoch=values["epoch"],
                loss=f"{values['train_loss']:.3f}",
                accuracy=f"{100 * evaluation.accuracy:.1f}%",
            )
        self.log.write("epoch", **values)
        progress.next_epoch()
        if progress.epoch % self.checkpoint_every == 0 or progress.epoch == self.recipe.epochs:
            self.save()

    def _interrupt(self) -> None:
        self.save()
        raise Interrupted(f"stopped in epoch {self.progress.epoch + 1} after step {self.progress.step}")

    def _check_finite(self) -> None:
        if not math.isfinite(self.progress.loss_sum):
            raise InputError(
                f"the loss is not finite in epoch {self.progress.epoch + 1}, step {self.progress.step}: "
                "lower --lr" + (" or use --amp bf16" if self.precision.amp == "fp16" else "")
            )


class _Sums:
    """The epoch's sums, kept on the device so that a step does not wait for the one before."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.progress = progress
        self.loss = torch.tensor(progress.loss_sum, dtype=torch.float64, device=device)
        self.correct = torch.tensor(progress.correct, device=device)

    def add(self, loss: Tensor, correct: Tensor, count: int) -> None:
        self.loss += loss
        self.correct += correct
        self.progress.seen += count

    def fetch(self) -> None:
        self.progress.loss_sum, self.progress.correct = self.loss.item(), int(self.correct)
