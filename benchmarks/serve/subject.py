"""What is served: one backbone, random adapters of each method, and PEFT's counterparts."""

import copy
import tempfile
from pathlib import Path

import timm
import torch

import alore_ext as ae
from alore_ext.serving import AdapterPool

LORA_RANK = 8
CONFIGS = {
    "alore": ae.AloreConfig(num_experts=4, rank=4),
    "mlae": ae.MlaeConfig(num_experts=8),
    "lora": ae.LoraConfig(rank=LORA_RANK),  # on qkv, as PEFT's
}
# So large that another adapter's factors under the right classifier move a logit by more than bf16 rounds it:
# `_check` would not see them otherwise. On ViT-B 0.49 and 0.35 of the largest logit.
STD = {"up": 0.04, "lora_b": 0.1}
# Of the backbone's linears, standard deviation times sqrt(in_features). timm's start (0.02) has near-uniform attention,
# which no trained model has and which adapters of this size would undo.
GAIN = 1.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build(args, device):
    """The backbone, of random weights, frozen and in eval mode."""
    model = timm.create_model(args.model, num_classes=args.classes, **args.model_kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=GAIN / module.in_features**0.5)
    return model.to(device, DTYPES[args.dtype]).eval().requires_grad_(False)


@torch.no_grad()
def file_bytes(base, method):
    """Size of an adapter's file, classifier included; `base` stays as it is."""
    ae.patch(base, CONFIGS[method])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ae.save_adapter(base, path)
        size = path.stat().st_size
    ae.unpatch(base)
    return size


@torch.no_grad()
def adapter(base, method, seed):
    """A random adapter for `base`, as its state dict; `base` stays as it is."""
    torch.manual_seed(seed)
    ae.patch(base, CONFIGS[method])
    tensors = ae.adapter_state_dict(base)
    ae.unpatch(base)
    tensors["head.weight"] = torch.empty_like(tensors["head.weight"]).normal_(0.0, 0.05)
    for name, value in tensors.items():
        if own_std := STD.get(name.rpartition(".")[2]):
            value.normal_(0.0, own_std)
    return tensors


def pool_of(base, counts):
    """A pool over a copy of `base` with so many adapters of each method, named "alore0", "alore1", ..."""
    pool = AdapterPool(copy.deepcopy(base))
    for method, count in counts.items():
        for i in range(count):
            pool.add(f"{method}{i}", adapter(base, method, seed=i))
    return pool


def peft_model(base, count, targets=r".*\.qkv"):
    """The backbone under PEFT with so many LoRA adapters of rank 8, named "task0", "task1", ..."""
    import peft

    def config():
        return peft.LoraConfig(r=LORA_RANK, target_modules=targets, init_lora_weights=False)

    model = peft.get_peft_model(copy.deepcopy(base), config(), adapter_name="task0")
    for i in range(1, count):
        model.add_adapter(f"task{i}", config())
    return model.to(next(base.parameters()).dtype).eval()
