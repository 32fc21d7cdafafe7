"""Adapter files of the bundled ViT: random factors, as large as after training, and class names."""

import torch

import alore_ext as ae
from alore_ext.models import tiny_vit

CONFIGS = {
    "kronecker": (ae.AloreConfig(num_experts=4, rank=2), 3),
    "masked": (ae.MlaeConfig(num_experts=4), 6),
    "lora": (ae.LoraConfig(rank=4), 11),
}


def write_adapter(folder, name, config, num_classes, seed, **options):
    """An adapter file; returns the patched model that it was saved from."""
    torch.manual_seed(seed)
    model = ae.patch(tiny_vit(num_classes=num_classes), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.15)
    options = {"labels": [f"{name} {number}" for number in range(num_classes)]} | options
    ae.save_adapter(model, folder / f"{name}.safetensors", **options)
    return model


def write_all(folder):
    """One file a method; name -> patched model."""
    return {
        name: write_adapter(folder, name, config, classes, seed)
        for seed, (name, (config, classes)) in enumerate(CONFIGS.items())
    }
