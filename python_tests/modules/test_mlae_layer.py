"""MlaeLinear inside models: masks over several passes, checkpointing, precision, and what is launched."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alore_ext import ops, reference
from alore_ext.modules import MlaeLinear, attach


def mlae_linear(in_features=24, out_features=40, num_experts=8, expert_rank=1, mask_p=0.5, device="cpu"):
    layer = nn.Linear(in_features, out_features)
    total = num_experts * expert_rank
    parameters = {
        "lora_a": nn.Parameter(torch.randn(total, in_features) / in_features**0.5),
        "lora_b": nn.Parameter(torch.randn(out_features, total) / total**0.5),
        "coeff": nn.Parameter(torch.rand(num_experts) + 0.5),
    }
    attach(
        layer,
        MlaeLinear,
        parameters,
        {"_mlae_mask_p": mask_p, "_mlae_expert_rank": expert_rank, "_mlae_bias_owner": None},
    )
    for name in ("weight", "bias"):
        getattr(layer, name).requires_grad_(False)
    return layer.to(device)


def step(module, x, run=None):
    module.zero_grad()
    y = (run or module)(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in module.parameters() if p.requires_grad)]


def assert_all_equal(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("expert_rank", [1, 3])
def test_inference_is_the_plain_sum_of_experts(expert_rank, device):
    layer = mlae_linear(expert_rank=expert_rank, device=device).eval()
    x = torch.randn(2, 19, 24, device=device)
    coeff = layer.coeff.repeat_interleave(expert_rank)
    expected = reference.masked_lora_linear(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, coeff)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_a_step_is_reproducible_and_the_next_one_differs(device):
    layer, x = mlae_linear(device=device), torch.randn(19, 24, device=device)
    torch.manual_seed(1)
    first, second = step(layer, x), step(layer, x)
    torch.manual_seed(1)
    assert_all_equal(first, step(layer, x))
    assert not torch.equal(first[0], second[0])


def test_each_layer_draws_its_own_mask(device):
    model = nn.Sequential(*(mlae_linear(24, 24, device=device) for _ in range(6)))
    step(model, torch.randn(19, 24, device=device))
    masks = [layer.coeff.grad == 0 for layer in model]
    assert any(mask.any() for mask in masks)
    assert any(not torch.equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant, device):
    model = nn.Sequential(mlae_linear(24, 24, device=device), nn.GELU(), mlae_linear(24, 24, device=device))
    x = torch.randn(19, 24, device=device, requires_grad=True)
    torch.manual_seed(2)
    plain = step(model, x)
    torch.manual_seed(2)
    checkpointed = step(model, x, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert_all_equal(plain, checkpointed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(dtype, device):
    """Autocast over float32 masters, which folds, and a 16-bit backbone under float32 adapters, which must not."""
    x = torch.randn(19, 24, device=device)
    results = []
    for stored in (torch.float32, dtype):
        torch.manual_seed(0)
        layer = mlae_linear(mask_p=0.0, device=device)
        layer.weight.data, layer.bias.data = layer.weight.to(stored), layer.bias.to(stored)
        with torch.autocast(device.type, dtype, enabled=stored == torch.float32):
            y = layer(x.to(stored))
        assert y.dtype == dtype
        y.float().square().mean().backward()
        assert layer.lora_a.grad.dtype == layer.coeff.grad.dtype == torch.float32
        results.append([y.detach().float(), layer.lora_a.grad, layer.lora_b.grad, layer.coeff.grad])
    for folded, side in zip(*results, strict=True):
        torch.testing.assert_close(folded, side, rtol=0.05, atol=0.05 * side.abs().max().item())


def test_the_forward_is_one_op(device):
    """No dropout, repeat or cast around it: every launch of the adapter is the op's own."""
    layer, x = mlae_linear(expert_rank=2, device=device), torch.randn(19, 24, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    top = [event.name for event in profile.events() if event.cpu_parent is None and "::" in event.name]
    assert [name for name in top if not name.startswith("profiler::")] == ["alore_ext::mlae_linear"], top


def test_plan_of_a_layer_prints(device):
    layer, x = mlae_linear(device=device), torch.randn(19, 24, device=device)
    assert "forward=gemm" in repr(ops.plan_lora(x, layer.weight, layer.lora_a))
