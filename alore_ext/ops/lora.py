"""Expert-masked low-rank updates: the paper "MLAE: Masked LoRA Experts for Visual Parameter-Efficient Fine-Tuning"."""

import functools

import torch
from torch import Tensor

from .._extension import _C
from ._limits import device_limits

_masked_lora_linear = torch.ops.alore_ext.masked_lora_linear.default
_mlae_linear = torch.ops.alore_ext.mlae_linear.default
_layer_norm_mlae_linear = torch.ops.alore_ext.layer_norm_mlae_linear.default


def masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, coeff: Tensor
) -> Tensor:
    """``y = x W^T + b + ((x A^T) * coeff) B^T``.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, x's dtype; or float32 under a 16-bit x, as autocast passes it. Then
            ``W + B diag(coeff) A`` is formed in float32 and rounded once, and one product does the rest.
        bias: ``[out_features]`` or None, x's dtype.
        lora_a: ``[R, in_features]``.
        lora_b: ``[out_features, R]``.
        coeff: ``[R]``; carries each expert's coefficient, mask and 1/(1 - p). Where it is 0, the rows of A's and
            B's gradients are exactly 0, while coeff's own gradient stays the true derivative.

    Returns:
        ``[..., out_features]``, x's dtype.
    """
    return _masked_lora_linear(x, weight, bias, lora_a, lora_b, coeff)[0]


def mlae_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    coeff: Tensor,
    mask_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """:func:`masked_lora_linear` under a fresh mask over experts: MLAE equations 4 to 6.

    Expert e owns rows ``e * R / num_experts`` onward of A and columns of B. Each call draws one mask for the whole
    batch from torch's generator of x's device, inside the kernel that packs the factors: ``c = coeff * m / (1 - p)``
    with ``m ~ Bernoulli(1 - p)``. The draw follows `torch.manual_seed`, is fresh at each replay of a CUDA graph, and
    is the same again when activation checkpointing, which restores the generator, runs the forward a second time.
    CPU and CUDA draw different masks from one seed.

    Args:
        x, weight, bias, lora_a, lora_b: as for :func:`masked_lora_linear`.
        coeff: ``[num_experts]``, num_experts dividing R. Its gradient goes through the mask: 0 for a masked expert.
        mask_p: probability, in [0, 1), of masking an expert.
        training: without it nothing is masked, nothing scaled, and nothing drawn.

    Returns:
        ``[..., out_features]``, x's dtype.

    Raises:
        RuntimeError: mask_p outside [0, 1), or a shape, dtype or device that does not fit.
    """
    return _mlae_linear(x, weight, bias, lora_a, lora_b, coeff, mask_p, training)[0]


def layer_norm_mlae_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    coeff: Tensor,
    mask_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """``mlae_linear(layer_norm(x))``, and the norm's output with it.

    As one operator the two read x once each way, and backward keeps x, one mean and one reciprocal standard deviation
    a token, and the low-rank code: not the norm's output, which :func:`mlae_linear` alone would keep.

    Args:
        x: ``[..., in_features]``.
        norm_weight, norm_bias: ``[in_features]`` or None; x's dtype or float32.
        eps: added to the variance.
        weight, bias, lora_a, lora_b, coeff, mask_p, training: as for :func:`mlae_linear`.

    Returns:
        ``[..., out_features]``, and ``layer_norm(x)``, both in x's dtype and both differentiable. The second may have
        rows that lie further apart than ``in_features``.

    Raises:
        RuntimeError: as :func:`mlae_linear`; eps negative.
    """
    return _layer_norm_mlae_linear(
        x, norm_weight, norm_bias, eps, weight, bias, lora_a, lora_b, coeff, mask_p, training
    )[:2]


def plan_layer_norm_mlae_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    *,
    capability: int | None = None,
    num_sms: int | None = None,
    shared_per_block: int | None = None,
):
    """How a CUDA device would run :func:`layer_norm_mlae_linear` on tensors of these shapes; printable.

    The fused kernels take bfloat16 x and weight, R <= 8, in_features 128, 256, 384, 512 or 768 and out_features in
    multiples of 32 up to 2304, on compute capability 8.0 and later where 227 KiB of shared memory are there (less for
    narrow rows). Anything else is composed of a norm and :func:`mlae_linear`.

    Args:
        x, weight, lora_a: tensors of the call's shapes and dtypes; no values are read.
        capability, num_sms, shared_per_block: as for :func:`plan_alore`; by default those of x's device.

    Returns:
        An object with ``fused``, ``reason`` where it is False, and ``linear``, the plan of the linear's part.
    """
    limits = device_limits("plan_layer_norm_mlae_linear", x.device, capability, num_sms, shared_per_block)
    return _C.plan_norm_lora(
        num_tokens=x[..., 0].numel(),
        in_features=weight.size(1),
        out_features=weight.size(0),
        rank=lora_a.size(0),
        dtype=x.dtype,
        weight_dtype=weight.dtype,
        capability=limits[0],
        num_sms=limits[1],
        shared_per_block=limits[2],
    )


@functools.cache
def fuses_norm(
    device: torch.device, weight_shape: torch.Size, rank: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> bool:
    """Whether `layer_norm_mlae_linear` has a fused kernel for these: one look-up a call."""
    if device.type != "cuda" or len(weight_shape) != 2:
        return False
    out_features, in_features = weight_shape
    capability, num_sms, shared_per_block = device_limits("fuses_norm", device)
    return _C.plan_norm_lora(
        num_tokens=1,
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        dtype=dtype,
        weight_dtype=weight_dtype,
        capability=capability,
        num_sms=num_sms,
        shared_per_block=shared_per_block,
    ).fused


def plan_lora(
    x: Tensor, weight: Tensor, lora_a: Tensor, num_processors: int | None = None, shared_bytes: int | None = None
):
    """How :func:`masked_lora_linear` and :func:`mlae_linear` run on tensors of these shapes; printable.

    Args:
        x, weight, lora_a: as for :func:`masked_lora_linear`; only shapes, dtypes and x's device are read.
        num_processors, shared_bytes: streaming multiprocessors, and shared memory that one block may ask for, of the
            GPU to plan for. By default those of x's device; none on the CPU.

    Returns:
        An object with ``forward`` and ``backward``, each "fold" (a float32 weight under 16-bit x: forward only),
        "extended" (forward, where out_features > in_features: the rank term inside the base product), "fused" or
        "fused-half" (in backward both halves in one kernel or apart, as shared memory allows), which take CUDA, 16-bit
        x, R <= 16 and features in multiples of 8, "staged" (backward, and fastest: R <= 8, in_features up to 768 and
        out_features up to 2304 in multiples of 32), or "gemm" (everything else); ``code_width`` and
        ``operand_elements``, what forward keeps a token and in all; ``blocks``, ``shared_bytes``,
        ``workspace_bytes`` and ``staged_shape`` of the backward.
    """
    if x.device.type == "cuda":
        device = torch.cuda.get_device_properties(x.device)
        num_processors = device.multi_processor_count if num_processors is None else num_processors
        shared_bytes = device.shared_memory_per_block_optin if shared_bytes is None else shared_bytes
    return _C.plan_lora(
        num_tokens=x[..., 0].numel(),
        in_features=weight.size(1),
        out_features=weight.size(0),
        rank=lora_a.size(0),
        dtype=x.dtype,
        weight_dtype=weight.dtype,
        num_processors=num_processors or 0,
        shared_bytes=shared_bytes or 0,
    )
