"""Under autocast: which dtype comes out, which gradients come back, and how exact they are."""

import pytest
import torch
from op_cases import EAGER, OPS, assert_within_budget, leaves, output_like, run, small_args, to_double

from alore_ext import ops, reference

LOW = [torch.bfloat16, torch.float16]
OTHER = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}


def run_autocast(library, op, args, grad_out, low):
    """Output and gradients by name, forward under autocast and backward outside, as a training step has it."""
    inputs = leaves(args)
    with torch.autocast(args["x"].device.type, low):
        y = getattr(library, op)(*inputs.values())
    wanted = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    grads = torch.autograd.grad(y, list(wanted.values()), grad_out.to(y.dtype))
    return y.detach(), dict(zip(wanted, grads, strict=True))


def assert_autocast_matches_oracle(op, args, low):
    grad_out = output_like(op, args).to(low).to(args["x"].dtype)
    got, got_grads = run_autocast(ops, op, args, grad_out, low)
    eager, eager_grads = run_autocast(EAGER, op, args, grad_out, low)
    oracle, oracle_grads = run(reference, op, to_double(args), grad_out.double())
    assert got.dtype == low
    # The budget is that of the autocast dtype, even for a gradient that comes back in float32.
    assert_within_budget(got, oracle, eager, f"{op} output")
    for name, grad in got_grads.items():
        assert grad.dtype == args[name].dtype, name
        assert_within_budget(grad.to(low), oracle_grads[name], eager_grads[name], f"{op} gradient of {name}")


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("op", OPS)
def test_float32_inputs(op, low, device):
    assert_autocast_matches_oracle(op, small_args(op, device, lead=(2, 19), dtype=torch.float32), low)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("op", OPS)
def test_sixteen_bit_inputs_with_float32_factors(op, low, device):
    args = small_args(op, device, lead=(2, 19), dtype=low, factor_dtype=torch.float32)
    assert_autocast_matches_oracle(op, args, low)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("op", OPS)
def test_inputs_of_the_other_sixteen_bit_type(op, low, device):
    """A bfloat16 model under autocast to float16 (CUDA's default): everything is brought to the autocast dtype."""
    assert_autocast_matches_oracle(op, small_args(op, device, lead=(2, 19), dtype=OTHER[low]), low)


@pytest.mark.parametrize("op", OPS)
def test_float64_is_left_alone(op, device):
    args = small_args(op, device)
    with torch.autocast(device.type, torch.bfloat16):
        y, _ = run(ops, op, args)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, run(reference, op, args)[0])


@pytest.mark.parametrize("op", ["alore", "layer_norm_alore"])
def test_dropout_mask_is_that_of_the_seed(op, device):
    """Autocast passes seed and probability on; with another mask, elements would be off by a branch's size."""
    args = small_args(op, device, lead=(64,), dtype=torch.float32)
    torch.manual_seed(5)
    full = getattr(ops, op)(*args.values(), 0.5)
    torch.manual_seed(5)
    with torch.autocast(device.type, torch.bfloat16):
        low = getattr(ops, op)(*args.values(), 0.5)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("op", OPS)
def test_disabled_autocast_changes_nothing(op, device):
    args = small_args(op, device, dtype=torch.float32)
    expected = run(ops, op, args)[0]
    with torch.autocast(device.type, torch.bfloat16, enabled=False):
        assert torch.equal(run(ops, op, args)[0], expected)


def test_gradient_scaler_overflow_shows(device):
    """An fp16 overflow must come out as inf or NaN, never as a saturated finite number: GradScaler looks for it."""
    args = small_args("layer_norm_alore", device, lead=(19,), dtype=torch.float32)
    args["up"] *= 1e6
    with torch.autocast(device.type, torch.float16):
        y = ops.layer_norm_alore(*args.values())
    assert not y.isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_backward_inside_the_region_is_that_outside(op, device):
    """Autocast lowers what it finds in a backward, but not what our own backward ops do inside."""
    args = small_args(op, device, lead=(2, 19), dtype=torch.float32)
    grad_out = output_like(op, args)
    inputs = leaves(args)
    wanted = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    y = getattr(ops, op)(*inputs.values())
    outside = torch.autograd.grad(y, wanted, grad_out, retain_graph=True)
    with torch.autocast(device.type, torch.bfloat16):
        inside = torch.autograd.grad(y, wanted, grad_out)
    assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize("side", ["before", "after"])
def test_merges_are_not_lowered(side, device):
    weight, bias = torch.randn(12, 12, device=device), torch.randn(12, device=device)
    kron = [torch.randn(shape, device=device) for shape in ((3, 3, 3), (3, 4, 2), (3, 2, 4))]
    lora = [torch.randn(shape, device=device) for shape in ((5, 12), (12, 5), (5,))]
    plain, lowered = (weight.clone(), bias.clone()), (weight.clone(), bias.clone())
    for (w, b), enabled in ((plain, False), (lowered, True)):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            ops.merge_kron_(w, b, *kron, side)
            ops.merge_lora_(w, *lora)
    assert torch.equal(plain[0], lowered[0]) and torch.equal(plain[1], lowered[1])
