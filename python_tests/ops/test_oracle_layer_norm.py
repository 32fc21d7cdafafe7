"""layer_norm_alore against the float64 oracle, forward and every gradient, with eager's error as the budget."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, LEADS, SQUARE, assert_matches_oracle, layer_norm_args, run, to_double

from alore_ext import ops, reference

AFFINES = [("weight", "bias"), ("weight",), ("bias",), ()]


def only_affine(args, present):
    """The arguments with the absent halves of the affine set to None."""
    return {n: None if n in ("weight", "bias") and n not in present else v for n, v in args.items()}


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("dims", SQUARE)
def test_shapes(dims, dtype, factor_dtype, device):
    assert_matches_oracle("layer_norm_alore", layer_norm_args(dims, (19,), dtype, factor_dtype, device))


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_leading_axes(lead, dtype, factor_dtype, device):
    assert_matches_oracle("layer_norm_alore", layer_norm_args((3, 3, 3, 7, 7, 5), lead, dtype, factor_dtype, device))


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("present", AFFINES, ids=lambda names: "+".join(names) or "none")
def test_affine(present, dtype, factor_dtype, device):
    args = layer_norm_args((3, 3, 3, 7, 7, 5), (19,), dtype, factor_dtype, device)
    assert_matches_oracle("layer_norm_alore", only_affine(args, present))


@pytest.mark.parametrize("present", AFFINES, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_affine_under_sixteen_bit_activations(present, dtype, device):
    args = layer_norm_args((3, 3, 3, 7, 7, 5), (19,), dtype, torch.float32, device, affine_dtype=torch.float32)
    assert_matches_oracle("layer_norm_alore", only_affine(args, present))


def test_mean_large_beside_the_spread(device):
    """A float32 mean of 3000 is known to 2e-4 and no better; a one-pass variance would be off by its own size."""
    args = layer_norm_args((4, 4, 4, 24, 24, 4), (197,), torch.float32, None, device)
    args["x"] += 3000
    grad_out = torch.ones_like(args["x"])
    got, got_grads = run(ops, "layer_norm_alore", args, grad_out)
    oracle, oracle_grads = run(reference, "layer_norm_alore", to_double(args), grad_out.double())
    ulp_of_mean = 2.0**-12
    assert (got - oracle).abs().max() <= 16 * ulp_of_mean
    assert (got_grads["x"] - oracle_grads["x"]).abs().max() <= 16 * ulp_of_mean * oracle_grads["x"].abs().max()


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
def test_eps(eps, device):
    args = layer_norm_args((3, 3, 3, 7, 7, 5), (19,), torch.float32, None, device)
    assert_matches_oracle("layer_norm_alore", args | {"eps": eps})


def test_constant_rows_are_finite(device):
    """Variance 0: eps alone keeps the reciprocal finite, and the row becomes the bias."""
    args = layer_norm_args(dtype=torch.float32, device=device)
    args["x"] = torch.full_like(args["x"], 2.5)
    args["up"].zero_()
    y, grads = run(ops, "layer_norm_alore", args, torch.ones_like(args["x"]))
    torch.testing.assert_close(y, args["bias"].expand_as(y))
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(dtype, device):
    """The op's second and third outputs: mean and 1 / sqrt(variance + eps) a token, in float32."""
    args = layer_norm_args(lead=(2, 5), dtype=dtype, device=device)
    _, mean, rstd = torch.ops.alore_ext.layer_norm_alore(*args.values())
    assert mean.dtype == rstd.dtype == torch.float32
    assert not mean.requires_grad and not rstd.requires_grad
    x = to_double(args)["x"]
    torch.testing.assert_close(mean.double(), x.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (x.var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=1e-6)


def test_zero_up_is_the_plain_norm(device):
    """U = 0: the result is layer_norm's own, up to one rounding."""
    args = layer_norm_args((4, 4, 4, 24, 24, 4), (19,), torch.bfloat16, torch.float32, device)
    args["up"].zero_()
    y, _ = run(ops, "layer_norm_alore", args)
    exact = to_double(args)
    oracle = F.layer_norm(exact["x"], (96,), exact["weight"], exact["bias"], 1e-6)
    assert ((y.double() - oracle).abs() <= 2**-8 * oracle.abs() + 1e-6).all()
