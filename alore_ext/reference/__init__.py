"""The operators of `alore_ext.ops` in plain PyTorch: same names, same signatures, written to be read.

They are the oracle of the tests (call them in float64) and the definition of what the kernels compute. They
are not fast, and they check nothing: `alore_ext.ops` does. Arithmetic is in float64 where any input is
float64 and in float32 otherwise; the result has the dtype of `x` (or of the weight that a merge changes).
"""

from .axial import axial_shift, axial_shift_pair
from .channels import alore_channels, layer_norm_alore_channels, mlae_channels
from .grouped import (
    alore_grouped,
    kron_linear_grouped,
    layer_norm_alore_grouped,
    masked_lora_linear_grouped,
)
from .kron import alore, kron_linear, kron_weight, layer_norm_alore, merge_kron_
from .lora import layer_norm_mlae_linear, masked_lora_linear, merge_lora_

__all__ = [
    "alore",
    "alore_channels",
    "alore_grouped",
    "axial_shift",
    "axial_shift_pair",
    "kron_linear",
    "kron_linear_grouped",
    "kron_weight",
    "layer_norm_alore",
    "layer_norm_alore_channels",
    "layer_norm_alore_grouped",
    "layer_norm_mlae_linear",
    "masked_lora_linear",
    "masked_lora_linear_grouped",
    "merge_kron_",
    "merge_lora_",
    "mlae_channels",
]
