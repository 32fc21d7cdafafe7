"""Merging of adapters into the weights of the linears around them, one layer or a whole model at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._extension import _C


def merge_kron_(weight: Tensor, bias: Tensor | None, scale: Tensor, down: Tensor, up: Tensor, side: str) -> None:
    """Folds an ALoRE adapter into a linear layer, in place.

    With W' as in :func:`alore_ext.ops.kron_linear`:

    - ``side="before"``, the adapter acts on the layer's input: ``W <- W (I + W')^T``; bias is left as it is.
    - ``side="after"``, on its output: ``W <- (I + W')^T W`` and ``b <- b (I + W')``.

    Args:
        weight: ``[out_features, in_features]``, float64, float32, bfloat16 or float16.
        bias: ``[out_features]`` or None.
        scale, down, up: the adapter, square on the side it acts on; any floating dtype.

    Products are taken in float32 (float64 for float64) and rounded once. Call it under ``torch.no_grad()``.

    Raises:
        RuntimeError: a tensor of the wrong shape, dtype or device, naming it; a weight that overlaps itself in memory;
            a gradient that would be recorded. Nothing is written.
    """
    torch.ops.alore_ext.merge_kron_(weight, bias, scale, down, up, side)


def merge_lora_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, coeff: Tensor) -> None:
    """``W <- W + B diag(coeff) A`` in place; see :func:`alore_ext.ops.masked_lora_linear` for the shapes.

    Products are taken in float32 (float64 for float64) and rounded once. Call it under ``torch.no_grad()``.

    Raises:
        RuntimeError: as :func:`merge_kron_`.
    """
    torch.ops.alore_ext.merge_lora_(weight, lora_a, lora_b, coeff)


def merge_kron_grouped_(
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scale: Sequence[Tensor],
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    side: Sequence[str],
    source: Sequence[Tensor] | None = None,
) -> None:
    """:func:`merge_kron_` on many layers: entry i of every list makes one merge. On CUDA a few launches do them all.

    Entries may differ in shape, dtype and side; weights are on one device. A factor may serve several entries. The
    values are those of one :func:`merge_kron_` an entry. Empty lists do nothing.

    With ``source`` the adapters of a model are swapped in one pass: each weight becomes the merge of its source, at
    about the cost of a copy, with the bits of copying it and merging in place. (A source whose strides are not its
    weight's is copied first.) No call waits for the device, and none allocates memory there where factors are
    contiguous and :func:`plan_merge_kron` takes every entry: in a captured CUDA graph a call merges what the tensors
    hold at each replay.

    Args:
        weight: entry i ``[out_features, in_features]``, float64, float32, bfloat16 or float16.
        bias: entry i ``[out_features]`` or None; written where the side is "after".
        scale, down, up: the adapters, as for :func:`merge_kron_`.
        side: "before" or "after", one an entry.
        source: entry i, of weight's shape, dtype and device, is what ``weight[i]`` becomes the merge of; weight's old
            values are not read. Sources may share memory with each other, not with a weight or bias that is written.
            Biases are merged in place. None: weights are merged in place too.

    Raises:
        RuntimeError: what :func:`merge_kron_` refuses, naming the entry; lists of unequal length; two entries that
            would write the same memory, or whose memory interleaves: their order would matter; a source of another
            shape, dtype or device than its weight, or in memory that is written. Nothing is written.
    """
    if any(len(values) for values in (weight, bias, scale, down, up, side, source or ())):
        _require_entries("merge_kron_grouped_", weight)
        _require_length("merge_kron_grouped_", "bias", bias, weight)
        biases = [(i, b) for i, b in enumerate(bias) if b is not None]
        torch.ops.alore_ext.merge_kron_grouped_(
            list(weight),
            [b for _, b in biases],
            [i for i, _ in biases],
            list(scale),
            list(down),
            list(up),
            list(side),
            None if source is None else list(source),
        )


def merge_lora_grouped_(
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    coeff: Sequence[Tensor],
    source: Sequence[Tensor] | None = None,
) -> None:
    """:func:`merge_lora_` on many layers: entry i of every list makes one merge. On CUDA a few launches do them all.

    Args:
        weight: entry i ``[out_features, in_features]``, float64, float32, bfloat16 or float16, all on one device.
        lora_a: entry i ``[R, in_features]``; R may differ between entries.
        lora_b: entry i ``[out_features, R]``.
        coeff: entry i ``[R]``.
        source: as for :func:`merge_kron_grouped_`.

    Empty lists do nothing.

    Raises:
        RuntimeError: as :func:`merge_kron_grouped_`. Nothing is written.
    """
    if any(len(values) for values in (weight, lora_a, lora_b, coeff, source or ())):
        _require_entries("merge_lora_grouped_", weight)
        torch.ops.alore_ext.merge_lora_grouped_(
            list(weight), list(lora_a), list(lora_b), list(coeff), None if source is None else list(source)
        )


def _require_entries(op: str, weight: Sequence[Tensor]) -> None:
    """Without a weight torch would dispatch on another list, or find no tensor to dispatch on."""
    if len(weight) == 0:
        raise RuntimeError(f"{op}: weight has no entries, but other lists have")


def _require_length(op: str, name: str, values: Sequence, weight: Sequence[Tensor]) -> None:
    if len(values) != len(weight):
        raise RuntimeError(f"{op}: {name} must have as many entries as weight, {len(weight)}, got {len(values)}")


def plan_merge_kron(
    weight: Tensor, scale: Tensor, down: Tensor, up: Tensor, side: str, shared_limit: int | None = None
):
    """How CUDA would run :func:`merge_kron_` on a weight of this shape, dtype and strides; printable.

    Args:
        weight, scale, down, up, side: as for :func:`merge_kron_`; only their shapes, dtypes and strides are read.
        shared_limit: bytes of shared memory that a thread block may have; None: what weight's GPU gives, or 99 KiB, the
            least of the GPUs that the kernels are built for.

    Returns:
        An object with ``taken`` and, where the grouped kernel does not take the merge, ``reason``; else ``rows``
        (threads read along rows of the token matrix, or across them), ``tokens_per_tile``, ``num_tiles``, ``splits``
        and ``shared_bytes``.
    """
    swap = side == "before"  # rows of the weight are tokens of the transposed map
    tokens = weight if swap else weight.t()
    return _C.plan_merge(
        num_tokens=tokens.shape[0],
        num_experts=scale.shape[0],
        s_in=scale.shape[2 if swap else 1],
        s_out=scale.shape[1 if swap else 2],
        p_in=up.shape[2] if swap else down.shape[1],
        p_out=down.shape[1] if swap else up.shape[2],
        rank=down.shape[2],
        low_rank=False,
        **_target(tokens, scale, shared_limit),
    )


def plan_merge_lora(weight: Tensor, lora_a: Tensor, shared_limit: int | None = None):
    """The same for :func:`merge_lora_`."""
    return _C.plan_merge(
        num_tokens=weight.shape[0],
        num_experts=1,
        s_in=1,
        s_out=1,
        p_in=0,
        p_out=weight.shape[1],
        rank=lora_a.shape[0],
        low_rank=True,
        **_target(weight, lora_a, shared_limit),
    )


def _target(tokens: Tensor, factor: Tensor, shared_limit: int | None) -> dict:
    if shared_limit is None:
        shared_limit = _C.LEAST_SHARED_LIMIT
        if tokens.is_cuda:
            shared_limit = torch.cuda.get_device_properties(tokens.device).shared_memory_per_block_optin
    return {
        "dtype": tokens.dtype,
        "factor_dtype": factor.dtype,
        "token_stride": tokens.stride(0),
        "element_stride": tokens.stride(1),
        "shared_limit": shared_limit,
    }
