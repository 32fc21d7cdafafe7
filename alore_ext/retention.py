"""Expert retention at inference (ALoRE paper, Table 22): a patched model with a part of its experts.

The paper's rows, with experts counted from 0 here and from 1 there:

    Increment-i   keep=range(i)
    Single-i      keep=[i - 1]
    Sliced-i      keep=[j for j in range(n) if j != i - 1]
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .patching.attaching import check_attached
from .patching.retained import check_keep, retain_
from .patching.state import PatchState, get_state, require_state


class Retention:
    """What `retain_experts` returns: leaving a `with` block over it restores what was retained before."""

    def __init__(self, model: nn.Module, state: PatchState, before: tuple[int, ...] | None) -> None:
        self._model = model
        self._state = state
        self._before = before

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(self, *error: object) -> None:
        # A model that was unpatched or unloaded within the block has nothing left to restore.
        if get_state(self._model) is self._state:
            retain_(self._model, self._state, self._before)


def retain_experts(model: nn.Module, keep: Iterable[int] | None) -> Retention:
    """Run the adapters with these experts alone, in all layers at once and without rescaling.

    Takes effect at once, and until the next call; used in a `with`, until the end of the block:

        with alore_ext.retain_experts(model, keep=[0, 2]):
            accuracy = evaluate(model)

    Works for ALoRE of either structure and for MLAE, whose other experts get the coefficient 0. The factors are
    sliced: fewer experts are less work. Adapters without experts stay whole. Parameters, `state_dict()` and
    `save_adapter` keep all experts; `merge_` merges the retained ones. The model is put in eval mode, and
    `model.train()` raises until all experts run again, in the modes from before: experts that do not run get no
    gradient, and would come back beside others that had trained without them.

    Args:
        model: a patched model, not merged.
        keep: indices of experts from 0, each once, in any order; None for all.

    Returns:
        A context manager, which gives the model.

    Raises:
        TypeError: keep is no iterable of ints.
        ValueError: not patched; merged; keep is empty, has an index twice, or one that a layer does not have (naming
            it); no adapter has experts. The model is left as it was.
    """
    state = require_state(model, "retain_experts")
    if state.merged is not None:
        raise ValueError(
            f"retain_experts: {type(model).__name__} is merged, with its experts in the weights; call unmerge_ first, "
            "or merge_(model, keep_experts=...)"
        )
    check_attached(model, state, "retain_experts")
    kept = None if keep is None else check_keep(state.records, keep, "retain_experts", "keep")
    before = state.kept
    retain_(model, state, kept)
    return Retention(model, state, before)
