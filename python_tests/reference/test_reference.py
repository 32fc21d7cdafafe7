"""The oracle itself, against definitions written another way: torch.kron and dense matrices, in float64."""

import pytest
import torch
import torch.nn.functional as F

from alore_ext import reference


def factors(num_experts, s_in, s_out, p_in, p_out, rank):
    make = torch.randn
    return tuple(
        make(shape, dtype=torch.float64)
        for shape in ((num_experts, s_in, s_out), (num_experts, p_in, rank), (num_experts, rank, p_out))
    )


@pytest.mark.parametrize("shape", [(4, 4, 4, 6, 6, 2), (1, 1, 1, 5, 5, 3), (3, 2, 5, 4, 7, 2)])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0, 3)])
def test_kron_linear_is_the_kronecker_sum(shape, lead):
    scale, down, up = factors(*shape)
    dense = sum(torch.kron(s, d @ u) for s, d, u in zip(scale, down, up, strict=True))
    x = torch.randn(*lead, shape[1] * shape[3], dtype=torch.float64)
    torch.testing.assert_close(reference.kron_weight(scale, down, up), dense)
    torch.testing.assert_close(reference.kron_linear(x, scale, down, up), x @ dense)


def test_alore_and_layer_norm():
    scale, down, up = factors(4, 4, 4, 3, 3, 2)
    dense = reference.kron_weight(scale, down, up)
    x, weight, bias = torch.randn(5, 12).double(), torch.randn(12).double(), torch.randn(12).double()
    torch.testing.assert_close(reference.alore(x, scale, down, up), x @ (torch.eye(12) + dense))
    normed = F.layer_norm(x, (12,), weight, bias, 1e-6)
    expected = normed + normed @ dense
    torch.testing.assert_close(reference.layer_norm_alore(x, weight, bias, 1e-6, scale, down, up), expected)


def test_a_residual_is_added_in_front_of_the_norm():
    factors_ = factors(4, 4, 4, 3, 3, 2)
    x, residual = torch.randn(5, 12).double(), torch.randn(5, 12).double()
    y, total = reference.layer_norm_alore(x, None, None, 1e-6, *factors_, residual=residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, reference.layer_norm_alore(x + residual, None, None, 1e-6, *factors_))


def test_dropout_is_on_the_branch_alone():
    scale, down, up = factors(2, 2, 2, 8, 8, 2)
    x = torch.randn(64, 16, dtype=torch.float64)
    branch = reference.kron_linear(x, scale, down, up)
    dropped = reference.alore(x, scale, down, up, 0.25, True) - x
    kept = dropped.abs() > 1e-12
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.75)
    assert 0.7 < kept.double().mean() < 0.8
    torch.testing.assert_close(reference.alore(x, scale, down, up, 0.25, False), x + branch)


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_merge_kron(side, with_bias):
    scale, down, up = factors(4, 4, 4, 3, 3, 2)
    out_features, in_features = (20, 12) if side == "before" else (12, 20)
    weight = torch.randn(out_features, in_features).double()
    bias = torch.randn(out_features).double() if with_bias else None
    x = torch.randn(5, in_features).double()
    if side == "before":
        expected = F.linear(reference.alore(x, scale, down, up), weight, bias)
    else:
        expected = reference.alore(F.linear(x, weight, bias), scale, down, up)
    reference.merge_kron_(weight, bias, scale, down, up, side)
    torch.testing.assert_close(F.linear(x, weight, bias), expected)


def test_merge_kron_refuses_another_side():
    scale, down, up = factors(2, 2, 2, 3, 3, 1)
    with pytest.raises(ValueError, match="side must be 'before' or 'after', got 'left'"):
        reference.merge_kron_(torch.zeros(6, 6), None, scale, down, up, "left")


def test_masked_lora_linear_and_merge():
    x, weight, bias = torch.randn(5, 6).double(), torch.randn(4, 6).double(), torch.randn(4).double()
    lora_a, lora_b = torch.randn(3, 6).double(), torch.randn(4, 3).double()
    coeff = torch.tensor([0.5, 0.0, 2.0]).double()
    expected = F.linear(x, weight + lora_b @ torch.diag(coeff) @ lora_a, bias)
    torch.testing.assert_close(reference.masked_lora_linear(x, weight, bias, lora_a, lora_b, coeff), expected)
    reference.merge_lora_(weight, lora_a, lora_b, coeff)
    torch.testing.assert_close(F.linear(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_x(dtype):
    scale, down, up = (f.float() for f in factors(2, 2, 2, 3, 3, 1))
    x = torch.randn(4, 6).to(dtype)
    assert reference.kron_linear(x, scale, down, up).dtype == dtype
    assert reference.layer_norm_alore(x, None, None, 1e-6, scale, down, up).dtype == dtype
