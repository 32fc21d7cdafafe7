"""Shapes that between them take every path of the fused CUDA kernels, on whatever device there is, against float64.

The kernels leave the affine's gradients to the general path, so that most calls here ask for the others alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from marks import needs_cuda
from op_cases import (
    EAGER,
    KRON_OPS,
    assert_matches_oracle,
    assert_within_budget,
    draw,
    kron_args,
    layer_norm_args,
    leaves,
    misaligned,
    output_like,
    run,
    to_double,
    transposed,
)

from alore_ext import ops, reference

NAMES = ("x", "scale", "down", "up")
LOW = [torch.bfloat16, torch.float16]
PAIRS = [(low, factors) for low in LOW for factors in (low, torch.float32)]
H200 = {"capability": 90, "num_sms": 132, "shared_per_block": 232448}
TOKENS = [19, 1, 197, 16, 400, 0, 17, 15]

# num_experts, embed_dim, rank; 4 blocks of whole groups of 32 columns and at most 16 code columns: pipelined where the
# width is one of those that are compiled, else the fast paths of the kernels for any shape.
PIPELINED = [128, 256, 384, 512, 768, 1024]
FAST = [(4, width, rank) for width in PIPELINED for rank in (1, 4)]
FAST += [(4, 640, 4), (4, 1280, 4), (4, 1536, 4)]
SHAPES = [
    (1, 128, 1),
    (1, 128, 64),
    (2, 96, 8),
    (2, 512, 16),
    (3, 192, 4),
    (3, 768, 8),
    (4, 96, 4),
    (4, 192, 8),
    (4, 384, 16),
    (4, 1024, 8),
    (5, 640, 4),
    (8, 128, 1),
    (8, 256, 8),
    (8, 1024, 4),
]
# Enough tokens for blocks that take several tiles at a time, and that go round more than once.
LARGE = [
    (4, 96, 4, 40000),
    (8, 256, 8, 8500),
    (2, 128, 8, 17000),
    (2, 512, 16, 8500),
    (4, 640, 4, 8500),
    (4, 1536, 4, 2115),
]
# The pipelined kernels: three rounds and more, in which each of the three stages is used again.
LONG = [(128, 40000), (256, 40000), (384, 13000), (512, 20000), (768, 13000), (1024, 8500)]


def matrix():
    """(op, num_experts, embed_dim, rank, tokens, dtypes): each shape under every op, the rest dealt out in turn."""
    for index, shape in enumerate(FAST + SHAPES):
        for turn, op in enumerate(KRON_OPS):
            yield op, *shape, TOKENS[(index + 3 * turn) % len(TOKENS)], PAIRS[(index + turn) % len(PAIRS)]
    for embed_dim in PIPELINED:
        for low in LOW:
            yield "layer_norm_alore", 4, embed_dim, 4, 67, (low, torch.float32)
            yield "alore", 4, embed_dim, 4, 67, (low, low)
    yield "layer_norm_alore", 4, 96, 4, 2115, PAIRS[1]
    yield "layer_norm_alore", 4, 768, 4, 2115, PAIRS[0]


def large():
    for index, shape in enumerate(LARGE):
        yield KRON_OPS[2 - index % 2], *shape, PAIRS[2 * index % 4 + 1]
    for embed_dim, tokens in LONG:
        yield "layer_norm_alore", 4, embed_dim, 4, tokens, (torch.bfloat16, torch.float32)
        yield "alore", 4, embed_dim, 4, tokens, (torch.float16, torch.float32)


def named(cases, **options):
    def words(op, num_experts, embed_dim, rank, tokens, dtypes):
        kinds = "-".join(str(dtype)[6:] for dtype in dtypes)
        return f"{op}-E{num_experts}-d{embed_dim}-r{rank}-t{tokens}-{kinds}"

    return [pytest.param(*case, id=words(*case), **options) for case in cases]


def make(op, num_experts, embed_dim, rank, tokens, dtypes, device):
    block_dim = embed_dim // num_experts
    dims = (num_experts, num_experts, num_experts, block_dim, block_dim, rank)
    arguments = layer_norm_args if op == "layer_norm_alore" else kron_args
    return arguments(dims, (tokens,), *dtypes, device)


@pytest.mark.parametrize(
    ("op", "num_experts", "embed_dim", "rank", "tokens", "dtypes"),
    named(matrix()) + named(large(), marks=needs_cuda),
)
def test_against_the_oracle(op, num_experts, embed_dim, rank, tokens, dtypes, device):
    args = make(op, num_experts, embed_dim, rank, tokens, dtypes, device)
    assert_matches_oracle(op, args, NAMES)


def test_the_cases_above_take_every_path_of_an_h200():
    """What the kernels are instantiated for, or branch on, by the plans of the cases above."""
    forward, rounds, backward, pipelined = set(), set(), set(), set()
    for op, num_experts, embed_dim, rank, tokens, dtypes in [*matrix(), *large()]:
        args = make(op, num_experts, embed_dim, rank, 0, dtypes, "cpu")
        tensors = [args["x"].new_empty(1, 1).expand(tokens, embed_dim), *(args[name] for name in NAMES[1:])]
        norm = op == "layer_norm_alore"
        options = {"norm": norm, "residual": op != "kron_linear", **H200}
        plan, grads = ops.plan_alore(*tensors, **options), ops.plan_alore(*tensors, backward=True, **options)
        assert plan.fused and grads.fused, (plan, grads)
        for name, p in (("forward", plan), ("backward", grads)):
            if p.pipelined:
                pipelined |= {(name, embed_dim, norm, dtypes[0]), (name, embed_dim, norm, tokens > 132 * 48)}
        fast = plan.even and num_experts == 4 and num_experts * rank <= 16
        if not plan.pipelined:
            forward.add((plan.groups_per_warp, fast, norm))
            rounds.add((fast, 16 * plan.tiles_per_block * plan.blocks < tokens))
        if grads.pipelined:
            continue
        code_tiles = -(-num_experts * rank // 16)
        backward |= {("warps", grads.warps), ("row_tiles", grads.row_tiles), ("items", grads.items_per_warp)}
        backward |= {("code_tiles", code_tiles), ("norm", norm), ("splits", min(grads.key_splits, 2))}
        backward |= {("parts", min(grads.parts, 2)), ("stages", grads.stages > 1)}
        backward |= {("goes round", 16 * grads.row_tiles * grads.blocks < tokens), ("fast", fast and norm)}
    assert forward == {(groups, fast, norm) for groups in (4, 6, 8) for fast in (0, 1) for norm in (0, 1)}
    assert rounds == {(fast, again) for fast in (0, 1) for again in (0, 1)}
    assert backward == {
        *(("warps", n) for n in (8, 12)),
        *(("row_tiles", n) for n in (1, 2, 4, 8)),
        *(("items", n) for n in (1, 2)),
        *(("code_tiles", n) for n in (1, 2, 4)),
        *(("splits", n) for n in (1, 2)),
        *(("parts", n) for n in (1, 2)),
        *((what, yes) for what in ("norm", "stages", "goes round", "fast") for yes in (False, True)),
    }
    both = (False, True)
    assert pipelined == {
        *(("forward", d, norm, which) for d in PIPELINED for norm in both for which in (*LOW, *both)),
        *(("backward", d, False, which) for d in PIPELINED[:-1] for which in (*LOW, *both)),
        *(("backward", d, True, which) for d in PIPELINED[:-1] for which in (torch.bfloat16, *both)),
    }


@pytest.mark.parametrize(
    "present", [("weight", "bias"), ("weight",), ("bias",), ()], ids=lambda n: "+".join(n) or "none"
)
def test_gradients_of_the_affine(present, device):
    """Where they are wanted, the general path's backward follows the fused forward."""
    args = make("layer_norm_alore", 4, 256, 4, 197, (torch.bfloat16, torch.float32), device)
    assert_matches_oracle("layer_norm_alore", args | {n: None for n in ("weight", "bias") if n not in present})


@pytest.mark.parametrize("affine_dtype", [torch.float32, None], ids=["float32", "none"])
@pytest.mark.parametrize("dtype", LOW)
def test_other_affines(dtype, affine_dtype, device):
    args = make("layer_norm_alore", 4, 256, 4, 197, (dtype, torch.float32), device)
    for name in ("weight", "bias"):
        args[name] = None if affine_dtype is None else args[name].to(affine_dtype)
    assert_matches_oracle("layer_norm_alore", args, NAMES)


@pytest.mark.parametrize(("num_experts", "embed_dim", "rank"), [(4, 96, 4), (4, 256, 4), (8, 256, 8), (4, 768, 4)])
@pytest.mark.parametrize("op", ["alore", "layer_norm_alore"])
def test_dropout(op, num_experts, embed_dim, rank, device):
    """The mask is the seed's alone: seen where it meets a branch of ones, it serves the oracle and eager too."""
    args = make(op, num_experts, embed_dim, rank, 67, (torch.bfloat16, torch.float32), device)
    seed, p = torch.tensor([11], device=device), 0.25
    one = {"dtype": torch.float64, "device": device}
    down = torch.full((1, embed_dim, 1), 1 / embed_dim, **one)
    ones = (torch.ones(67, embed_dim, **one), torch.ones(1, 1, 1, **one), down, torch.ones(1, 1, embed_dim, **one))
    mask = (torch.ops.alore_ext.alore(*ones, seed, p) != 1) / (1 - p)
    assert 0.7 < (mask != 0).double().mean() < 0.8

    def masked(library):
        def function(x, *rest):
            *norm, scale, down, up = rest
            base = x if op == "alore" else F.layer_norm(x, x.shape[-1:], *norm)
            return base + library.kron_linear(base, scale, down, up) * mask.to(x.dtype)

        return SimpleNamespace(**{op: function})

    def dropped(*inputs):
        out = getattr(torch.ops.alore_ext, op)(*inputs, seed, p)
        return out if op == "alore" else out[0]

    assert_matches_oracle(op, args, NAMES, SimpleNamespace(**{op: dropped}), masked(reference), masked(EAGER))


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize(
    ("num_experts", "embed_dim", "rank", "tokens"),
    [(4, 96, 4, 67), (4, 768, 4, 197), (4, 1024, 8, 17), (2, 512, 16, 0), (4, 128, 4, 400), (8, 256, 1, 1)],
)
def test_float32_rows_with_sixteen_bit_output(num_experts, embed_dim, rank, tokens, low, device):
    """As autocast calls it. The budget is the narrow type's, for float32 gradients too."""
    args = make("layer_norm_alore", num_experts, embed_dim, rank, tokens, (torch.float32, torch.float32), device)
    grad_out = draw(tokens, embed_dim, dtype=low, device=device)

    def narrow(*inputs):
        return torch.ops.alore_ext.layer_norm_alore(*inputs, out_dtype=low)[0]

    def eager(x, weight, bias, eps, *factors):
        return EAGER.alore(F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(low), *factors)

    got, got_grads = run(SimpleNamespace(call=narrow), "call", args, grad_out, NAMES)
    oracle, oracle_grads = run(reference, "layer_norm_alore", to_double(args), grad_out.double(), NAMES)
    measure, measure_grads = run(SimpleNamespace(call=eager), "call", args, grad_out, NAMES)
    assert got.dtype == low
    assert_within_budget(got, oracle, measure, "output")
    for name, grad in got_grads.items():
        assert grad.dtype == torch.float32, name
        assert_within_budget(grad.to(low), oracle_grads[name], measure_grads[name], f"gradient of {name}")


def bf16_case(op, device, tokens=67, num_experts=4, embed_dim=256):
    return make(op, num_experts, embed_dim, 4, tokens, (torch.bfloat16, torch.float32), device)


@pytest.mark.parametrize("names", [("x",), ("scale", "down", "up"), ("up",)], ids="+".join)
@pytest.mark.parametrize("op", KRON_OPS)
def test_some_gradients(op, names, device):
    """Those asked for are, bit for bit, what they are among all."""
    args = bf16_case(op, device)
    grad_out = output_like(op, args)
    _, everything = run(ops, op, args, grad_out, NAMES)
    _, some = run(ops, op, args, grad_out, names)
    assert tuple(some) == names
    for name, grad in some.items():
        assert torch.equal(grad, everything[name]), name


@pytest.mark.parametrize("dims", [(4, 96), (4, 256), (4, 768)], ids=lambda dims: f"d{dims[1]}")
@pytest.mark.parametrize("op", KRON_OPS)
def test_layouts(op, dims, device):
    """Factors seen through transposed views, and rows that start off the 16-byte grid of vector loads."""
    args = bf16_case(op, device, 67, *dims)
    grad_out = output_like(op, args)
    expected, expected_grads = run(ops, op, args, grad_out, NAMES)
    views = args | {name: transposed(args[name]) for name in NAMES[1:]} | {"x": misaligned(args["x"])}
    assert not views["down"].is_contiguous() and views["x"].data_ptr() % 16 == 2
    got, grads = run(ops, op, views, misaligned(grad_out), NAMES)
    assert torch.equal(got, expected)
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


@pytest.mark.parametrize("tokens", [1, 67])
@pytest.mark.parametrize("op", KRON_OPS)
def test_two_runs_are_bitwise_equal(op, tokens, device):
    args = bf16_case(op, device, tokens)
    grad_out = output_like(op, args)
    first, first_grads = run(ops, op, args, grad_out, NAMES)
    second, second_grads = run(ops, op, args, grad_out, NAMES)
    assert torch.equal(first, second)
    for name, grad in first_grads.items():
        assert torch.equal(grad, second_grads[name]), name


RATIOS = [0.0, 3.0, 5.0, 100.0]


class TestStatistics:
    """The kernel sums squares uncentred, and again around the mean where the mean outweighs the spread."""

    @pytest.mark.parametrize("ratios", [*([r] for r in RATIOS), RATIOS], ids=str)
    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("embed_dim", [96, 128, 384, 512, 768])
    def test_mean_beside_the_spread(self, embed_dim, dtype, ratios, device):
        """Ratios of mean to spread, alone and as neighbours in one tile."""
        args = make("layer_norm_alore", 4, embed_dim, 4, 67, (dtype, torch.float32), device)
        shift = torch.tensor(ratios, device=device).repeat(67)[:67, None]
        args["x"] = (args["x"] + shift).to(dtype)
        assert_matches_oracle("layer_norm_alore", args, NAMES)
        _, mean, rstd = torch.ops.alore_ext.layer_norm_alore(*args.values())
        x = args["x"].double()
        torch.testing.assert_close(mean.double(), x.mean(-1), rtol=1e-5, atol=1e-5)
        expected = (x.var(-1, correction=0) + args["eps"]).rsqrt()
        torch.testing.assert_close(rstd.double(), expected, rtol=2e-4, atol=0)

    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("value", [0.0, 2.5])
    def test_constant_rows(self, value, dtype, device):
        """Variance 0 beside ordinary rows: eps keeps everything finite, and the row's output is that of the bias."""
        args = make("layer_norm_alore", 4, 256, 4, 67, (dtype, torch.float32), device)
        args["eps"] = 1e-5
        args["x"][10:20] = value
        grad_out = output_like("layer_norm_alore", args)
        y, grads = run(ops, "layer_norm_alore", args, grad_out, NAMES)
        oracle, oracle_grads = run(reference, "layer_norm_alore", to_double(args), grad_out.double(), NAMES)
        eager, eager_grads = run(EAGER, "layer_norm_alore", args, grad_out, NAMES)
        # Gradients of constant rows are hundreds of times those of others: each kind has a budget of its own.
        for rows in (slice(10, 20), slice(20, None)):
            assert_within_budget(y[rows], oracle[rows], eager[rows], "output")
            assert_within_budget(grads["x"][rows], oracle_grads["x"][rows], eager_grads["x"][rows], "gradient of x")
        for name in NAMES[1:]:
            assert_within_budget(grads[name], oracle_grads[name], eager_grads[name], f"gradient of {name}")

    @pytest.mark.parametrize("embed_dim", [128, 256, 384, 512, 768, 1024])
    @pytest.mark.parametrize("value", [2.5, 100.5])
    def test_constant_rows_under_a_tiny_eps(self, value, embed_dim, device):
        """transformers' ViT has eps 1e-12: the reciprocal deviation of such a row is 1e6, of nothing but the bias."""
        args = make("layer_norm_alore", 4, embed_dim, 4, 67, (torch.bfloat16, torch.float32), device)
        args["eps"] = 1e-12
        args["x"][10:20] = value
        y, _ = run(ops, "layer_norm_alore", args)
        oracle, _ = run(reference, "layer_norm_alore", to_double(args))
        expected = reference.alore(args["bias"].double(), *(args[name].double() for name in NAMES[1:]))
        assert (oracle[10:20] - expected).abs().max() < 1e-6
        assert ((y[10:20].double() - expected).abs() <= 2**-7 * expected.abs().max()).all()
        assert_within_budget(y[20:], oracle[20:], run(EAGER, "layer_norm_alore", args)[0][20:], "output")


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dims", [(4, 96), (4, 256), (8, 128)], ids=lambda dims: f"E{dims[0]}-d{dims[1]}")
@pytest.mark.parametrize("op", KRON_OPS)
class TestOneBadToken:
    """A row shares its tile, and the registers' products, with 15 others, but nothing of it reaches them."""

    def test_in_x(self, op, dims, bad, device):
        args = bf16_case(op, device, 67, *dims)
        grad_out = output_like(op, args)
        expected, expected_grads = run(ops, op, args, grad_out, NAMES)
        args["x"][37, 5] = bad
        self.check(run(ops, op, args, grad_out, NAMES), expected, expected_grads, device)

    def test_in_grad_out(self, op, dims, bad, device):
        args = bf16_case(op, device, 67, *dims)
        grad_out = output_like(op, args)
        expected, expected_grads = run(ops, op, args, grad_out, NAMES)
        grad_out[37, 5] = bad
        y, grads = run(ops, op, args, grad_out, NAMES)
        assert torch.equal(y, expected)
        assert not grads["x"][37].isfinite().all()
        self.check((y, grads), expected, expected_grads, device, bad_output=False)

    def check(self, got, expected, expected_grads, device, bad_output=True):
        y, grads = got
        others = torch.arange(67, device=device) != 37
        assert y[37].isfinite().all() != bad_output
        # A bad row may send its tile's neighbours on the centred pass: equal up to a rounding.
        for a, b in ((y, expected), (grads["x"], expected_grads["x"])):
            assert (a[others] - b[others]).abs().max() <= 2 * torch.finfo(b.dtype).eps * b.abs().max()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("dims", [(4, 96), (4, 256), (4, 768), (8, 128)], ids=lambda dims: f"E{dims[0]}-d{dims[1]}")
class TestZeroUp:
    """U = 0 at step 0 of training: the adapter must not show."""

    def test_alore_is_the_identity(self, dims, dtype, device):
        args = make("alore", *dims, 4, 67, (dtype, torch.float32), device)
        args["up"].zero_()
        assert torch.equal(run(ops, "alore", args)[0], args["x"])

    def test_the_norm_is_the_plain_one(self, dims, dtype, device):
        """Bit for bit what zero factors give, and within a rounding of the exact norm."""
        args = make("layer_norm_alore", *dims, 4, 67, (dtype, torch.float32), device)
        args["up"].zero_()
        y, _ = run(ops, "layer_norm_alore", args)
        zeros = {name: torch.zeros_like(args[name]) for name in NAMES[1:]}
        assert torch.equal(y, run(ops, "layer_norm_alore", args | zeros)[0])
        exact = to_double(args)
        plain = F.layer_norm(exact["x"], exact["x"].shape[-1:], exact["weight"], exact["bias"], exact["eps"])
        assert ((y.double() - plain).abs() <= torch.finfo(dtype).eps * plain.abs() + 1e-4).all()


def test_no_gradient_wanted(device):
    """Inference: no graph, and the same values."""
    args = bf16_case("layer_norm_alore", device)
    expected = ops.layer_norm_alore(*leaves(args).values())
    with torch.inference_mode():
        assert torch.equal(ops.layer_norm_alore(*args.values()), expected.detach())
