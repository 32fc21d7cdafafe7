"""Attentions under a class that calls their linears, and what they are compared by."""

import copy
import pickle

import pytest
import torch
from torch import nn

from alore_ext import reference
from alore_ext.modules import attach

copiers = pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)


def hosted(module, adapter):
    twin = copy.deepcopy(module)
    attach(twin, adapter, {}, {})
    return twin


def grads(module, x, run=None):
    """Output and gradients of x and of every parameter, by name."""
    x = x.detach().requires_grad_()
    y = (module if run is None else run)(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    values = torch.autograd.grad((y * weight).sum(), [x, *parameters])
    return {"y": y.detach(), **dict(zip(["x", *names], values, strict=True))}


def assert_same(ours, plain, tolerance):
    assert ours.keys() == plain.keys()
    largest = max((value.abs().max().item() for name, value in plain.items() if name != "y"), default=None)
    for name, value in plain.items():
        scale = value.abs().max().item() if name == "y" else largest
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


def mlae_factors(in_features, out_features, num_experts=3, expert_rank=2):
    total = num_experts * expert_rank
    return {
        "lora_a": nn.Parameter(torch.randn(total, in_features) / 4),
        "lora_b": nn.Parameter(torch.randn(out_features, total) / 4),
        "coeff": nn.Parameter(torch.rand(num_experts) + 0.5),
    }


def mlae_attributes(mask_p=0.0, **more):
    return {"_mlae_mask_p": mask_p, "_mlae_expert_rank": 2, **more}


def merged_(weight, layer):
    reference.merge_lora_(weight, layer.lora_a, layer.lora_b, layer.coeff.repeat_interleave(2))


def alore_parameters(width, num_experts=2, rank=3):
    p = width // num_experts
    return {
        "down": nn.Parameter(torch.randn(num_experts, p, rank)),
        "up": nn.Parameter(torch.randn(num_experts, rank, p)),
        "scale": nn.Parameter(torch.randn(num_experts, num_experts, num_experts)),
    }


OWN_SCALE = {"_alore_root": None, "_alore_dropout": 0.0}
