"""Strided, transposed, expanded, misaligned and sliced tensors give what their contiguous copies give."""

import pytest
import torch
from op_cases import (
    KRON_OPS,
    LAYOUTS,
    OPS,
    assert_close_to_oracle,
    assert_matches_oracle,
    kron_args,
    misaligned,
    output_like,
    run,
    small_args,
    strided,
)

from alore_ext import ops


def tensor_names(args):
    return [name for name, value in args.items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS)
def test_each_argument(op, layout, device):
    for name in tensor_names(small_args(op)):
        args = small_args(op, device, lead=(2, 3))
        args[name] = layout(args[name])
        assert_close_to_oracle(op, args)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS)
def test_grad_out(op, layout, device):
    args = small_args(op, device, lead=(2, 3))
    assert_close_to_oracle(op, args, layout(output_like(op, args)))


@pytest.mark.parametrize("op", OPS)
def test_grad_out_of_a_sum_and_of_a_mean_over_tokens(op, device):
    args = small_args(op, device, lead=(2, 3))
    like = output_like(op, args)
    assert_close_to_oracle(op, args, torch.ones((), dtype=like.dtype, device=device).expand_as(like))
    assert_close_to_oracle(op, args, like[:, :1].expand_as(like))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_everything_misaligned_at_once(op, dtype, device):
    """Vector loads must not assume more than an element's own alignment."""
    args = small_args(op, device, lead=(19,), dtype=dtype)
    for name in tensor_names(args):
        args[name] = misaligned(args[name])
    assert_matches_oracle(op, args)


@pytest.mark.parametrize("op", OPS)
def test_results_are_contiguous_and_inputs_untouched(op, device):
    args = {
        name: strided(value) if isinstance(value, torch.Tensor) else value
        for name, value in small_args(op, device, lead=(2, 3)).items()
    }
    before = {name: args[name].clone() for name in tensor_names(args)}
    y, grads = run(ops, op, args, strided(output_like(op, args)))
    assert y.is_contiguous() and all(grad.is_contiguous() for grad in grads.values())
    for name, value in before.items():
        assert torch.equal(args[name], value), name


@pytest.mark.parametrize("op", ["alore", "layer_norm_alore"])
def test_seed_may_be_an_element_of_a_larger_tensor(op, device):
    args = small_args(op, device)
    seeds = torch.tensor([1, 2, 3], device=device)
    function = getattr(torch.ops.alore_ext, op)
    sliced = function(*args.values(), seeds[1:2], 0.5)
    whole = function(*args.values(), torch.tensor([2], device=device), 0.5)
    assert torch.equal(torch.as_tensor(sliced[0]), torch.as_tensor(whole[0]))


@pytest.mark.parametrize("op", KRON_OPS)
def test_channels_last_feature_map(op, device):
    """An NHWC view of an NCHW tensor, as ConvNeXt's permute gives it."""
    args = small_args(op, device)
    channels = kron_args(lead=(2, 5, 7), device=device)["x"]
    args["x"] = channels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not args["x"].is_contiguous()
    assert_close_to_oracle(op, args)
