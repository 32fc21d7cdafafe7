"""merge_kron_ and merge_lora_: exact to one rounding, in place, and honest to autograd about it."""

import pytest
import torch
import torch.nn.functional as F
from marks import needs_cuda
from op_cases import draw, kron_args, lora_args

from alore_ext import ops, reference

WEIGHT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FACTOR_DTYPES = WEIGHT_DTYPES
SIDES = ["before", "after"]
DIMS = (4, 4, 4, 24, 24, 4)
WIDTH, OTHER = 96, 40


def factors(dtype=torch.float64, device="cpu", dims=DIMS):
    args = kron_args(dims, (), dtype=dtype, device=device)
    return args["scale"], args["down"], args["up"]


def linear(side, dtype=torch.float64, device="cpu", width=WIDTH):
    shape = (OTHER, width) if side == "before" else (width, OTHER)
    return draw(*shape, dtype=dtype, device=device, gain=shape[1] ** -0.5), draw(shape[0], dtype=dtype, device=device)


def low_rank(dtype=torch.float64, device="cpu"):
    args = lora_args((WIDTH, OTHER, 5), (), dtype=dtype, device=device)
    return args["lora_a"], args["lora_b"], args["coeff"]


def merged_exactly(side, weight, bias, adapter):
    """The formulas of DESIGN section 2 with a dense W', in float64, and the sums of absolute terms."""
    dense = reference.kron_weight(*(f.double() for f in adapter))
    sizes = reference.kron_weight(*(f.double().abs() for f in adapter))
    weight, bias = weight.double(), bias.double()
    if side == "before":
        return weight + weight @ dense.T, bias, weight.abs() + weight.abs() @ sizes.T, None
    return (
        weight + dense.T @ weight,
        bias + bias @ dense,
        weight.abs() + sizes.T @ weight.abs(),
        bias.abs() + bias.abs() @ sizes,
    )


def assert_one_rounding(got, exact, magnitude, product_dtype):
    """Half an ulp of the result in its own dtype, plus the error of products of these magnitudes."""
    info = torch.finfo(got.dtype)
    rounding = exact.abs() * info.eps / 2 * 1.01 + info.smallest_normal * info.eps
    products = 16 * torch.finfo(product_dtype).eps * magnitude
    excess = (got.double() - exact).abs() - rounding - products
    assert excess.max() <= 0, f"{excess.max():.3e} above one rounding"


def product_dtype(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


@pytest.mark.parametrize("factor_dtype", FACTOR_DTYPES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_merge_kron(side, dtype, factor_dtype, device):
    (weight, bias), adapter = linear(side, dtype, device), factors(factor_dtype, device)
    exact_weight, exact_bias, magnitude, bias_magnitude = merged_exactly(side, weight, bias, adapter)
    before = bias.clone()
    assert ops.merge_kron_(weight, bias, *adapter, side) is None
    products = product_dtype(dtype, factor_dtype)
    assert_one_rounding(weight, exact_weight, magnitude, products)
    if side == "before":
        assert torch.equal(bias, before)
    else:
        assert_one_rounding(bias, exact_bias, bias_magnitude, products)


@pytest.mark.parametrize("factor_dtype", FACTOR_DTYPES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_merge_lora(dtype, factor_dtype, device):
    (weight, _), (a, b, coeff) = linear("before", dtype, device), low_rank(factor_dtype, device)
    exact = weight.double() + (b.double() * coeff.double()) @ a.double()
    magnitude = weight.double().abs() + (b.double() * coeff.double()).abs() @ a.double().abs()
    assert ops.merge_lora_(weight, a, b, coeff) is None
    assert_one_rounding(weight, exact, magnitude, product_dtype(dtype, factor_dtype))


@pytest.mark.parametrize("dims", [(1, 1, 1, 13, 13, 1), (3, 3, 3, 7, 7, 5), (2, 4, 6, 9, 6, 3), (32, 8, 8, 3, 3, 2)])
@pytest.mark.parametrize("side", SIDES)
def test_shapes(side, dims, device):
    """Also unequal blocks of equal total: a map of 4 blocks of 9 onto 6 blocks of 6 is square too."""
    (weight, bias), adapter = linear(side, device=device, width=dims[1] * dims[3]), factors(device=device, dims=dims)
    exact_weight, exact_bias, _, _ = merged_exactly(side, weight, bias, adapter)
    ops.merge_kron_(weight, bias, *adapter, side)
    torch.testing.assert_close(weight, exact_weight, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(bias, exact_bias, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("side", SIDES)
def test_no_bias(side, device):
    (weight, bias), adapter = linear(side, device=device), factors(device=device)
    exact, _, _, _ = merged_exactly(side, weight, bias, adapter)
    ops.merge_kron_(weight, None, *adapter, side)
    torch.testing.assert_close(weight, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("side", SIDES)
def test_merged_layer_gives_what_the_unmerged_one_gave(side, device):
    (weight, bias), adapter = linear(side, device=device), factors(device=device)
    x = draw(19, weight.shape[1], device=device)
    if side == "before":
        expected = F.linear(ops.alore(x, *adapter), weight, bias)
    else:
        expected = ops.alore(F.linear(x, weight, bias), *adapter)
    ops.merge_kron_(weight, bias, *adapter, side)
    torch.testing.assert_close(F.linear(x, weight, bias), expected, rtol=1e-11, atol=1e-11)


def test_merged_lora_gives_what_the_unmerged_one_gave(device):
    (weight, bias), (a, b, coeff) = linear("before", device=device), low_rank(device=device)
    x = draw(19, WIDTH, device=device)
    expected = ops.masked_lora_linear(x, weight, bias, a, b, coeff)
    ops.merge_lora_(weight, a, b, coeff)
    torch.testing.assert_close(F.linear(x, weight, bias), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_an_adapter_of_zero_changes_no_bit(side, dtype, device):
    (weight, bias), (scale, down, up) = linear(side, dtype, device), factors(torch.float32, device)
    before = weight.clone(), bias.clone()
    ops.merge_kron_(weight, bias, scale, down, torch.zeros_like(up), side)
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_are_rounded_once_not_swallowed_term_by_term(dtype, device):
    """Many terms, each below half an ulp of the weight, add up to several ulps."""
    weight = torch.ones(8, 64, dtype=dtype, device=device)
    eps = torch.finfo(dtype).eps
    a, b = torch.ones(64, 64, device=device), torch.ones(8, 64, device=device)
    ops.merge_lora_(weight, a, b, torch.full((64,), eps / 8, device=device))
    assert torch.equal(weight, torch.full_like(weight, 1 + 8 * eps))


@pytest.mark.parametrize("op", [pytest.param(op, marks=needs_cuda) for op in ("merge_kron_", "merge_lora_")])
def test_tf32_never_reaches_a_merge(op, monkeypatch):
    """Training may allow TF32; a merge is done once and keeps every bit of float32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    weight, bias, adapter = setting(op, "cuda", torch.float32)
    exact, exact_bias = weight.double(), bias.double()
    merge(op, exact, exact_bias, [f.double() for f in adapter])
    merge(op, weight, bias, adapter)
    torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-5)


def merge(op, weight, bias, adapter, side="after"):
    if op == "merge_kron_":
        ops.merge_kron_(weight, bias, *adapter, side)
    else:
        ops.merge_lora_(weight, *adapter)


def setting(op, device, dtype=torch.float64):
    """Weight, bias and adapter of one op."""
    if op == "merge_kron_":
        return *linear("after", dtype, device), factors(dtype, device)
    return *linear("before", dtype, device), low_rank(dtype, device)


MERGES = ["merge_kron_", "merge_lora_"]


@pytest.mark.parametrize("op", MERGES)
class TestInPlace:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_transposed_weight(self, op, dtype, device):
        """A Conv1D-style weight, seen through .t(): merged through its strides, with the memory order kept."""
        weight, bias, adapter = setting(op, device, dtype)
        storage = weight.t().contiguous()
        view, pointer = storage.t(), storage.data_ptr()
        merge(op, view, bias.clone(), adapter)
        merge(op, weight, bias, adapter)
        assert torch.equal(view, weight) and storage.is_contiguous() and storage.data_ptr() == pointer

    def test_slices_of_a_larger_weight_leave_the_rest_alone(self, op, device):
        """Query, key or value of a fused qkv weight, and the bias's part."""
        weight, bias, adapter = setting(op, device)
        rows, columns = weight.shape
        whole = torch.full((3 * rows, columns + 2), 7.0, dtype=weight.dtype, device=device)
        whole_bias = torch.full((3 * rows,), 7.0, dtype=weight.dtype, device=device)
        part, bias_part = whole[rows : 2 * rows, 1:-1], whole_bias[rows : 2 * rows]
        part.copy_(weight)
        bias_part.copy_(bias)
        merge(op, part, bias_part, adapter)
        merge(op, weight, bias, adapter)
        torch.testing.assert_close(part, weight, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(bias_part, bias, rtol=1e-13, atol=1e-13)
        part.fill_(7.0)
        bias_part.fill_(7.0)
        assert (whole == 7.0).all() and (whole_bias == 7.0).all()

    def test_factors_of_any_layout(self, op, device):
        weight, bias, adapter = setting(op, device)
        strided = [torch.stack([f, f * torch.nan], -1)[..., 0] for f in adapter]
        again, bias_again = weight.clone(), bias.clone()
        merge(op, weight, bias, adapter)
        merge(op, again, bias_again, strided)
        torch.testing.assert_close(again, weight, rtol=1e-13, atol=1e-13)

    def test_factors_are_not_changed(self, op, device):
        weight, bias, adapter = setting(op, device)
        before = [f.clone() for f in adapter]
        merge(op, weight, bias, adapter)
        assert all(torch.equal(f, b) for f, b in zip(adapter, before, strict=True))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_version_counters_move(self, op, mode, device):
        weight, bias, adapter = setting(op, device)
        versions = weight._version, bias._version
        with mode():
            merge(op, weight, bias, adapter)
        assert weight._version > versions[0]
        assert bias._version > versions[1] or op == "merge_lora_"

    def test_backward_through_a_changed_weight_raises(self, op, device):
        weight, bias, adapter = setting(op, device)
        x = draw(3, weight.shape[1], device=device).requires_grad_()
        y = F.linear(x, weight, bias)
        merge(op, weight, bias, adapter)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_backward_of_the_package_through_a_changed_weight_raises(self, op, device):
        weight, bias, adapter = setting(op, device)
        x = draw(3, weight.shape[1], device=device).requires_grad_()
        out_features, in_features = weight.shape
        lora = lora_args((in_features, out_features, 2), (3,), device=device)
        y = ops.masked_lora_linear(x, weight, bias, lora["lora_a"], lora["lora_b"], lora["coeff"])
        merge(op, weight, bias, adapter)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_recording_is_refused_and_nothing_is_written(self, op, device):
        weight, bias, adapter = setting(op, device)
        tensors = [weight, *([bias] if op == "merge_kron_" else []), *adapter]
        before = weight.clone(), bias.clone()
        for tensor in tensors:
            tensor.requires_grad_()
            with pytest.raises(RuntimeError, match=f"{op}: merging is not differentiable"):
                merge(op, weight, bias, adapter)
            tensor.requires_grad_(False)
        assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])

    def test_parameters_merge_under_no_grad(self, op, device):
        weight, bias, adapter = setting(op, device)
        parameter, parameters = torch.nn.Parameter(weight.clone()), [torch.nn.Parameter(f) for f in adapter]
        with torch.no_grad():
            merge(op, parameter, bias.clone(), parameters)
        merge(op, weight, bias, adapter)
        assert torch.equal(parameter, weight) and parameter.is_leaf and parameter.requires_grad

    def test_overlapping_weight_is_refused(self, op, device):
        weight, bias, adapter = setting(op, device)
        expanded = weight[:1].expand_as(weight)
        with pytest.raises(RuntimeError, match="must not overlap itself in memory"):
            merge(op, expanded, bias, adapter)


def test_overlapping_bias_is_refused_before_the_weight_changes(device):
    weight, bias, adapter = setting("merge_kron_", device)
    before = weight.clone()
    with pytest.raises(RuntimeError, match="must not overlap itself in memory"):
        ops.merge_kron_(weight, bias[:1].expand_as(bias), *adapter, "after")
    assert torch.equal(weight, before)


def test_bias_may_have_another_dtype(device):
    weight, bias, adapter = setting("merge_kron_", device)
    exact_weight, exact_bias, *_ = merged_exactly("after", weight, bias, adapter)
    weight, narrow = weight.bfloat16(), bias.float()
    ops.merge_kron_(weight, narrow, *adapter, "after")
    torch.testing.assert_close(narrow.double(), exact_bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.double(), exact_weight, rtol=2**-7, atol=2**-7)
