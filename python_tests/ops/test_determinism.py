"""The same call gives the same bits: no atomics in reductions, none of the CPU's threads in the result."""

import pytest
import torch
from marks import needs_cuda
from op_cases import OPS, kron_args, leaves, output_like, run, small_args

from alore_ext import ops

# Several partial sums in every two-stage reduction.
LARGE = {
    "kron_linear": {"dims": (4, 4, 4, 24, 24, 4), "lead": (8, 197)},
    "alore": {"dims": (4, 4, 4, 24, 24, 4), "lead": (8, 197)},
    "layer_norm_alore": {"dims": (4, 4, 4, 24, 24, 4), "lead": (8, 197)},
    "masked_lora_linear": {"dims": (96, 64, 8), "lead": (8, 197)},
}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("two_threads")
def test_two_runs_are_bitwise_equal(op, dtype, device):
    args = small_args(op, device, dtype=dtype, factor_dtype=torch.float32, **LARGE[op])
    grad_out = output_like(op, args)
    first, first_grads = run(ops, op, args, grad_out)
    second, second_grads = run(ops, op, args, grad_out)
    assert torch.equal(first, second)
    for name, grad in first_grads.items():
        assert torch.equal(grad, second_grads[name]), name


@pytest.mark.parametrize("dims", [(4, 4, 4, 24, 24, 4), (1, 1, 1, 96, 96, 16), (3, 2, 5, 20, 8, 2)])
def test_scale_gradient_does_not_depend_on_the_number_of_threads(dims):
    """CPU: the number of partial sums is a function of the shape alone."""
    args = kron_args(dims, (8, 197), torch.float32)
    grad_out = output_like("kron_linear", args)
    before = torch.get_num_threads()
    grads = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            grads.append(run(ops, "kron_linear", args, grad_out)[1]["scale"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("op", [pytest.param(op, marks=needs_cuda) for op in OPS])
def test_launchers_do_not_synchronise(op):
    """Forward and backward only enqueue work (DESIGN section 3), so a training step never waits for the host."""
    inputs = leaves(small_args(op, "cuda", dtype=torch.float32, **LARGE[op]))
    tail = () if op in ("kron_linear", "masked_lora_linear") else (0.5,)
    getattr(ops, op)(*inputs.values(), *tail).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(ops, op)(*inputs.values(), *tail).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", [pytest.param(op, marks=needs_cuda) for op in OPS])
def test_side_stream_gives_the_same(op):
    """Kernels go to the caller's current stream (where cuBLAS may choose another algorithm)."""
    args = small_args(op, "cuda", dtype=torch.float32, **LARGE[op])
    grad_out = output_like(op, args)
    expected, expected_grads = run(ops, op, args, grad_out)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got, grads = run(ops, op, args, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(got, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], msg=name)
