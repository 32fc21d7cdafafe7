"""Swapping a layer's class and giving it back."""

import copy
import pickle

import pytest
import torch
from torch import nn

from alore_ext import reference
from alore_ext.modules import Adapter, AloreLayerNorm, AloreLinear, AloreNorm, MlaeLinear, attach, detach


class OwnNorm(nn.LayerNorm):
    """A norm whose forward uses zero-argument super and a method of its class."""

    def forward(self, x):
        return self.shift(super().forward(x))

    def shift(self, x):
        return x + 1


def alore_parameters(width, num_experts=2, rank=3):
    p = width // num_experts
    return {
        "down": nn.Parameter(torch.randn(num_experts, p, rank)),
        "up": nn.Parameter(torch.randn(num_experts, rank, p)),
        "scale": nn.Parameter(torch.randn(num_experts, num_experts, num_experts)),
    }


def own_scale(dropout=0.0):
    return {"_alore_root": None, "_alore_dropout": dropout}


CASES = [(nn.LayerNorm, AloreLayerNorm), (OwnNorm, AloreNorm), (nn.RMSNorm, AloreNorm)]


@pytest.mark.parametrize(("kind", "adapter"), CASES, ids=["LayerNorm", "OwnNorm", "RMSNorm"])
def test_norm_with_adapter_is_norm_then_alore(kind, adapter, device):
    layer = kind(8).to(device)
    x = torch.randn(5, 8, device=device)
    plain = layer(x)
    parameters = alore_parameters(8)
    layer.to("cpu")
    attach(layer, adapter, parameters, own_scale())
    layer.to(device)
    expected = reference.alore(plain, layer.scale, layer.down, layer.up)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(layer, kind) and isinstance(layer, adapter)


def test_linear_with_adapter_behind(device):
    layer = nn.Linear(6, 8).to(device)
    x = torch.randn(5, 6, device=device)
    plain = layer(x)
    attach(layer, AloreLinear, alore_parameters(8), own_scale())
    layer.to(device)
    expected = reference.alore(plain, layer.scale, layer.down, layer.up)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_detach_gives_back_the_very_layer():
    layer = OwnNorm(8)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = dict(layer.__dict__)
    x = torch.randn(3, 8)
    plain = layer(x)
    parameters = alore_parameters(8)
    attach(layer, AloreNorm, parameters, own_scale())
    assert list(layer.state_dict()) == ["weight", "bias", "down", "up", "scale"]
    assert not torch.equal(layer(x), plain)
    assert len(calls) == 2  # hooks stay
    taken = detach(layer)
    assert {name: id(p) for name, p in taken.items()} == {name: id(p) for name, p in parameters.items()}
    assert type(layer) is OwnNorm and layer.__dict__.keys() == before.keys()
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(x), plain)


def test_adapted_class_is_one_per_pair():
    layers = [nn.Linear(4, 4) for _ in range(2)] + [nn.LayerNorm(4)]
    for layer in layers:
        attach(layer, AloreLinear, alore_parameters(4), own_scale())
    assert type(layers[0]) is type(layers[1]) is not type(layers[2])
    assert type(layers[0]).__name__ == "AloreLinear"


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_adapted_and_apart(copier):
    layer = nn.Linear(6, 8)
    attach(layer.eval(), AloreLinear, alore_parameters(8), own_scale())
    twin = copier(layer)
    assert twin.training is False
    x = torch.randn(2, 6)
    assert type(twin) is type(layer) and torch.equal(twin(x), layer(x))
    assert twin.up is not layer.up
    with torch.no_grad():
        twin.up.zero_()
    assert not torch.equal(twin(x), layer(x))
    detach(twin)
    assert type(twin) is nn.Linear and isinstance(layer, Adapter)


def test_shallow_copy_shares():
    layer = nn.Linear(6, 8)
    attach(layer, AloreLinear, alore_parameters(8), own_scale())
    twin = copy.copy(layer)
    assert type(twin) is type(layer) and twin.up is layer.up


def mlae_layer(expert_rank=1, mask_p=0.5, num_experts=4):
    layer = nn.Linear(6, 8)
    total = num_experts * expert_rank
    parameters = {
        "lora_a": nn.Parameter(torch.randn(total, 6)),
        "lora_b": nn.Parameter(torch.randn(8, total)),
        "coeff": nn.Parameter(torch.rand(num_experts) + 0.5),
    }
    attributes = {"_mlae_mask_p": mask_p, "_mlae_expert_rank": expert_rank, "_mlae_bias_owner": None}
    attach(layer, MlaeLinear, parameters, attributes)
    return layer


def test_mlae_masks_whole_experts_for_the_whole_batch(device):
    layer = mlae_layer(expert_rank=2).to(device).train()
    x = torch.randn(5, 6, device=device)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    parts = torch.stack(
        [
            layer.coeff[i] * (x @ layer.lora_a[2 * i : 2 * i + 2].T) @ layer.lora_b[:, 2 * i : 2 * i + 2].T
            for i in range(4)
        ]
    )
    masks = set()
    for _ in range(40):
        branch = layer(x) - base
        # Each step's branch is 1/(1-p) times the sum over some subset of the experts: find the subset.
        subsets = [mask for mask in range(16) if torch.allclose(branch, _subset(parts, mask) / 0.5, atol=1e-4)]
        assert len(subsets) == 1
        masks.update(subsets)
    assert len(masks) > 6  # drawn anew at each step


def _subset(parts, mask):
    chosen = torch.tensor([mask >> i & 1 for i in range(4)], device=parts.device, dtype=parts.dtype)
    return torch.einsum("e,e...->...", chosen, parts)


def test_mlae_has_no_mask_at_inference(device):
    layer = mlae_layer().to(device).eval()
    x = torch.randn(5, 6, device=device)
    expected = reference.masked_lora_linear(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.coeff)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_repr_tells_the_adapter():
    assert "mlae: experts=4, expert_rank=1, mask_p=0.5" in repr(mlae_layer())
    layer = nn.LayerNorm(8)
    attach(layer, AloreLayerNorm, alore_parameters(8), own_scale(0.1))
    assert "alore: experts=2, rank=3, dropout=0.1, own scale" in repr(layer)
