"""kron_linear and alore against the float64 oracle, forward and every gradient, with eager's error as the budget."""

import pytest
import torch
from op_cases import DTYPES, LEADS, SQUARE, assert_matches_oracle, kron_args, run

from alore_ext import ops

RECTANGULAR = [
    pytest.param(dims, id="E{}-s{}x{}-p{}x{}-r{}".format(*dims))
    for dims in [(2, 3, 5, 7, 4, 3), (5, 1, 6, 9, 2, 4), (3, 6, 1, 2, 11, 1), (1, 2, 4, 10, 5, 17)]
]


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("dims", SQUARE + RECTANGULAR)
def test_kron_linear_shapes(dims, dtype, factor_dtype, device):
    assert_matches_oracle("kron_linear", kron_args(dims, (19,), dtype, factor_dtype, device))


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("dims", SQUARE)
def test_alore_shapes(dims, dtype, factor_dtype, device):
    assert_matches_oracle("alore", kron_args(dims, (19,), dtype, factor_dtype, device))


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("op", ["kron_linear", "alore"])
def test_leading_axes(op, lead, dtype, factor_dtype, device):
    assert_matches_oracle(op, kron_args((3, 3, 3, 7, 7, 5), lead, dtype, factor_dtype, device))


def test_alore_takes_unequal_blocks_of_equal_total(device):
    assert_matches_oracle("alore", kron_args((2, 4, 6, 9, 6, 3), (19,), torch.float32, None, device))


@pytest.mark.parametrize("dims", SQUARE)
def test_zero_up_is_the_identity(dims, device):
    """DESIGN section 2: U = 0 at step 0, and then alore returns x itself, bit for bit."""
    args = kron_args(dims, (19,), torch.bfloat16, torch.float32, device)
    args["up"].zero_()
    assert torch.equal(run(ops, "alore", args)[0], args["x"])


def test_sixteen_bit_activations_leave_float32_factor_gradients_unrounded(device):
    """Gradients of float32 factors are sums in float32, not 16-bit sums that were cast."""
    args = kron_args((4, 4, 4, 24, 24, 4), (197,), torch.bfloat16, torch.float32, device)
    _, grads = run(ops, "kron_linear", args, torch.ones_like(args["x"]))
    for name in ("scale", "down", "up"):
        assert (grads[name] != grads[name].bfloat16().float()).float().mean() > 0.9, name
