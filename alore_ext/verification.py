"""Proof that a patched model is what it should be, on the user's own model and input.

An adapter can fail in silence: a forward that reads a layer's weight goes around the adapter on it, and a weight that
takes the merge on its wrong side gives another model. `verify` looks for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._untouched import full_float32, left_as_it_was, same_bits, seed_
from .merging import merge_, unmerge_
from .patching.attaching import attach_all, check_attached, detach_all
from .patching.merged import allow_training
from .patching.records import SHARED_SCALE, init_scale_
from .patching.state import PatchState, require_state

# Two evaluations of one function, that differ in where they round, may differ by this many times what the output moves
# when the adapted weights themselves move by a rounding each.
_ROUNDINGS = 8.0
# A probe is strong enough when the output moves by this much of its size, and noise of this size is the last one tried.
_STRONG, _FIRST_NOISE, _LAST_NOISE = 0.3, 0.05, 4.0


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what has to hold.
        passed: whether it does.
        measured: the number that was found; None where nothing was measured.
        bound: what `measured` was compared with.
        detail: how the bound comes about, or what is wrong.
    """

    name: str
    passed: bool
    measured: float | None
    bound: float | None
    detail: str

    def __str__(self) -> str:
        numbers = "" if self.measured is None else f"{self.measured:.2e} (bound {self.bound:.2e})"
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.name:<42} {numbers:<28} {self.detail}".rstrip()


class VerificationError(Exception):
    """A check failed, which the text names: of `VerificationReport.raise_for_failures`, or of a file by `export`."""


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found. True where every check passed; printed, it is a table."""

    model: str
    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        passed = sum(check.passed for check in self.checks)
        title = f"{self.model}: {passed} of {len(self.checks)} checks passed"
        return "\n".join((title, *map(str, self.checks)))

    def raise_for_failures(self) -> None:
        """Raises VerificationError where a check failed."""
        if failed := [str(check) for check in self.checks if not check.passed]:
            raise VerificationError("\n".join((f"verify: {self.model} fails {len(failed)} checks", *failed)))


def verify(model: nn.Module, example_input: Tensor | tuple | list | Mapping[str, Any]) -> VerificationReport:
    """Prove on an example that the adapters of a patched model are in its forward, train, and fold away.

    1. With the adapters at their start values the model computes what it computes without them.
    2. A probe (noise on every adapter parameter, on top of its present value) changes the output.
    3. Every adapter is reached: each of its parameters gets a gradient, in training mode. One that the forward goes
       around gets none. Dropout, drop path and masks are off here: what is dropped rightly gets no gradient.
    4. Every other trainable parameter gets a gradient.
    5. Merged, the probed model computes what it computes unmerged, without gradients, in eval mode: an adapter that is
       bypassed at inference alone, or folds into the wrong side of a weight, is found here.
    6. Unmerging restores every bit, and every class.

    A method that has no merge (`AloreConfig(structure="stacked_nonlinear")`) has to refuse it, in the place of 5 and 6.
    float32 products are not cut to TF32 here, whatever torch's settings are.

    The bound of 1 and 5 is `8 * (r + eps)`: eps is that of the output's dtype, and r is measured: how far the output
    moves, relative to its norm, when every adapted weight moves by a random part of one rounding of its own dtype. So
    it follows the dtype, depth and conditioning of the model at hand. Check 2 has to exceed `r + eps`.

    The model is left as it was, to the bit, also where its forward raises: values, classes, training flags,
    `requires_grad`, gradients, buffers and random generators. It needs memory for two copies of the adapted weights
    and one of all others, and the time of 10 to 20 forwards. The user's hooks run.

    Args:
        model: patched, not merged.
        example_input: one tensor, a tuple or list of positional arguments, or a dict of keyword arguments. The model
            returns a tensor, or a tuple, list or mapping with tensors; of a mapping with `logits` these alone count.

    Raises:
        ValueError: not patched; merged; a layer was replaced after patching; an output without floating-point tensors.
        TypeError: an example_input of another kind.
    """
    state = require_state(model, "verify")
    if state.merged is not None:
        raise ValueError(f"verify: {type(model).__name__} is merged; call unmerge_ first")
    check_attached(model, state, "verify")
    with torch.inference_mode(False), left_as_it_was(model), full_float32():
        checks = tuple(_Trial(model, state, example_input).run())
    return VerificationReport(type(model).__name__, checks)


class _Trial:
    """The checks, in an order in which each leaves what the next one needs."""

    def __init__(self, model: nn.Module, state: PatchState, example_input: Any) -> None:
        self.model = model
        self.state = state
        self.args, self.kwargs = _arguments(example_input)
        parameters = dict(model.named_parameters())
        self.adapters = {name: parameters[name] for name in state.adapter_names()}
        # Those alone: what a user froze, or thawed, is his decision.
        self.trainable = {name: p for name, p in parameters.items() if p.requires_grad and name not in self.adapters}
        self.weights = {n: t for record in state.records for n, t in record.merged_tensors(model).items()}
        self.seed = torch.initial_seed() % 2**31

    def run(self) -> Iterator[Check]:
        self.model.eval()
        present = {name: adapter.detach().clone() for name, adapter in self.adapters.items()}
        yield self.starts_as_identity()
        yield self.probe_changes_the_output(present)
        yield from self.gradients_arrive()
        yield from self.merges_exactly()

    def starts_as_identity(self) -> Check:
        self._start_values_()
        started = self.output()
        with _adapters_off(self.model, self.state):
            plain = self.output()
            bound, why = self._bound(plain)
        error = _relative(started, plain)
        return Check("at its start an adapter changes nothing", error <= bound, error, bound, why)

    def probe_changes_the_output(self, present: Mapping[str, Tensor]) -> Check:
        started = self.output()
        rounding = self._bound(started)[0] / _ROUNDINGS
        noise = _FIRST_NOISE
        while True:
            with torch.no_grad():
                for name, adapter in self.adapters.items():
                    adapter.copy_(present[name] + noise * torch.randn_like(adapter))
            moved = _relative(self.output(), started)
            if moved >= _STRONG or noise >= _LAST_NOISE:
                break
            noise *= 2
        detail = f"noise of {noise:g} on every adapter parameter; has to exceed what rounding does"
        return Check("other values of the adapters change it", moved > rounding, moved, rounding, detail)

    def gradients_arrive(self) -> Iterator[Check]:
        everything = {**self.adapters, **self.trainable}
        for parameter in everything.values():
            parameter.requires_grad_(True)
        with _training_without_randomness(self.model, self.state), torch.enable_grad():
            y = self._forward()
            # A random direction: sums of squares do not change where the output is normalised.
            loss = (y * torch.randn(y.shape, device=y.device, dtype=y.dtype)).sum()
            gradients = torch.autograd.grad(loss, list(everything.values()), allow_unused=True)
        missing = {name: reason for name, g in zip(everything, gradients, strict=True) if (reason := _missing(g))}
        for kind, names in (("adapter", self.adapters), ("other trainable", self.trainable)):
            bad = [f"{name} ({missing[name]})" for name in names if name in missing]
            more = f", and {len(bad) - 4} more" if len(bad) > 4 else ""
            found = f"{len(names) - len(bad)} of {len(names)}"
            yield Check(
                f"every {kind} parameter gets a gradient",
                not bad,
                None,
                None,
                f"{found}; without: {', '.join(bad[:4])}{more}" if bad else found,
            )

    def merges_exactly(self) -> Iterator[Check]:
        if refusals := {record.merge_refusal() for record in self.state.records} - {None}:
            yield self.refuses_to_merge("; ".join(sorted(refusals)))
            return
        unmerged = self.output()
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        kinds = {name: type(module) for name, module in self.model.named_modules()}
        try:
            merge_(self.model)
        except ValueError as error:
            yield Check("merged = unmerged", False, None, None, str(error))
            return
        try:
            merged = self.output()
            bound, why = self._bound(merged)
        finally:
            _unmerge(self.model, self.state)
        error = _relative(merged, unmerged)
        yield Check("merged = unmerged", error <= bound, error, bound, why)

        after = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        changed = [name for name in before if name not in after or not same_bits(after[name], before[name])]
        changed += [name for name, module in self.model.named_modules() if type(module) is not kinds.get(name)]
        detail = f"not so: {', '.join(changed[:4])}" if changed else f"{len(before)} tensors, {len(kinds)} classes"
        yield Check("unmerge restores every bit", not changed, None, None, detail)

    def refuses_to_merge(self, reason: str) -> Check:
        try:
            merge_(self.model)
        except ValueError:
            return Check("cannot be merged, and refuses to be", True, None, None, reason)
        _unmerge(self.model, self.state)
        return Check("cannot be merged, and refuses to be", False, None, None, f"merged all the same, though {reason}")

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the model returns, without gradients, as one vector."""
        return self._forward()

    def _forward(self) -> Tensor:
        seed_(self.model, self.seed)  # a model that draws at inference draws the same each time
        tensors = _tensors(self.model(*self.args, **self.kwargs))
        if not tensors:
            raise ValueError(f"verify: {type(self.model).__name__} returned no floating-point tensor to look at")
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        self.dtype = tensors[0].dtype
        return torch.cat([tensor.flatten().to(tensors[0].device, dtype) for tensor in tensors])

    @torch.no_grad()
    def _bound(self, y: Tensor) -> tuple[float, str]:
        """How far from y rounding alone may lead, by moving all adapted weights by about a rounding each."""
        copies = {name: weight.clone() for name, weight in self.weights.items()}
        moved = 0.0
        for _ in range(2):
            for name, weight in self.weights.items():
                part = torch.rand_like(weight, dtype=torch.float32) * 2 - 1
                weight.copy_(copies[name] * (1 + torch.finfo(weight.dtype).eps * part.to(torch.float64)))
            moved = max(moved, _relative(self.output(), y))
        for name, weight in self.weights.items():
            weight.copy_(copies[name])
        epsilon = torch.finfo(self.dtype).eps
        why = f"{_ROUNDINGS:g} * ({moved:.1e} by a rounding of the adapted weights + eps {epsilon:.1e})"
        return _ROUNDINGS * (moved + epsilon), why

    @torch.no_grad()
    def _start_values_(self) -> None:
        for record in self.state.records:
            record.init_({name: self.adapters[f"{record.module}.{name}"] for name in record.parameter_shapes()})
        if SHARED_SCALE in self.adapters:
            init_scale_(self.adapters[SHARED_SCALE])


@contextlib.contextmanager
def _adapters_off(model: nn.Module, state: PatchState) -> Iterator[None]:
    adapters = detach_all(model, state)
    try:
        yield
    finally:
        attach_all(model, state.records, adapters)


@contextlib.contextmanager
def _training_without_randomness(model: nn.Module, state: PatchState) -> Iterator[None]:
    """Training mode for all that contains something; eval for what may draw, or normalise by the batch.

    A layer without parameters, buffers and children computes a plain function, and in eval mode one without chance.
    Adapted layers drop and mask in training mode alone.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or not (
            module._parameters or module._buffers or module._modules
        ):
            module.eval()
    for record in state.records:
        model.get_submodule(record.module).training = False
    try:
        yield
    finally:
        model.eval()


def _unmerge(model: nn.Module, state: PatchState) -> None:
    """`unmerge_`; where that fails the adapters still come back, and `left_as_it_was` restores the weights."""
    adapters = state.merged.adapters
    try:
        unmerge_(model)
    except Exception:
        attach_all(model, state.records, adapters)
        allow_training(model)
        state.merged = None
        raise


def _arguments(example_input: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_input, Tensor):
        return (_usable(example_input),), {}
    if isinstance(example_input, (tuple, list)):
        return tuple(map(_usable, example_input)), {}
    if isinstance(example_input, Mapping):
        return (), {name: _usable(value) for name, value in example_input.items()}
    kind = type(example_input).__name__
    raise TypeError(f"verify: example_input must be a tensor, a tuple or list of arguments, or a dict, got {kind}")


def _usable(value: Any) -> Any:
    """Tensors made under inference mode cannot be saved for a backward: their copies can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return _tensors(output["logits"] if output.get("logits") is not None else list(output.values()))
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; NaN where either holds one, so that no bound is met."""
    difference, norm = (a - b).double().norm().item(), b.double().norm().item()
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def _missing(gradient: Tensor | None) -> str:
    """What is wrong with a gradient; "" for nothing."""
    if gradient is None:
        return "none: the forward goes around it"
    if not bool(gradient.isfinite().all()):
        return "NaN or infinity"
    return "" if bool(gradient.any()) else "all zero"
