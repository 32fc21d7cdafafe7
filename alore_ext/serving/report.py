"""What merging costs in accuracy at the dtype that serves: weights against float64, logits against the unmerged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alore_ext.patching.grouping import KronMerge, run_merges_

from .entry import Entry


class MergeError(ValueError):
    """A merge is further from the unmerged model than was allowed. `report` has the figures."""

    def __init__(self, message: str, report: MergeReport):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class LayerError:
    """One merged weight.

    Attributes:
        name: the parameter's full name.
        update: Frobenius norm of what the adapter adds to the weight, relative to the weight's.
        error: Frobenius norm of merged - exact, relative to the weight's; exact is the merge in float64.
        lost: the same error relative to the update: the part of the adapter that rounding changes.
    """

    name: str
    update: float
    error: float
    lost: float


@dataclass(frozen=True)
class MergeReport:
    """How exactly an adapter went into the weights. `print` it.

    Attributes:
        adapter: its name.
        dtype: of the weights.
        layers: one entry a merged weight.
        logit_difference: largest |merged - unmerged| over the images, relative to the largest |unmerged|.
        agreement: share of the images for which both give the same class.
        num_images: how many there were.
    """

    adapter: str
    dtype: torch.dtype
    layers: tuple[LayerError, ...]
    logit_difference: float
    agreement: float
    num_images: int

    def worst(self) -> LayerError:
        """The layer that loses most of its update."""
        return max(self.layers, key=lambda layer: layer.lost)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{self.adapter} merged in {str(self.dtype).removeprefix('torch.')}"]
        lines.append(f"{'weight':{width}}   update    error     lost")
        lines += [f"{x.name:{width}}  {x.update:7.1e}  {x.error:7.1e}  {x.lost:7.1e}" for x in self.layers]
        lines.append(
            f"logits, merged against unmerged: largest difference {self.logit_difference:.1e} of the largest logit, "
            f"same class for {self.agreement:.1%} of {self.num_images} images"
        )
        return "\n".join(lines)


@torch.no_grad()
def layer_errors(merged: nn.Module, base: nn.Module, entry: Entry) -> Iterator[LayerError]:
    """Of each weight that an adapter writes: in a model with the adapter merged, against `base`'s merged in float64."""
    for record in entry.records:
        own = {key: value.double() for key, value in entry.own_parameters(record).items()}
        names = [name for name in record.merged_tensors(merged) if merged.get_parameter(name).dim() > 1]
        for name, merge in zip(names, record.merges(base, own), strict=True):
            pristine = merge.weight
            exact = pristine.double()
            # A bias is merged by the same kernel and is no part of the figures.
            changes = {"weight": exact, "bias": None} if isinstance(merge, KronMerge) else {"weight": exact}
            run_merges_([dataclasses.replace(merge, **changes)])
            yield layer_error(name, merged.get_parameter(name).view_as(exact), exact, pristine)


def layer_error(name: str, merged: Tensor, exact: Tensor, pristine: Tensor) -> LayerError:
    """Compare a merged weight with its merge in float64."""
    exact, merged, pristine = exact.double(), merged.double(), pristine.double()
    size, update, error = (t.norm().item() for t in (pristine, exact - pristine, merged - exact))
    tiny = torch.finfo(torch.float64).tiny
    return LayerError(name, update / max(size, tiny), error / max(size, tiny), error / max(update, tiny))


def logit_errors(merged: Tensor, unmerged: Tensor) -> tuple[float, float]:
    """(largest difference relative to the largest logit, share of equal classes) of logits [batch, classes]."""
    merged, unmerged = merged.double(), unmerged.double()
    largest = unmerged.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    difference = (merged - unmerged).abs().max() / largest
    same = (merged.argmax(-1) == unmerged.argmax(-1)).double().mean()
    return difference.item(), same.item()


def check_report(report: MergeReport, max_lost: float | None, max_logit_difference: float | None) -> None:
    """Raises MergeError where a bound is given and not kept; a NaN keeps none."""
    if max_lost is not None and not (lost := report.worst()).lost <= max_lost:
        raise MergeError(
            f"merge_report: {report.adapter!r}: {lost.name} in {report.dtype} loses {lost.lost:.1e} of its update; "
            f"at most {max_lost:.1e} was allowed",
            report,
        )
    if max_logit_difference is not None and not report.logit_difference <= max_logit_difference:
        raise MergeError(
            f"merge_report: {report.adapter!r}: logits in {report.dtype} differ by {report.logit_difference:.1e} of "
            f"the largest; at most {max_logit_difference:.1e} was allowed",
            report,
        )
