"""Nothing that a kernel did not write reaches a result: memory is NaN before every call, and results stay clean.

Torch fills what `at::empty` returns (outputs and workspaces of the C++ ops too) with NaN, or 0xFF bytes, under
deterministic algorithms. On CUDA the caching allocator's free blocks are filled with NaN as well."""

import copy

import pytest
import torch
from op_calls import backward_calls, forward_calls, grouped_calls, merge_calls
from op_cases import OPS, kron_args, output_like, run, small_args
from poison import poisoned

from alore_ext import ops


def assert_same(got, expected, what):
    assert (got is None) == (expected is None), what
    if got is not None:
        assert not got.isnan().any(), what
        torch.testing.assert_close(got, expected, msg=lambda m: f"{what}: {m}")


def listed(value):
    return value if isinstance(value, list) else [value]


def outputs(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float64},
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16, "factor_dtype": torch.float32},
        {"dtype": torch.float16, "factor_dtype": torch.float16},
    ],
    ids=["float64", "float32", "bfloat16-float32", "float16"],
)
def test_every_call(options, device):
    makers = (forward_calls, backward_calls, grouped_calls)
    calls = {name: made for make in makers for name, made in make(device, **options).items()}
    for call, (op, arguments) in calls.items():
        expected = outputs(op(*arguments))
        with poisoned(device):
            got = outputs(op(*arguments))
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same(a, b, f"{call}[{index}]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_merge(dtype, device):
    for call, (op, arguments) in merge_calls(device, dtype).items():
        again = copy.deepcopy(arguments)
        op(*arguments)
        with poisoned(device):
            op(*again)
        for got, expected in zip(listed(again[0]), listed(arguments[0]), strict=True):
            assert_same(got, expected, call)


@pytest.mark.parametrize("lead", [(0,), (1,), (197,), (3, 67)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_token_counts(op, lead, device):
    """Partial tiles, partial sums of blocks without tokens, and gradients of an empty input."""
    args = small_args(op, device, lead=lead, dtype=torch.float32)
    grad_out = output_like(op, args)
    expected, expected_grads = run(ops, op, args, grad_out)
    with poisoned(device):
        got, grads = run(ops, op, args, grad_out)
    assert_same(got, expected, "output")
    for name, grad in grads.items():
        assert_same(grad, expected_grads[name], name)


def test_empty_input_has_zero_gradients(device):
    for op in OPS:
        args = small_args(op, device, lead=(2, 0))
        with poisoned(device):
            _, grads = run(ops, op, args, output_like(op, args))
        for name, grad in grads.items():
            assert (grad == 0).all(), f"{op} {name}"


@pytest.mark.parametrize("op", OPS)
def test_a_nan_token_stays_in_its_row(op, device):
    """No kernel may let one token's values reach another's output or input gradient."""
    args = small_args(op, device, lead=(67,), dtype=torch.float32)
    grad_out = output_like(op, args)
    expected, expected_grads = run(ops, op, args, grad_out)
    others = torch.arange(67, device=device) != 31
    args["x"][31] = torch.nan
    got, grads = run(ops, op, args, grad_out)
    assert got[31].isnan().all()
    torch.testing.assert_close(got[others], expected[others])
    torch.testing.assert_close(grads["x"][others], expected_grads["x"][others])


def test_workspace_between_calls_of_different_size(device):
    """A small call after a large one finds the large one's scratch memory in place of NaN; it must not read it."""
    small, large = (kron_args(lead=(n,), dtype=torch.float32, device=device) for n in (3, 999))
    expected, expected_grads = run(ops, "alore", small, torch.ones_like(small["x"]))
    for _ in range(3):
        run(ops, "alore", large, torch.full_like(large["x"], 1e30))
        got, grads = run(ops, "alore", small, torch.ones_like(small["x"]))
        assert torch.equal(got, expected)
        for name, grad in grads.items():
            assert torch.equal(grad, expected_grads[name]), name
