"""How many parameters a model trains, and where they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .patching.records import SHARED_SCALE
from .patching.state import get_state


@dataclass(frozen=True)
class TrainableSummary:
    """Parameter counts of a model. Printed, it is a table.

    Attributes:
        by_role: parameters of the adapters by where they are: a location ("before_attn"), a target ("qkv"),
            and "alore_scale" for the shared scale matrices.
        adapter: all of these: the count of the papers' tables, head excluded.
        head: parameters of the classifier head.
        base: parameters of the backbone without adapters and head.
        trainable: parameters with requires_grad, of whatever kind.
        total: all parameters.
    """

    by_role: dict[str, int]
    adapter: int
    head: int
    base: int
    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [*self.by_role.items(), ("adapters", self.adapter), ("head", self.head), ("base", self.base)]
        rows += [("trainable", self.trainable), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {count:>13,}" for name, count in rows]
        rule = "-" * len(lines[0])
        lines.insert(len(self.by_role), rule)
        lines.insert(-2, rule)
        lines[-2] += f"  ({self.percent:.3f} %)"
        return "\n".join(lines)


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count a model's parameters by role. Works on plain, patched and merged models.

    Raises:
        TypeError: not a module.
    """
    state = get_state(model)
    parameters = dict(model.named_parameters())
    if state is not None and state.merged is not None:
        parameters.update(state.merged.adapters)
    by_role: dict[str, int] = {}
    if state is not None:
        for record in state.records:
            own = sum(parameters[f"{record.module}.{name}"].numel() for name in record.parameter_shapes())
            by_role[record.role] = by_role.get(record.role, 0) + own
        if SHARED_SCALE in parameters:
            by_role[SHARED_SCALE] = parameters[SHARED_SCALE].numel()
    adapter = sum(by_role.values())
    head_names = () if state is None else [name for name in parameters if state.is_head(name)]
    head = sum(parameters[name].numel() for name in head_names)
    total = sum(parameter.numel() for parameter in parameters.values())
    return TrainableSummary(
        by_role=by_role,
        adapter=adapter,
        head=head,
        base=total - adapter - head,
        trainable=sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
        total=total,
    )
