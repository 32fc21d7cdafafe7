"""Putting all adapters on a model and taking them off. What fails midway is undone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn

from alore_ext.modules import MlaeNorm, attach, detach, start_sharing, stop_sharing
from alore_ext.modules.adapter import Adapter

from .records import SHARED_SCALE, AdapterRecord
from .registry import Host
from .state import PatchState

OnError = Callable[[Callable[[], object]], object]


@contextlib.contextmanager
def undo_on_error() -> Iterator[OnError]:
    """Gives a function that notes how to undo a step; runs the notes backwards if the block raises."""
    with contextlib.ExitStack() as undo:
        yield undo.callback
        undo.pop_all()


def attach_all(model: nn.Module, records: Iterable[AdapterRecord], parameters: Mapping[str, nn.Parameter]) -> None:
    """Put every adapter on its layer. `parameters` are by full name."""
    records = tuple(records)
    with undo_on_error() as on_error:
        if SHARED_SCALE in parameters:
            model.register_parameter(SHARED_SCALE, parameters[SHARED_SCALE])
            on_error(lambda: model._parameters.pop(SHARED_SCALE))
            on_error(lambda: stop_sharing(model))
            start_sharing(model, sum(record.shares_scale for record in records))
        for record in records:
            own = {name: parameters[f"{record.module}.{name}"] for name in record.parameter_shapes()}
            on_error(lambda record=record: record.detach(model))
            record.attach(model, own)
        for host in _hosts(records):
            module = model.get_submodule(host.module)
            if not isinstance(module, host.adapter):  # else an adapter of its own makes it call its linears
                on_error(lambda module=module: detach(module) if isinstance(module, Adapter) else None)
                attach(module, host.adapter, {}, {})
        for record in records:
            norm = None if record.norm is None else model.get_submodule(record.norm)
            if norm is not None and not isinstance(norm, Adapter):  # else an adapter of its own computes the norm
                on_error(lambda norm=norm: _detach_norm(norm))
                attach(norm, MlaeNorm, {}, _behind(model, record))


def _behind(model: nn.Module, record: AdapterRecord) -> dict[str, object]:
    """The layer of a record, and the modules around it that are not around its norm."""
    parts = record.module.split(".")
    names = (".".join(parts[:length]) for length in range(1, len(parts)))
    between = [name for name in names if not f"{record.norm}.".startswith(f"{name}.")]
    return {
        "_mlae_behind": model.get_submodule(record.module),
        "_mlae_between": tuple(map(model.get_submodule, between)),
        "_mlae_unclaimed": 0,
    }


def _detach_norm(norm: nn.Module) -> None:
    if isinstance(norm, MlaeNorm):
        detach(norm)


def detach_all(model: nn.Module, state: PatchState) -> dict[str, nn.Parameter]:
    """Take every adapter off its layer; returns the parameters by full name. Needs `check_attached` first."""
    parameters = {}
    for record in state.records:
        parameters.update({f"{record.module}.{name}": value for name, value in record.detach(model).items()})
    for host in _hosts(state.records):
        module = model.get_submodule(host.module)
        if isinstance(module, host.adapter):
            detach(module)
    for record in state.records:
        if record.norm is not None:
            _detach_norm(model.get_submodule(record.norm))
    if SHARED_SCALE in model._parameters:
        stop_sharing(model)
        parameters[SHARED_SCALE] = model._parameters.pop(SHARED_SCALE)
    return parameters


def _hosts(records: Iterable[AdapterRecord]) -> dict[Host, None]:
    """The records' hosts, each once."""
    return dict.fromkeys(record.host for record in records if record.host is not None)


def check_attached(model: nn.Module, state: PatchState, caller: str) -> None:
    """Raises ValueError where a patched layer has been replaced since, naming it."""
    for record in state.records:
        if not record.is_attached(model):
            raise ValueError(f"{caller}: {record.module} is no longer the layer that was patched")
