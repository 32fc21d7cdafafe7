"""Adapters for the pool's tests: random ones of every method, with classifiers of several sizes."""

import copy
from collections import OrderedDict

import torch
from backbones import train_adapters_
from safetensors.torch import save_file
from torch import nn

import alore_ext as ae

CONFIGS = {
    "alore": lambda row: ae.AloreConfig(),
    "alore_everywhere": lambda row: ae.AloreConfig(2, 3, locations=row.locations, layers=(0, 2), share_scale=False),
    "mlae": lambda row: ae.MlaeConfig(),
    "mlae_everywhere": lambda row: ae.MlaeConfig(4, 2, 0.3, 0.5, targets=row.targets, layers=(1, 2)),
    "lora": lambda row: ae.LoraConfig(rank=3, alpha=5, targets=row.targets),
    "both": lambda row: [
        ae.AloreConfig(locations=("before_ffn",)),
        ae.MlaeConfig(targets=[role for role in row.targets if role != "fc1"]),
    ],
}


def adapter_file(base: nn.Module, config, path, classes: int | None = None, labels=None):
    """A file with a random adapter for `base`, which stays plain, and a classifier of so many classes."""
    model = ae.patch(copy.deepcopy(base), config)
    train_adapters_(model)
    if classes is None:
        return ae.save_adapter(model, path, labels=labels)
    tensors = resized_head(ae.adapter_state_dict(model), classes)
    contents = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(contents, path, tensors._metadata)
    return path


def resized_head(tensors: OrderedDict, classes: int) -> OrderedDict:
    """The same adapter with another random classifier: linears get so many rows, norms keep their shape."""
    resized, linears = copy.copy(tensors), set()
    adapters = ("down", "up", "scale", "lora_a", "lora_b", "coeff", "alore_scale")
    head = {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in adapters}
    for name, value in head.items():
        if value.dim() == 2:
            linears.add(name.rpartition(".")[0])
            resized[name] = torch.randn(classes, value.shape[1], dtype=value.dtype) * value.shape[1] ** -0.5
    for name, value in head.items():
        if value.dim() == 1:
            size = classes if name.rpartition(".")[0] in linears else len(value)
            resized[name] = torch.randn(size, dtype=value.dtype)
    resized._metadata = tensors._metadata
    return resized


def own_model(base: nn.Module, path) -> nn.Module:
    """A model of its own for an adapter: what the pool's answers are compared with."""
    return ae.load_adapter(copy.deepcopy(base), path).eval()
