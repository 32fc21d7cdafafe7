"""A model's merges gathered into few calls, in an order that gives what one merge after the other would give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alore_ext import ops
from alore_ext.modules.affine import AffineMaps


@dataclass(frozen=True, eq=False)
class KronMerge:
    """One `ops.merge_kron_`. `bias` is None where the merge leaves it as it is.

    `source` is what the weight is merged from; None for the weight itself.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    down: Tensor
    up: Tensor
    side: str
    source: Tensor | None = None

    def written(self) -> list[Tensor]:
        """The tensors that the merge changes."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass(frozen=True, eq=False)
class LoraMerge:
    """One `ops.merge_lora_`; `source` as for `KronMerge`."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    coeff: Tensor
    source: Tensor | None = None

    def written(self) -> list[Tensor]:
        """The tensors that the merge changes."""
        return [self.weight]


@dataclass(frozen=True, eq=False)
class AffineMerge:
    """Folds `x -> x + x D + b` with `D = down^T up` and `b = down_bias up + up_bias` into a linear.

    before:  weight <- weight (I + D)^T, bias <- bias + weight b
    after:   weight <- (I + D)^T weight, bias <- bias (I + D) + b
    """

    weight: Tensor
    bias: Tensor
    maps: AffineMaps
    side: str

    def written(self) -> list[Tensor]:
        """The tensors that the merge changes."""
        return [self.weight, self.bias]

    def of_weight(self) -> KronMerge:
        """The merge of the weight alone: D is a Kronecker product with one expert in one block."""
        down, up = self.maps.down.mT[None].contiguous(), self.maps.up[None].contiguous()
        return KronMerge(self.weight, None, down.new_ones(1, 1, 1), down, up, self.side)

    def merge_bias_(self) -> None:
        """The merge of the bias, from the weight as it was: in float32 or wider, rounded once."""
        exact = torch.promote_types(torch.promote_types(self.weight.dtype, self.maps.up.dtype), torch.float32)
        down, down_bias, up, up_bias = (factor.to(exact) for factor in self.maps)
        bias = self.bias.to(exact)
        with torch.autocast(bias.device.type, enabled=False):
            offset = up_bias + down_bias @ up
            if self.side == "before":
                bias = bias + self.weight.to(exact) @ offset
            else:
                bias = bias + (down @ bias) @ up + offset
        self.bias.copy_(bias)


@dataclass(frozen=True, eq=False)
class ScaleShiftMerge:
    """`weight <- gamma * weight` by rows and `bias <- gamma * bias + beta`.

    Without a weight only the bias is written; without gamma nothing is scaled.
    """

    weight: Tensor | None
    bias: Tensor
    gamma: Tensor | None
    beta: Tensor

    def written(self) -> list[Tensor]:
        """The tensors that the merge changes."""
        return [self.bias] if self.weight is None else [self.weight, self.bias]

    def run_(self) -> None:
        """In place: computed in float32 (float64 for float64), rounded once."""
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        bias, beta = self.bias.to(dtype), self.beta.to(dtype)
        if self.gamma is None:
            self.bias.copy_(bias + beta)
            return
        gamma = self.gamma.to(dtype)
        self.bias.copy_(torch.addcmul(beta, bias, gamma))
        if self.weight is not None:
            self.weight.copy_(self.weight.to(dtype) * gamma.view(-1, *(1,) * (self.weight.dim() - 1)))


Merge = KronMerge | LoraMerge | AffineMerge | ScaleShiftMerge


def run_merges_(merges: Iterable[Merge]) -> None:
    """Run all merges in place: more than one round only where a weight takes several merges.

    Each round has one grouped call for all Kronecker merges of a device, with the weights of affine adapters, and one
    for all of low rank. What changes a bias or scales rows takes a few calls of torch each.
    """
    for group in _rounds(merges):
        for device in dict.fromkeys(merge.written()[0].device for merge in group):
            here = [merge for merge in group if merge.written()[0].device == device]
            kron = [merge for merge in here if isinstance(merge, KronMerge)]
            lora = [merge for merge in here if isinstance(merge, LoraMerge)]
            for merge in (affine := [merge for merge in here if isinstance(merge, AffineMerge)]):
                merge.merge_bias_()
            kron += [merge.of_weight() for merge in affine]
            for part in _by_source(kron):
                ops.merge_kron_grouped_(*_columns(part, ("weight", "bias", "scale", "down", "up", "side", "source")))
            for part in _by_source(lora):
                ops.merge_lora_grouped_(*_columns(part, ("weight", "lora_a", "lora_b", "coeff", "source")))
            for merge in here:
                if isinstance(merge, ScaleShiftMerge):
                    merge.run_()


def _by_source(merges: list[Merge]) -> list[list[Merge]]:
    """Those that change a weight in place, and those that start from another; either list may be missing."""
    parts = [merge for merge in merges if merge.source is None], [merge for merge in merges if merge.source is not None]
    return [part for part in parts if part]


def _columns(merges: list[Merge], fields: tuple[str, ...]) -> Iterator[list | None]:
    for field in fields:
        column = [getattr(merge, field) for merge in merges]
        yield None if field == "source" and column[0] is None else column


def _rounds(merges: Iterable[Merge]) -> list[list[Merge]]:
    """Merges that write the same memory go into successive rounds, in their order; all others into the first."""
    rounds: list[list[Merge]] = []
    # For each storage, the byte ranges that earlier merges write, and the first round that comes after them.
    after: dict[tuple, list[tuple[int, int, int]]] = {}
    for merge in merges:
        ranges = [_byte_range(tensor) for tensor in merge.written()]
        index = max(
            (free for key, begin, end in ranges for b, e, free in after.get(key, ()) if b < end and begin < e),
            default=0,
        )
        for key, begin, end in ranges:
            after.setdefault(key, []).append((begin, end, index + 1))
        if index == len(rounds):
            rounds.append([])
        rounds[index].append(merge)
    return rounds


def _byte_range(tensor: Tensor) -> tuple[tuple, int, int]:
    """Its storage, and the bytes in it from the first element to the last."""
    item = tensor.element_size()
    begin = tensor.storage_offset() * item
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.device, tensor.untyped_storage().data_ptr()), begin, begin + (last + 1) * item
