"""masked_lora_linear against the float64 oracle, and what a coefficient of 0 means."""

import pytest
import torch
from op_cases import DTYPES, EAGER, LEADS, assert_matches_oracle, lora_args, run, to_double

from alore_ext import ops, reference

DIMS = [
    pytest.param(dims, id="in{}-out{}-R{}".format(*dims))
    for dims in [(12, 9, 1), (7, 13, 2), (40, 3, 8), (5, 100, 64), (96, 288, 32), (17, 17, 19)]
]


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("dims", DIMS)
def test_shapes(dims, dtype, factor_dtype, device):
    assert_matches_oracle("masked_lora_linear", lora_args(dims, (19,), dtype, factor_dtype, device))


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_leading_axes(lead, dtype, factor_dtype, device):
    assert_matches_oracle("masked_lora_linear", lora_args((17, 23, 5), lead, dtype, factor_dtype, device))


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_without_bias(dtype, factor_dtype, device):
    args = lora_args((17, 23, 5), (19,), dtype, factor_dtype, device)
    assert_matches_oracle("masked_lora_linear", args | {"bias": None})


def lora_update(args):
    return (args["lora_b"] * args["coeff"]) @ args["lora_a"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapters_own_contribution_survives_the_weights_rounding(dtype, device):
    """DESIGN section 6: judged by y - x W0. The update is far below half an ulp of every weight, so folding it into
    16-bit weights would lose all of it."""
    args = lora_args((64, 48, 4), (197,), dtype, torch.float32, device)
    args["weight"].fill_(1.0)
    args["bias"] = None
    args["x"] -= args["x"].mean(-1, keepdim=True)  # x W0 is near 0: rounding y hides nothing
    args["lora_a"] *= torch.finfo(dtype).eps / 8 / lora_update(args).abs().max()
    exact = to_double(args)
    assert torch.equal((exact["weight"] + lora_update(exact)).to(dtype), args["weight"])
    base = exact["x"] @ exact["weight"].T
    oracle = reference.masked_lora_linear(*exact.values()) - base

    def error(library):
        return (run(library, "masked_lora_linear", args)[0].double() - base - oracle).square().mean().sqrt()

    assert error(ops) <= 0.1 * oracle.square().mean().sqrt()
    assert error(ops) <= 2 * error(EAGER)


class TestMaskedExperts:
    """Rows of dA and columns of dB are exactly 0 where coeff is 0; coeff's own gradient is the true derivative."""

    MASKED = torch.tensor([False, True, False, False, True])

    @pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
    def test_gradients(self, dtype, factor_dtype, device):
        args = lora_args((17, 23, 5), (19,), dtype, factor_dtype, device)
        masked = self.MASKED.to(device)
        assert torch.equal(args["coeff"] == 0, masked)
        grad_out = torch.ones(19, 23, dtype=dtype, device=device)
        _, grads = run(ops, "masked_lora_linear", args, grad_out)
        assert torch.equal(grads["lora_a"].count_nonzero(dim=1) == 0, masked)
        assert torch.equal(grads["lora_b"].count_nonzero(dim=0) == 0, masked)
        assert (grads["coeff"] != 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("where", ["x", "grad_out", "lora_a", "lora_b"])
    def test_zero_even_where_something_is_not_finite(self, where, dtype, device):
        """Overflow elsewhere must not reach a masked expert: 0 * inf is no gradient of 0."""
        args = lora_args((17, 23, 5), (19,), dtype, torch.float32, device)
        tensors = args | {"grad_out": torch.ones(19, 23, dtype=dtype, device=device)}
        tensors[where].view(-1)[0] = torch.inf
        _, grads = run(ops, "masked_lora_linear", args, tensors["grad_out"])
        masked = self.MASKED.to(device)
        assert (grads["lora_a"][masked] == 0).all()
        assert (grads["lora_b"][:, masked] == 0).all()

    def test_all_masked_is_the_plain_linear(self, device):
        args = lora_args((17, 23, 5), (19,), torch.float32, None, device)
        args["coeff"].zero_()
        y, grads = run(ops, "masked_lora_linear", args, torch.ones(19, 23, device=device))
        torch.testing.assert_close(y, torch.nn.functional.linear(args["x"], args["weight"], args["bias"]))
        assert grads["lora_a"].count_nonzero() == grads["lora_b"].count_nonzero() == 0
        assert (grads["coeff"] != 0).all()
