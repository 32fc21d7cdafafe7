"""MLAE layers: a linear with masked rank-1 experts beside its weight.

Masks under DistributedDataParallel: every process draws from its own generator. Seeded apart (`seed + rank`, the usual
recipe), each rank trains another subset of experts at a step and the averaged gradient is that of a sample of several
masks: unbiased, with less noise than one mask. Seeded alike, or not seeded (torch starts every process from the same
default), all ranks draw one mask, as one device would for the whole batch, as long as they make the same draws in the
same order. Nothing is sent between ranks for either. Every rank computes gradients for masked experts too (exact
zeros), so DistributedDataParallel never finds a parameter unused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alore_ext import ops

from .adapter import Adapter
from .experts import keep_lora_experts

if TYPE_CHECKING:
    from .mlae_norm import Ahead


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


class MlaeLinear(MlaeAdapter):
    """`y = x W^T + b + ((x A^T) * c) B^T`, c the coefficients under this step's mask (MLAE equations 4 to 6).

    `lora_a` [R, in_features], `lora_b` [out_features, R], `coeff` [num_experts], R = num_experts *
    expert_rank. The mask is drawn anew at every training forward, one for the whole batch, with the kept
    experts scaled by 1 / (1 - p).
    """

    adapter_attributes = (*MlaeAdapter.adapter_attributes, "_mlae_bias_owner", "_mlae_ahead")

    # What the norm before it has computed for it (see `mlae_norm`); on the layer from then until it is called.
    _mlae_ahead: Ahead | None
    # The attention that keeps this linear's bias as q_bias, k_bias and v_bias; None where the linear has its
    # own.
    _mlae_bias_owner: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        if not torch.compiler.is_compiling():
            ahead = self.__dict__.pop("_mlae_ahead", None)
            if ahead is not None and (out := ahead.claim(x, self)) is not None:
                return out
        return ops.mlae_linear(x, self.weight, self._bias(), *self._factors(), self._mlae_mask_p, self.training)

    def _bias(self) -> Tensor | None:
        owner = self._mlae_bias_owner
        return self.bias if owner is None else owner.joint_bias()


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
