"""One adapter a sample: mixed batches for serving, where each request brings its own fine-tuned adapter.

Axis 0 of x is the sample and ``index[b]`` names the adapter of sample b, or is -1 for none. Adapters are given stacked
along a leading axis, or as a list of tensors that may differ in num_experts and rank (and in the number of blocks).
The index stays on its device: calls neither wait for it nor depend on its values, so that they run in CUDA graphs.

These operators are for inference: they raise where a gradient would be recorded. On CUDA the Kronecker ones are one
launch for every 128 adapters where :func:`plan_alore` says that each adapter's shape is fused; the low-rank linear is
two launches and the base product where :func:`plan_lora_grouped` says so. Otherwise they are composed of batched
products, which a warning says once for 16-bit activations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._extension import _C

Adapters = Tensor | Sequence[Tensor]


def _listed(adapters: Adapters) -> list[Tensor]:
    return list(adapters.unbind(0)) if isinstance(adapters, Tensor) else list(adapters)


def kron_linear_grouped(x: Tensor, scale: Adapters, down: Adapters, up: Adapters, index: Tensor) -> Tensor:
    """:func:`kron_linear` with sample b under adapter ``index[b]``; 0 where that is -1.

    Args:
        x: ``[batch, ..., embed_dim]``; float64, float32, bfloat16 or float16.
        scale: ``[num_adapters, num_experts, s, s]``, or a list of ``[num_experts, s, s]``.
        down: ``[num_adapters, num_experts, embed_dim / s, rank]``, or a list of the same without the leading axis.
        up: ``[num_adapters, num_experts, rank, embed_dim / s]``, or such a list. Entries of lists may differ in
            num_experts, s and rank; each adapter has x's dtype or, under a 16-bit x, float32.
        index: int64 ``[batch]`` on x's device; values in [-1, num_adapters).

    Returns:
        Like x.

    Raises:
        RuntimeError: a tensor of the wrong shape, dtype or device, naming it and its adapter; a gradient that would be
            recorded; on the CPU an index out of range. On CUDA the index cannot be checked without waiting for the
            device: there a value out of range stops the kernel, as one of `torch.nn.functional.embedding` does, and
            the error shows at a later call.
    """
    return torch.ops.alore_ext.kron_linear_grouped(x, _listed(scale), _listed(down), _listed(up), index)


def alore_grouped(x: Tensor, scale: Adapters, down: Adapters, up: Adapters, index: Tensor) -> Tensor:
    """``x + kron_linear_grouped(x)``: :func:`alore` with an adapter a sample; x itself where the index is -1.

    Arguments, result and errors as for :func:`kron_linear_grouped`.
    """
    return torch.ops.alore_ext.alore_grouped(x, _listed(scale), _listed(down), _listed(up), index)


def layer_norm_alore_grouped(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Adapters,
    down: Adapters,
    up: Adapters,
    index: Tensor,
) -> Tensor:
    """``alore_grouped(layer_norm(x))`` over the last axis; the plain norm where the index is -1.

    Args:
        x: ``[batch, ..., embed_dim]``.
        weight, bias: ``[embed_dim]`` or None, shared by all samples; x's dtype or float32.
        eps: added to the variance.
        scale, down, up, index: as for :func:`kron_linear_grouped`.

    Returns:
        Like x; under autocast, float32 x gives the autocast dtype.

    Raises:
        RuntimeError: as :func:`kron_linear_grouped`.
    """
    return torch.ops.alore_ext.layer_norm_alore_grouped(
        x, weight, bias, eps, _listed(scale), _listed(down), _listed(up), index
    )


def masked_lora_linear_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Adapters,
    lora_b: Adapters,
    coeff: Adapters,
    index: Tensor,
) -> Tensor:
    """:func:`masked_lora_linear` with sample b under adapter ``index[b]``; the base linear where that is -1.

    Args:
        x: ``[batch, ..., in_features]``.
        weight: ``[out_features, in_features]``, shared by all samples; x's dtype. A float32 weight under a 16-bit x is
            rounded to it: unlike in :func:`masked_lora_linear` there is no one update to fold into it.
        bias: ``[out_features]`` or None, x's dtype.
        lora_a: ``[num_adapters, R, in_features]``, or a list of ``[R, in_features]``.
        lora_b: ``[num_adapters, out_features, R]``, or a list of ``[out_features, R]``.
        coeff: ``[num_adapters, R]``, or a list of ``[R]``. R may differ between entries of lists.
        index: as for :func:`kron_linear_grouped`.

    Returns:
        ``[batch, ..., out_features]``, x's dtype.

    Raises:
        RuntimeError: as :func:`kron_linear_grouped`.
    """
    return torch.ops.alore_ext.masked_lora_linear_grouped(
        x, weight, bias, _listed(lora_a), _listed(lora_b), _listed(coeff), index
    )


def plan_lora_grouped(x: Tensor, weight: Tensor, lora_a: Adapters):
    """How CUDA would run :func:`masked_lora_linear_grouped` on tensors of these shapes; printable.

    Args:
        x, weight, lora_a: as for :func:`masked_lora_linear_grouped`; only their shapes and x's dtype are read.

    Returns:
        An object with ``fused``: 16-bit x, features in multiples of 8 and at most 64 rank rows an adapter. Where not,
        ``reason`` and ``refused``, the adapter that it is about; else ``rank_tiles``, eights of rank rows of the
        largest adapter, and ``workspace_bytes``, the memory that a call takes for packed factors.
    """
    return _C.plan_lora_grouped(
        num_samples=x.shape[0],
        num_tokens=x[..., 0].numel(),
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        ranks=[a.shape[0] for a in _listed(lora_a)],
        dtype=x.dtype,
    )
