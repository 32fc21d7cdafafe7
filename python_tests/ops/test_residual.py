"""add_layer_norm_alore: the sum in front of the norm, its own output and gradient, against the float64 oracle."""

import pytest
import torch
from op_cases import (
    DTYPES,
    EAGER,
    LAYOUTS,
    assert_within_budget,
    draw,
    leaves,
    negated,
    residual_args,
    to_double,
)

from alore_ext import ops, reference

DIMS = (3, 3, 3, 7, 7, 5)
LOW = [torch.bfloat16, torch.float16]
USES = [(True, True), (True, False), (False, True)]  # of y, of the sum
USE_IDS = ["both", "y", "sum"]


def fused(x, residual, *rest):
    return ops.layer_norm_alore(x, *rest, residual=residual)


def exact(x, residual, *rest):
    return reference.layer_norm_alore(x, *rest, residual=residual)


def eager(x, residual, *rest):
    total = x + residual
    return EAGER.layer_norm_alore(total, *rest), total


def upstream(args, used=(True, True)):
    """Random gradients of y and of the sum; None for an output that nobody uses."""
    x = args["x"]
    return [draw(*x.shape, dtype=x.dtype, device=x.device) if use else None for use in used]


def run(function, args, grads):
    """y, the sum and the gradients by name, of the outputs that have one in `grads`."""
    inputs = leaves(args)
    outputs = function(*inputs.values())
    used = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    found = {name: value.grad for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return [out.detach() for out in outputs], found


def assert_matches(args, used=(True, True)):
    grads = upstream(args, used)
    double = [None if grad is None else grad.double() for grad in grads]
    (y, total), got = run(fused, args, grads)
    (exact_y, exact_total), oracle = run(exact, to_double(args), double)
    (eager_y, eager_total), measure = run(eager, args, grads)
    assert y.dtype == total.dtype == args["x"].dtype
    assert_within_budget(y, exact_y, eager_y, "y")
    assert torch.equal(total, eager_total)
    assert_within_budget(total, exact_total, eager_total, "sum")
    for name, grad in got.items():
        if oracle[name] is None:  # nothing of the adapter is behind the sum
            assert grad is None or (grad == 0).all(), name
            continue
        assert grad.dtype == args[name].dtype, name
        assert_within_budget(grad, oracle[name], measure[name], f"gradient of {name}")


@pytest.mark.parametrize("used", USES, ids=USE_IDS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_values_and_gradients(dtype, factor_dtype, used, device):
    assert_matches(residual_args(DIMS, (19,), dtype, factor_dtype, device), used)


@pytest.mark.parametrize("used", USES, ids=USE_IDS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "dims", [(4, 4, 4, 32, 32, 4), (4, 4, 4, 24, 24, 4), (4, 4, 4, 192, 192, 4)], ids=lambda dims: f"p{dims[3]}"
)
def test_shapes_of_the_fused_kernels(dims, dtype, used, device):
    """Without affine gradients, which these kernels leave to others; the affine itself is there."""
    args = residual_args(dims, (2, 101), dtype, torch.float32, device)
    frozen = {"weight": args.pop("weight"), "bias": args.pop("bias")}
    grads = upstream(args, used)
    double = [None if grad is None else grad.double() for grad in grads]

    def bound(function, affine):
        return lambda x, residual, *rest: function(x, residual, *affine.values(), *rest)

    got, got_grads = run(bound(fused, frozen), args, grads)
    oracle, oracle_grads = run(bound(exact, to_double(frozen)), to_double(args), double)
    measure, measure_grads = run(bound(eager, frozen), args, grads)
    for name, *values in zip(("y", "sum"), got, oracle, measure, strict=True):
        assert_within_budget(*values, name)
    for name, grad in got_grads.items():
        if oracle_grads[name] is not None:
            assert_within_budget(grad, oracle_grads[name], measure_grads[name], f"gradient of {name}")


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (1,), (1, 197), (2, 3, 5)], ids=str)
def test_leading_axes(lead, device):
    assert_matches(residual_args(DIMS, lead, torch.bfloat16, torch.float32, device))


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_absent_affine(missing, device):
    """Absent arguments stand between those that get a gradient."""
    assert_matches(residual_args(DIMS, (19,), torch.float32, None, device) | dict.fromkeys(missing))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
def test_equals_adding_first(dtype, device):
    """The sum bit for bit; what follows from it up to a rounding, as a GPU may take another path without a residual."""
    args = residual_args((4, 4, 4, 32, 32, 4), (197,), dtype, device=device)
    x, residual, *rest = args.values()
    y, total = ops.layer_norm_alore(x, *rest, residual=residual)
    assert torch.equal(total, x + residual)
    expected = ops.layer_norm_alore(total, *rest)
    assert (y - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_each_gradient_alone(device):
    """x and residual have one gradient between them, returned to whichever asks."""
    args = residual_args(device=device)
    grads = upstream(args)
    _, expected = run(fused, args, grads)
    assert torch.equal(expected["x"], expected["residual"])
    for name, value in expected.items():
        inputs = leaves(args, {name})
        torch.autograd.backward(fused(*inputs.values()), grads)
        torch.testing.assert_close(inputs[name].grad, value, msg=name)
        assert [n for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.grad is not None] == [name]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layouts(dtype, layout, device):
    """Strided, transposed, expanded, misaligned and negated: inputs and incoming gradients."""
    if layout is negated and dtype == torch.bfloat16:
        pytest.skip("a negated view is of a complex tensor, and none is made of two bfloat16 numbers")
    args = residual_args((4, 4, 4, 8, 8, 4), (2, 19), dtype, device=device)
    grads = upstream(args)
    laid = {n: layout(v) if n in ("x", "residual") else v for n, v in args.items()}
    laid_grads = [layout(grad) for grad in grads]
    plain = {n: v.contiguous() if isinstance(v, torch.Tensor) else v for n, v in laid.items()}
    got, got_grads = run(fused, laid, laid_grads)
    expected, expected_grads = run(fused, plain, [grad.resolve_neg().contiguous() for grad in laid_grads])
    for a, b in zip([*got, *got_grads.values()], [*expected, *expected_grads.values()], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_against_the_oracle(layout, device):
    args = residual_args(DIMS, (2, 5), torch.float32, device=device)
    args |= {name: layout(args[name]) for name in ("x", "residual")}
    assert_matches(args)


class TestDropout:
    def test_mask_and_gradients_are_those_of_adding_first(self, device):
        args = residual_args(DIMS, (19,), device=device)
        grads = upstream(args)

        def adding_first(x, residual, *rest):
            return ops.layer_norm_alore(x + residual, *rest, 0.5), x + residual

        def at_once(x, residual, *rest):
            return ops.layer_norm_alore(x, *rest, 0.5, residual=residual)

        torch.manual_seed(3)
        expected, expected_grads = run(adding_first, args, grads)
        torch.manual_seed(3)
        got, got_grads = run(at_once, args, grads)
        for a, b in zip([*got, *got_grads.values()], [*expected, *expected_grads.values()], strict=True):
            torch.testing.assert_close(a, b)

    def test_none_in_eval(self, device):
        x, residual, *rest = residual_args(device=device).values()
        y, _ = ops.layer_norm_alore(x, *rest, 0.5, False, residual)
        assert torch.equal(y, fused(x, residual, *rest)[0])


class TestAutocast:
    @pytest.mark.parametrize("low", LOW)
    @pytest.mark.parametrize(
        "kinds", [("wide", "wide"), ("low", "wide"), ("wide", "low"), ("low", "low")], ids="-".join
    )
    def test_against_the_oracle(self, kinds, low, device):
        """The sum has the wider type of its terms, y the autocast dtype, and each gradient its argument's."""
        types = [low if kind == "low" else torch.float32 for kind in kinds]
        args = residual_args((4, 4, 4, 8, 8, 4), (2, 19), torch.float32, device=device)
        args |= {"x": args["x"].to(types[0]), "residual": args["residual"].to(types[1])}
        grads = upstream(args | {"x": args["x"].to(low)})

        def under_autocast(function):
            def call(*inputs):
                with torch.autocast(device.type, low):
                    return function(*inputs)

            return call

        got, got_grads = run(under_autocast(fused), args, grads)
        oracle, oracle_grads = run(exact, to_double(args), [grad.double() for grad in grads])
        measure, measure_grads = run(under_autocast(eager), args, grads)
        assert [t.dtype for t in got] == [low, torch.promote_types(*types)]
        assert_within_budget(got[0], oracle[0], measure[0], "y")
        assert torch.equal(got[1], measure[1])
        for name, grad in got_grads.items():
            assert grad.dtype == args[name].dtype, name
            assert_within_budget(grad.to(low), oracle_grads[name], measure_grads[name], f"gradient of {name}")

    def test_float64_is_left_alone(self, device):
        args = residual_args(device=device)
        with torch.autocast(device.type, torch.bfloat16):
            got = fused(*args.values())
        assert [t.dtype for t in got] == [torch.float64] * 2
        torch.testing.assert_close(got, exact(*args.values()))


class TestRefusals:
    """The op's own messages are in test_op_errors.py; these come through `alore_ext.ops`."""

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda t: t[:4], r"residual must have x's shape \[5, 12\], got \[4, 12\]"),
            (lambda t: t[:1], r"residual must have x's shape \[5, 12\], got \[1, 12\]"),
            (lambda t: t.bfloat16(), "residual must have x's dtype Float, got BFloat16"),
            (lambda t: t.to("meta"), "residual must be on x's device .*, got meta"),
        ],
        ids=["shape", "broadcast", "dtype", "device"],
    )
    def test_bad_residual(self, change, says, device):
        args = residual_args(dtype=torch.float32, device=device)
        with pytest.raises(RuntimeError, match=f"add_layer_norm_alore: {says}"):
            fused(*(args | {"residual": change(args["residual"])}).values())

    @pytest.mark.parametrize("used", USES, ids=USE_IDS)
    def test_double_backward(self, used, device):
        inputs = leaves(residual_args(device=device))
        total = sum(out.square().sum() for out, use in zip(fused(*inputs.values()), used, strict=True) if use)
        (first,) = torch.autograd.grad(total, inputs["residual"], create_graph=True)
        with pytest.raises(RuntimeError, match="layer_norm_alore: double backward is not supported"):
            first.sum().backward()

    def test_a_sum_changed_in_place_before_backward_is_noticed(self, device):
        y, total = fused(*leaves(residual_args(device=device)).values())
        with torch.no_grad():
            total.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_saves_the_sum_and_not_its_terms(device):
    args = residual_args(lead=(197,), dtype=torch.float32, device=device)
    inputs, saved = leaves(args), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        _, total = fused(*inputs.values())
    assert total.data_ptr() in saved
    assert not {inputs[name].data_ptr() for name in ("x", "residual")} & set(saved)
    given = {total.data_ptr(), *(v.data_ptr() for v in inputs.values() if isinstance(v, torch.Tensor))}
    assert sum(t.numel() for pointer, t in saved.items() if pointer not in given) == 2 * 197  # mean and rstd


def test_compiles_to_one_op(device):
    """fullgraph, with a residual stream that goes on: aot_eager runs tracing, fake tensors and the joint graph."""
    torch._dynamo.reset()
    args = residual_args(device=device)
    grads = upstream(args)
    got, got_grads = run(torch.compile(fused, fullgraph=True, backend="aot_eager"), args, grads)
    expected, expected_grads = run(fused, args, grads)
    torch.testing.assert_close([*got, *got_grads.values()], [*expected, *expected_grads.values()])
    torch._dynamo.reset()
