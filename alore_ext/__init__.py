"""CUDA and C++ kernels for re-parameterisable fine-tuning of vision backbones: ALoRE and MLAE.

import alore_ext as ae

ae.patch(model, ae.AloreConfig(num_experts=4, rank=4))   # in place; only adapters and the head train
...                                                      # your training loop, unchanged
ae.save_adapter(model, "pets.safetensors")
ae.merge_and_unload(model)                               # the plain backbone again, at its own speed
"""

from . import ops, reference  # noqa: I001  (the extension loads first)
from ._extension import build_info
from .checkpoint import adapter_state_dict, load_adapter, save_adapter
from .config import AloreConfig, BitFitConfig, LoraConfig, MlaeConfig, RepAdapterConfig, SsfConfig
from .exporting import export
from .merging import merge_, merge_and_unload, unmerge_
from .peft_files import export_peft, load_peft
from .patching import patch, patch_as_mlp, patch_convnext, patch_swin, patch_vit, unpatch
from .retention import retain_experts
from .patching.support import SupportedModel, supported_models
from .summary import trainable_summary
from .verification import VerificationError, VerificationReport, verify

__version__ = build_info()["version"]

__all__ = [
    "AloreConfig",
    "BitFitConfig",
    "LoraConfig",
    "MlaeConfig",
    "RepAdapterConfig",
    "SsfConfig",
    "SupportedModel",
    "VerificationError",
    "VerificationReport",
    "adapter_state_dict",
    "build_info",
    "export",
    "export_peft",
    "load_adapter",
    "load_peft",
    "merge_",
    "merge_and_unload",
    "ops",
    "patch",
    "patch_as_mlp",
    "patch_convnext",
    "patch_swin",
    "patch_vit",
    "reference",
    "retain_experts",
    "save_adapter",
    "supported_models",
    "trainable_summary",
    "unmerge_",
    "unpatch",
    "verify",
]
