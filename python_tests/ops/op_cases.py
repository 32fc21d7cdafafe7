"""What the operator tests share: drawing inputs, running an op three ways, and the error budget.

A call is a dict of arguments by name, in the order of the op's signature; `run` makes it through `alore_ext.ops`,
`alore_ext.reference` (the oracle, in float64) or `EAGER` (what a user would write in PyTorch, in the call's own dtype).
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from alore_ext import ops, reference

OPS = ("kron_linear", "alore", "layer_norm_alore", "masked_lora_linear")
KRON_OPS = OPS[:3]

# Activations and low-rank factors: the same dtype, or float32 factors under 16-bit activations.
DTYPES = [
    pytest.param(x, factors, id=f"{str(x)[6:]}-{str(factors)[6:]}")
    for x, factors in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ]
]

# num_experts, s_in, s_out, p_in, p_out, rank. Most axes are no multiple of 8.
SQUARE = [
    pytest.param(dims, id="E{0}-s{1}-p{3}-r{5}".format(*dims))
    for dims in [
        (1, 1, 1, 13, 13, 1),
        (4, 4, 4, 192, 192, 4),
        (3, 3, 3, 7, 7, 5),
        (2, 4, 4, 11, 11, 64),
        (7, 5, 5, 6, 6, 3),
        (32, 32, 32, 3, 3, 2),
    ]
]
SMALL = (2, 3, 3, 4, 4, 2)

# Leading axes of x: 1-D to 4-D, and 0, 1, 19, 197 and 30 tokens.
LEADS = [(), (0,), (2, 0, 3), (1,), (19,), (1, 197), (2, 3, 5)]


def draw(*shape, device="cpu", dtype=torch.float64, gain=1.0):
    """Normal values of standard deviation `gain`, the same on every device."""
    return (torch.randn(*shape, dtype=torch.float64) * gain).to(device, dtype)


def kron_args(dims=SMALL, lead=(5,), dtype=torch.float64, factor_dtype=None, device="cpu"):
    """Arguments of kron_linear and alore, scaled so that every intermediate is of order 1."""
    num_experts, s_in, s_out, p_in, p_out, rank = dims
    factor = {"dtype": factor_dtype or dtype, "device": device}
    return {
        "x": draw(*lead, s_in * p_in, dtype=dtype, device=device),
        "scale": draw(num_experts, s_in, s_out, gain=s_in**-0.5, **factor),
        "down": draw(num_experts, p_in, rank, gain=p_in**-0.5, **factor),
        "up": draw(num_experts, rank, p_out, gain=(num_experts * rank) ** -0.5, **factor),
    }


def layer_norm_args(dims=SMALL, lead=(5,), dtype=torch.float64, factor_dtype=None, device="cpu", affine_dtype=None):
    """Arguments of layer_norm_alore, both halves of the affine given."""
    kron = kron_args(dims, lead, dtype, factor_dtype, device)
    affine = {"dtype": affine_dtype or dtype, "device": device}
    x = kron.pop("x")
    weight = draw(x.shape[-1], gain=0.3, **affine) + 1
    return {"x": x, "weight": weight, "bias": draw(x.shape[-1], gain=0.3, **affine), "eps": 1e-6, **kron}


def residual_args(*args, **options):
    """Arguments of add_layer_norm_alore: those of layer_norm_alore, a residual behind x."""
    norm = layer_norm_args(*args, **options)
    x = norm.pop("x")
    return {"x": x, "residual": draw(*x.shape, dtype=x.dtype, device=x.device), **norm}


def lora_args(dims=(12, 9, 3), lead=(5,), dtype=torch.float64, factor_dtype=None, device="cpu"):
    """Arguments of masked_lora_linear; dims are in_features, out_features, R. Every third coefficient is 0."""
    in_features, out_features, rank = dims
    factor = {"dtype": factor_dtype or dtype, "device": device}
    coeff = draw(rank, **factor)
    coeff[1::3] = 0
    return {
        "x": draw(*lead, in_features, dtype=dtype, device=device),
        "weight": draw(out_features, in_features, dtype=dtype, device=device, gain=in_features**-0.5),
        "bias": draw(out_features, dtype=dtype, device=device),
        "lora_a": draw(rank, in_features, gain=in_features**-0.5, **factor),
        "lora_b": draw(out_features, rank, gain=rank**-0.5, **factor),
        "coeff": coeff,
    }


def mlae_args(dims=(12, 9, 3), expert_rank=2, **options):
    """Arguments of mlae_linear: dims are in_features, out_features and num_experts."""
    in_features, out_features, num_experts = dims
    args = lora_args((in_features, out_features, num_experts * expert_rank), **options)
    return args | {"coeff": args["coeff"][:1].expand(num_experts) + 0.5 * draw(num_experts).to(args["coeff"])}


def norm_mlae_args(dims=(12, 9, 3), expert_rank=2, **options):
    """Arguments of layer_norm_mlae_linear; dims as for `mlae_args`."""
    args = mlae_args(dims, expert_rank, **options)
    x = args.pop("x")
    affine = {"dtype": x.dtype, "device": x.device}
    norm_weight = draw(x.shape[-1], gain=0.3, **affine) + 1
    return {"x": x, "norm_weight": norm_weight, "norm_bias": draw(x.shape[-1], gain=0.3, **affine), "eps": 1e-6, **args}


def small_args(op, device="cpu", **options):
    """Arguments of any op, a few dozen elements each."""
    make = {"layer_norm_alore": layer_norm_args, "masked_lora_linear": lora_args}.get(op, kron_args)
    return make(device=device, **options)


def strided(t):
    """Every other element of a tensor twice as wide."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def transposed(t):
    """First and last axis trade places in memory."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(t):
    """One slice seen along the whole first axis: stride 0."""
    return t[:1].expand_as(t)


def misaligned(t):
    """Contiguous, but one element past an aligned address."""
    return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view_as(t)


def negated(t):
    """A view whose negative bit is set: the values are in memory with the other sign."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    return view


LAYOUTS = [strided, transposed, expanded, misaligned, negated]


def leaves(args, requires_grad=None):
    """Copies of the arguments that share storage and strides, and require grad (all, or those named)."""
    out = {}
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().requires_grad_(requires_grad is None or name in requires_grad)
        out[name] = value
    return out


def run(library, op, args, grad_out=None, names=None):
    """Output and, where grad_out is given, the gradients by name of all tensor arguments, or of those named."""
    inputs = leaves(args, names)
    y = getattr(library, op)(*inputs.values())
    if grad_out is None:
        return y.detach(), {}
    wanted = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    return y.detach(), dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_out), strict=True))


def to_double(args):
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in args.items()}


def output_like(op, args):
    """A random grad_out of the op's output shape."""
    like = getattr(reference, op)(*args.values())
    return draw(*like.shape, dtype=like.dtype, device=like.device)


def _eager_kron_linear(x, scale, down, up):
    scale, down, up = scale.to(x.dtype), down.to(x.dtype), up.to(x.dtype)
    z = torch.einsum("...ap,epr->...aer", x.unflatten(-1, (scale.shape[1], down.shape[1])), down)
    h = torch.einsum("...aer,eab->...ber", z, scale)
    return torch.einsum("...ber,erq->...bq", h, up).flatten(-2)


def _eager_alore(x, scale, down, up):
    return x + _eager_kron_linear(x, scale, down, up)


def _eager_layer_norm_alore(x, weight, bias, eps, scale, down, up):
    weight, bias = (None if v is None else v.to(x.dtype) for v in (weight, bias))
    return _eager_alore(F.layer_norm(x, x.shape[-1:], weight, bias, eps), scale, down, up)


def _eager_masked_lora_linear(x, weight, bias, lora_a, lora_b, coeff):
    lora_a, lora_b, coeff = lora_a.to(x.dtype), lora_b.to(x.dtype), coeff.to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_a) * coeff, lora_b)


EAGER = SimpleNamespace(
    kron_linear=_eager_kron_linear,
    alore=_eager_alore,
    layer_norm_alore=_eager_layer_norm_alore,
    masked_lora_linear=_eager_masked_lora_linear,
)


# Roundings allowed beside eager's error. In float64 the oracle is no more exact than what it judges.
SLACK = {torch.float64: 4096, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def assert_within_budget(got, oracle, eager, what, times=2):
    """error(got) <= times * error(eager) + a rounding or so, both in the largest and in the mean square error.

    Eager's result is first brought to got's dtype: an op that rounds its output may, where eager does not.
    """
    assert got.shape == oracle.shape, what
    if got.numel() == 0:
        return
    eager = eager.to(got.dtype)
    assert eager.isfinite().all(), f"{what}: eager overflows, so it sets no budget"
    slack = torch.finfo(got.dtype).eps * SLACK[got.dtype]
    for norm in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
        error, allowed = norm(got.double() - oracle), times * norm(eager.double() - oracle) + slack * norm(oracle)
        assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def assert_matches_oracle(op, args, names=None, library=ops, oracle=reference, eager=EAGER, draws=1):
    """Forward and every gradient (or those named) of one call against float64, with eager's error as the measure.

    Where an argument is a single number, its gradient is one sum, and how two implementations' errors in it compare is
    partly chance: such calls are judged over several upstream gradients together, and more loosely. (float16 and
    bfloat16, 150 seeds: the ratio of the errors is 0.6 in the median and 2.3 at worst.) Over `draws`
    upstream gradients other small arguments are judged together too.
    """
    single = any(torch.is_tensor(arg) and arg.numel() == 1 for arg in args.values())
    draws, times = (8, 3) if single else (draws, 2)
    results = []
    for _ in range(draws):
        grad_out = output_like(op, args)
        got = run(library, op, args, grad_out, names)
        exact = run(oracle, op, to_double(args), grad_out.double(), names)
        results.append((got, exact, run(eager, op, args, grad_out, names)))
        assert got[0].dtype == args["x"].dtype

    def together(pick):
        return [torch.stack([pick(*outcome) for outcome in draw]) for draw in zip(*results, strict=True)]

    assert_within_budget(*together(lambda output, _: output), f"{op} output", times)
    for name, grad in results[0][0][1].items():
        assert grad.dtype == args[name].dtype, name
        assert_within_budget(*together(lambda _, grads, name=name: grads[name]), f"{op} gradient of {name}", times)


def assert_close_to_oracle(op, args, grad_out=None, tolerance=1e-10):
    """Forward and every gradient of one float64 call against the oracle, relative to its largest element."""
    grad_out = output_like(op, args) if grad_out is None else grad_out
    got, got_grads = run(ops, op, args, grad_out)
    oracle, oracle_grads = run(reference, op, args, grad_out)
    for name, a, b in [("output", got, oracle), *((n, g, oracle_grads[n]) for n, g in got_grads.items())]:
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance * max(largest, 1.0), msg=lambda m, name=name: f"{op} {name}: {m}"
        )
