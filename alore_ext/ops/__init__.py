"""The operators, on CPU and CUDA, with autograd, autocast and `torch.compile` support.

`alore_ext.reference` holds the same functions in plain PyTorch. All of them take float64, float32, bfloat16 and
float16 activations; low-rank factors have the activations' dtype, or float32 under 16-bit activations, and their
gradients have their own dtype. Shape and dtype errors are `RuntimeError`s that say what was expected and what came.
"""

from .axial import axial_shift, axial_shift_pair
from .channels import alore_channels, layer_norm_alore_channels, mlae_channels
from .grouped import (
    alore_grouped,
    kron_linear_grouped,
    layer_norm_alore_grouped,
    masked_lora_linear_grouped,
    plan_lora_grouped,
)
from .kron import alore, kron_linear, layer_norm_alore, plan_alore, plan_kron
from .lora import (
    layer_norm_mlae_linear,
    masked_lora_linear,
    mlae_linear,
    plan_layer_norm_mlae_linear,
    plan_lora,
)
from .merge import (
    merge_kron_,
    merge_kron_grouped_,
    merge_lora_,
    merge_lora_grouped_,
    plan_merge_kron,
    plan_merge_lora,
)

__all__ = [
    "alore",
    "alore_channels",
    "alore_grouped",
    "axial_shift",
    "axial_shift_pair",
    "kron_linear",
    "kron_linear_grouped",
    "layer_norm_alore",
    "layer_norm_alore_channels",
    "layer_norm_alore_grouped",
    "layer_norm_mlae_linear",
    "masked_lora_linear",
    "masked_lora_linear_grouped",
    "merge_kron_",
    "merge_kron_grouped_",
    "merge_lora_",
    "mlae_channels",
    "mlae_linear",
    "plan_alore",
    "merge_lora_grouped_",
    "plan_kron",
    "plan_layer_norm_mlae_linear",
    "plan_lora",
    "plan_lora_grouped",
    "plan_merge_kron",
    "plan_merge_lora",
]
