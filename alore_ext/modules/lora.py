"""LoRA layers: those of MLAE with one expert, which is never masked, and a coefficient that is a constant."""

from __future__ import annotations

from torch import Tensor

from .adapter import Adapter
from .channels import MlaeConv
from .mlae import MlaeLinear
from .multihead import MlaeMultiheadAttention


class LoraAdapter(Adapter):
    """`lora_a` [rank, in_features], `lora_b` [out_features, rank], and no parameter or buffer besides."""

    adapter_parameters = ("lora_a", "lora_b")
    adapter_attributes = ("_lora_scaling",)

    _lora_scaling: float
    _mlae_mask_p = 0.0

    @property
    def coeff(self) -> Tensor:
        """[1]: made anew where and as the factors are, so that nothing has to follow them to a device or dtype."""
        return self.lora_a.new_full((1,), self._lora_scaling)

    @property
    def _mlae_expert_rank(self) -> int:
        return self.lora_a.shape[0]

    def extra_repr(self) -> str:
        adapter = f"lora: rank={self.lora_a.shape[0]}, scaling={self._lora_scaling:g}"
        # Past MLAE's own line, to the layer's.
        return ", ".join(filter(None, (self.adapter_bases[1].extra_repr(self), adapter)))


class LoraLinear(LoraAdapter, MlaeLinear):
    """`y = x W^T + b + scaling * (x A^T) B^T`."""

    adapter_attributes = ("_lora_scaling", "_mlae_bias_owner", "_mlae_ahead")


class LoraConv(LoraAdapter, MlaeConv):
    """A 1x1 convolution with a low-rank update beside its weight: `LoraLinear` along axis 1."""


class LoraMultiheadAttention(LoraAdapter, MlaeMultiheadAttention):
    """LoRA on the joint input projection [3E, E] of `nn.MultiheadAttention`."""
