"""MLAE layers: a linear with masked rank-1 experts beside its weight.

Masks under DistributedDataParallel: every process draws from its own generator. Seeded apart (`seed + rank`, the usual
recipe), each rank trains another subset of experts at a step and the averaged gradient is that of a sample of several
masks: unbiased, with less noise than one mask. Seeded alike, or not seeded (torch starts every process from the same
default), all ranks draw one mask, as one device would for the whole batch, as long as they make the same draws in the
same order. Nothing is sent between ranks for either. Every rank computes gradients for masked experts too (exact
zeros), so DistributedDataParallel never finds a parameter unused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alore_ext import ops
from alore_ext.ops.lora import fuses_norm

from .adapter import Adapter
from .experts import keep_lora_experts


class MlaeAdapter(Adapter):
    """What a linear and a convolution with masked experts share."""

    adapter_parameters = ("lora_a", "lora_b", "coeff")
    adapter_attributes = ("_mlae_mask_p", "_mlae_expert_rank", "_kept_experts")

    _mlae_mask_p: float
    _mlae_expert_rank: int

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """lora_a, lora_b and coeff of the experts that run."""
        return keep_lora_experts(self.lora_a, self.lora_b, self.coeff, self._kept_experts, self._mlae_expert_rank)

    def extra_repr(self) -> str:
        experts = f"mlae: experts={self.coeff.numel()}, expert_rank={self._mlae_expert_rank}"
        return f"{super().extra_repr()}, {experts}, mask_p={self._mlae_mask_p}"


@dataclass(frozen=True)
class _Ahead:
    """What a linear gives for the output of the norm before it, computed together with that."""

    normalised: Tensor
    version: int
    out: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Whether x is that output, and has not been written to since."""
        return x is self.normalised and x._version == self.version


class MlaeLinear(MlaeAdapter):
    """`y = x W^T + b + ((x A^T) * c) B^T`, c the coefficients under this step's mask (MLAE equations 4 to 6).

    `lora_a` [R, in_features], `lora_b` [out_features, R], `coeff` [num_experts], R = num_experts *
    expert_rank. The mask is drawn anew at every training forward, one for the whole batch, with the kept
    experts scaled by 1 / (1 - p).
    """

    adapter_attributes = (*MlaeAdapter.adapter_attributes, "_mlae_bias_owner")

    # The attention that keeps this linear's bias as q_bias, k_bias and v_bias; None where the linear has its
    # own.
    _mlae_bias_owner: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        if not torch.compiler.is_compiling():
            ahead = self.__dict__.pop("_mlae_ahead", None)
            if ahead is not None and ahead.is_of(x):
                return ahead.out
        return ops.mlae_linear(x, self.weight, self._bias(), *self._factors(), self._mlae_mask_p, self.training)

    def _bias(self) -> Tensor | None:
        owner = self._mlae_bias_owner
        return self.bias if owner is None else owner.joint_bias()


class MlaeNorm(Adapter):
    """A layer norm whose output goes into an `MlaeLinear`: it computes that linear as well, in one operator.

    It returns what the norm returns. What the linear makes of it waits at the linear, which gives it out when it is
    called on this very tensor and computes anew when it is called on anything else, so that hooks and other readers of
    the norm's output see and do what they always did. Only where the fused kernels run, and not under autocast (the
    norm is float32 there), torch.compile (which fuses the norm itself), inference mode (whose tensors do not tell that
    they were written to) or forward pre-hooks of the linear: there the two are what they are apart.
    """

    adapter_attributes = ("_mlae_behind",)

    _mlae_behind: MlaeLinear

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> layer_norm(x)."""
        if torch.compiler.is_compiling() or not self._computes_ahead(x):
            return super().forward(x)
        linear = self._mlae_behind
        out, normalised = ops.layer_norm_mlae_linear(
            x,
            self.weight,
            self.bias,
            self.eps,
            linear.weight,
            linear._bias(),
            *linear._factors(),
            linear._mlae_mask_p,
            linear.training,
        )
        linear.__dict__["_mlae_ahead"] = _Ahead(normalised, normalised._version, out)
        return normalised

    def _computes_ahead(self, x: Tensor) -> bool:
        if type(x) is not Tensor or not x.is_cuda:
            return False
        linear = self._mlae_behind
        weight = linear._parameters.get("weight")
        # Sharding and offloading bring a layer's weights when it is called, by a hook or a forward of its own.
        if linear._forward_pre_hooks or "forward" in linear.__dict__ or type(weight) is not nn.Parameter:
            return False
        rank = linear.lora_a.shape[0]
        if weight.device != x.device or not fuses_norm(x.device, weight.shape, rank, x.dtype, weight.dtype):
            return False
        # Gradients of the backbone's own weights need the norm's output.
        trained = weight.requires_grad or any(p is not None and p.requires_grad for p in (self.weight, self.bias))
        return not (trained or torch.is_autocast_enabled("cuda") or torch.is_inference_mode_enabled())


class FusedBiasAttention(Adapter):
    """timm's BEiT or EVA attention, whose forward would go around its qkv module.

    Those compute `F.linear(x, self.qkv.weight, cat(q_bias, k_bias, v_bias))`, but call `self.qkv(x)` when
    `q_bias` is None. Here `q_bias` reads as None, so that timm's own forward calls the adapted qkv, which
    asks `joint_bias` for what is still registered under the old names.
    """

    q_bias = property(lambda self: None)

    def joint_bias(self) -> Tensor:
        """[3 * attn_dim], the biases of q, k and v as registered."""
        registered = {**self._parameters, **self._buffers}
        return torch.cat([registered[name] for name in ("q_bias", "k_bias", "v_bias")])
