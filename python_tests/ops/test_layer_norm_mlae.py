"""layer_norm_mlae_linear: the norm and the low-rank linear behind it as one operator."""

import pytest
import torch
import torch.nn.functional as F
from marks import needs_cuda
from op_cases import (
    DTYPES,
    assert_within_budget,
    draw,
    leaves,
    misaligned,
    norm_mlae_args,
    strided,
    to_double,
    transposed,
)
from poison import poisoned

from alore_ext import ops, reference

namespace = torch.ops.alore_ext

# in_features, out_features, num_experts, expert_rank. On CUDA in bfloat16 the last eight are fused.
DIMS = [
    pytest.param(dims, id="in{}-out{}-E{}-r{}".format(*dims))
    for dims in [
        (12, 9, 3, 1),
        (40, 24, 3, 2),
        (96, 288, 16, 1),
        (1024, 64, 8, 1),
        (128, 384, 8, 1),
        (128, 32, 1, 3),
        (256, 768, 4, 2),
        (384, 1152, 8, 1),
        (384, 96, 5, 1),
        (512, 1536, 1, 1),
        (768, 2304, 8, 1),
        (768, 736, 7, 1),
    ]
]
FUSED = [param for param in DIMS if param.values[0][0] in (128, 256, 384, 512, 768)]
BF16 = {"dtype": torch.bfloat16, "factor_dtype": torch.float32}
NAMES = ("x", "norm_weight", "norm_bias", "bias", "lora_a", "lora_b", "coeff")


def make(dims, lead, **options):
    *features, num_experts, expert_rank = dims
    args = norm_mlae_args((*features, num_experts), expert_rank, lead=lead, **options)
    args["coeff"] = args["coeff"].contiguous()
    return args


def call(args, mask_p, grads, names=NAMES):
    """Outputs, gradients by name of the arguments named, and the mask. `grads`: of out and of the norm's output."""
    inputs = leaves(args, names)
    out, normalised, _, _, mask, _, _ = namespace.layer_norm_mlae_linear(*inputs.values(), mask_p, True)
    return (out.detach(), normalised.detach()), gradients((out, normalised), inputs, names, grads), mask


def gradients(outputs, inputs, names, grads):
    names = [name for name in names if inputs[name] is not None]
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    return dict(zip(names, torch.autograd.grad(outputs, [inputs[name] for name in names], grads), strict=True))


def by(library, args, mask, grads, names=NAMES):
    """The same under a mask that is already known."""
    inputs = leaves(args, names)
    expert_rank = args["lora_a"].shape[0] // mask.numel()
    coeff = (inputs["coeff"] * mask.to(inputs["coeff"].dtype)).repeat_interleave(expert_rank)
    outputs = library(*(inputs | {"coeff": coeff}).values())
    return tuple(o.detach() for o in outputs), gradients(outputs, inputs, names, grads)


def eager(x, norm_weight, norm_bias, eps, weight, bias, lora_a, lora_b, coeff):
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    lora_a, lora_b, coeff = (t.to(x.dtype) for t in (lora_a, lora_b, coeff))
    y = F.linear(normalised, weight, bias) + F.linear(F.linear(normalised, lora_a) * coeff, lora_b)
    return y, normalised


def assert_matches_oracle(args, mask_p=0.5, names=NAMES, both=False):
    tokens = args["x"][..., 0].numel()
    # The error of one sum, or of one token's few, is partly chance: judged over several calls together, like the
    # coefficients' gradients, which are few.
    single = args["coeff"].numel() == 1 or tokens == 1
    draws = []
    for _ in range(8 if single else 3):
        shape = args["x"].shape[:-1]
        like = {"dtype": args["x"].dtype, "device": args["x"].device}
        grads = [draw(*shape, args["weight"].shape[0], **like), draw(*args["x"].shape, **like) if both else None]
        wide = [None if g is None else g.double() for g in grads]
        outputs, got, mask = call(args, mask_p, grads, names)
        exact = by(reference.layer_norm_mlae_linear, to_double(args), mask.double(), wide, names)
        draws.append(((outputs, got), exact, by(eager, args, mask, grads, names)))
    picks = {"out": lambda r: r[0][0], "normalised": lambda r: r[0][1]}
    picks |= {name: lambda r, name=name: r[1][name] for name in draws[0][0][1]}
    for name, pick in picks.items():
        columns = zip(*[[pick(result) for result in results] for results in draws], strict=True)
        assert_within_budget(*(torch.stack(list(column)) for column in columns), name, 3 if single else 2)
    for name, grad in draws[0][0][1].items():
        assert grad.dtype == args[name].dtype, name


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("dims", DIMS)
def test_values_and_gradients(dims, dtype, factor_dtype, device):
    assert_matches_oracle(make(dims, (3, 19), dtype=dtype, factor_dtype=factor_dtype, device=device), both=True)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (19,), (1, 197), (2, 3, 5), (40, 197)], ids=str)
@pytest.mark.parametrize("dims", FUSED)
def test_leading_axes(dims, lead, device):
    """As training runs it, with and without the gradient of x."""
    args = make(dims, lead, device=device, **BF16)
    assert_matches_oracle(args, names=("x", "lora_a", "lora_b", "coeff"))
    assert_matches_oracle(args, names=("lora_a", "lora_b", "coeff"))


@pytest.mark.parametrize("missing", [("norm_weight", "norm_bias"), ("norm_bias",), ("norm_weight",), ("bias",)])
def test_without(missing, device):
    args = make((128, 96, 8, 1), (2, 50), device=device, **BF16)
    assert_matches_oracle(args | dict.fromkeys(missing), names=("x", "lora_a", "lora_b", "coeff"))


@pytest.mark.parametrize("layout", [strided, transposed, misaligned])
def test_layouts(layout, device):
    args = make((128, 96, 8, 1), (2, 50), device=device, **BF16)
    for name in ("x", "norm_weight", "weight", "lora_a", "lora_b", "bias"):
        args[name] = layout(args[name])
    assert_matches_oracle(args, names=("x", "lora_a", "lora_b", "coeff"))


@pytest.mark.parametrize("dims", FUSED[::3])
def test_deterministic(dims, device):
    args = make(dims, (40, 197), device=device, **BF16)
    grads = [draw(40, 197, dims[1], dtype=torch.bfloat16, device=device), None]
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs, got, _ = call(args, 0.5, grads, ("x", "lora_a", "lora_b", "coeff"))
        results.append((*outputs, *got.values()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("value", [0.0, 2.5, -300.0])
@pytest.mark.parametrize("dims", FUSED[::2])
def test_rows_of_equal_values(dims, value, device):
    """Nothing is left of them but the norm's bias."""
    args = make(dims, (21,), device=device, **BF16)
    args["x"][::2] = value
    _, normalised = ops.layer_norm_mlae_linear(*args.values())
    assert torch.equal(normalised[::2], args["norm_bias"].expand_as(normalised[::2]))


@pytest.mark.parametrize("where", ["x", "grad_out", "lora_a", "lora_b"])
@pytest.mark.parametrize("dims", [(12, 9, 5, 1), (128, 96, 5, 1), (768, 736, 5, 1)], ids=str)
def test_masked_experts_are_zero_even_where_something_is_not_finite(dims, where, device):
    args = make(dims, (19,), device=device, **BF16)
    args["coeff"][1] = 0
    tensors = args | {"grad_out": torch.ones(19, dims[1], dtype=torch.bfloat16, device=device)}
    tensors[where].view(-1)[0] = torch.inf
    _, grads, _ = call(args, 0.0, [tensors["grad_out"], None], ("lora_a", "lora_b"))
    assert (grads["lora_a"][1] == 0).all()
    assert (grads["lora_b"][:, 1] == 0).all()


@pytest.mark.parametrize("dims", [(12, 9, 5, 1), (128, 96, 5, 1), (768, 736, 5, 1)], ids=str)
def test_a_masked_expert_that_is_not_finite_has_no_part(dims, device):
    """In the output and in x's gradient."""
    args = make(dims, (19,), device=device, **BF16)
    args["coeff"][1] = 0
    grads = [draw(19, dims[1], dtype=torch.bfloat16, device=device), None]
    (expected, _), expected_grads, _ = call(args, 0.0, grads, ("x",))
    args["lora_a"][1, 0] = torch.inf
    args["lora_b"][0, 1] = torch.nan
    (out, _), got, _ = call(args, 0.0, grads, ("x",))
    assert torch.equal(out, expected)
    assert torch.equal(got["x"], expected_grads["x"])


def test_padded_code_columns_stay_zero(device):
    args = make((128, 96, 5, 1), (19,), device=device, **BF16)
    args["x"][3, 0] = torch.inf
    _, _, code, *_ = namespace.layer_norm_mlae_linear(*args.values(), 0.0, True)
    assert (code[..., 5:] == 0).all()


def test_the_norms_output_alone(device):
    """The linear is computed, but nothing comes of it: the gradient is the norm's."""
    args = make((128, 96, 8, 1), (2, 50), device=device, **BF16)
    grads = [None, draw(2, 50, 128, dtype=torch.bfloat16, device=device)]
    _, got, mask = call(args, 0.5, grads, ("x",))
    wide = [None, grads[1].double()]
    exact = by(reference.layer_norm_mlae_linear, to_double(args), mask.double(), wide, ("x",))[1]
    assert_within_budget(got["x"], exact["x"], by(eager, args, mask, grads, ("x",))[1]["x"], "x")


@pytest.mark.parametrize("training", [True, False])
def test_is_the_two_operators_apart(training, device):
    """In float64 on any device: the same mask from the same seed, the same values."""
    args = make((12, 9, 4, 2), (5, 7), device=device)
    torch.manual_seed(5)
    out, normalised = ops.layer_norm_mlae_linear(*args.values(), 0.5, training)
    plain = F.layer_norm(args["x"], (12,), args["norm_weight"], args["norm_bias"], args["eps"])
    torch.manual_seed(5)
    linear = list(args.values())[4:]
    torch.testing.assert_close(normalised, plain)
    torch.testing.assert_close(out, ops.mlae_linear(plain, *linear, 0.5, training))


def test_gradcheck():
    args = make((6, 5, 2, 2), (3,))
    inputs = leaves(args)

    def function(*tensors):
        return ops.layer_norm_mlae_linear(*tensors[:3], args["eps"], *tensors[3:], 0.0, True)

    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_lower_dtype(dtype, device):
    args = make((128, 96, 8, 1), (2, 5), dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype):
        out, normalised = ops.layer_norm_mlae_linear(*args.values())
    assert out.dtype == normalised.dtype == dtype
    oracle = reference.layer_norm_mlae_linear(
        *[v.double() if isinstance(v, torch.Tensor) else v for v in args.values()]
    )
    torch.testing.assert_close(out.double(), oracle[0], rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_weight": torch.ones(5)}, r"layer_norm_mlae_linear: weight must be \[12\], got \[5\]"),
        ({"eps": -1.0}, "layer_norm_mlae_linear: eps must not be negative"),
        ({"coeff": torch.ones(4)}, "layer_norm_mlae_linear: .*coeff"),
        ({"x": torch.ones(5, 13)}, "layer_norm_mlae_linear: the last axis of x"),
    ],
)
def test_errors(change, message, device):
    args = make((12, 9, 3, 1), (5,), dtype=torch.float32, device=device)
    change = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in change.items()}
    for where in (device, torch.device("meta")):
        moved = {n: v.to(where) if isinstance(v, torch.Tensor) else v for n, v in (args | change).items()}
        with pytest.raises(RuntimeError, match=message):
            ops.layer_norm_mlae_linear(*moved.values())


def test_a_mask_probability_of_one_is_refused(device):
    args = make((12, 9, 3, 1), (5,), dtype=torch.float32, device=device)
    with pytest.raises(RuntimeError, match=r"layer_norm_mlae_linear: mask_p must be in \[0, 1\), got 1"):
        ops.layer_norm_mlae_linear(*args.values(), 1.0)


class TestPlan:
    H100 = {"capability": 90, "num_sms": 132, "shared_per_block": 227 * 1024}
    A100 = {"capability": 80, "num_sms": 108, "shared_per_block": 163 * 1024}
    ADA = {"capability": 89, "num_sms": 128, "shared_per_block": 99 * 1024}

    def plan(self, limits, dims=(768, 2304), rank=8, dtype=torch.bfloat16, weight_dtype=None, tokens=50432):
        x = torch.empty(tokens, dims[0], dtype=dtype, device="meta")
        weight = torch.empty(dims[1], dims[0], dtype=weight_dtype or dtype, device="meta")
        return ops.plan_layer_norm_mlae_linear(x, weight, torch.empty(rank, dims[0], device="meta"), **limits)

    def test_vit_b(self):
        plan = self.plan(self.H100)
        assert plan.fused and plan.overlaps_launches
        assert plan.linear.backward == "staged"
        assert plan.forward_blocks == plan.backward_blocks == 132
        assert plan.workspace_bytes == plan.linear.workspace_bytes + 132 * 8 * 768 * 4
        assert max(plan.forward_shared_bytes, plan.backward_shared_bytes) <= 227 * 1024
        assert "fused=True" in repr(plan)

    def test_few_tokens_take_few_blocks(self):
        plan = self.plan(self.H100, tokens=33)
        assert plan.backward_blocks == 3

    @pytest.mark.parametrize("width", [128, 256, 384, 512, 768])
    def test_widths(self, width):
        assert self.plan(self.H100, (width, 3 * width)).fused

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"dims": (1024, 1024)}, "in_features is not"),
            ({"dims": (768, 2336)}, "no staged backward"),
            ({"dims": (768, 40)}, "no staged backward"),
            ({"rank": 9}, "more than 8 rank rows"),
            ({"dtype": torch.float16}, "not bfloat16"),
            ({"weight_dtype": torch.float32}, "not bfloat16"),
        ],
    )
    def test_refused(self, options, reason):
        plan = self.plan(self.H100, **options)
        assert not plan.fused
        assert reason in plan.reason
        assert reason in repr(plan)

    def test_smaller_devices(self):
        assert self.plan(self.A100, (128, 384)).fused
        assert not self.plan(self.ADA, (768, 2304)).fused
        assert "compute capability" in self.plan(self.ADA | {"capability": 75}).reason

    def test_needs_a_device_or_its_limits(self):
        with pytest.raises(ValueError, match="plan_layer_norm_mlae_linear: give a CUDA device"):
            self.plan({"capability": 90})


class TestFused:
    pytestmark = needs_cuda

    @pytest.mark.parametrize("tokens", [1, 17, 1000, 13000])
    @pytest.mark.parametrize("dims", FUSED)
    def test_nothing_unwritten_is_read(self, dims, tokens):
        device = torch.device("cuda")
        args = make(dims, (tokens,), device=device, **BF16)
        grads = [draw(tokens, dims[1], dtype=torch.bfloat16, device=device), None]
        names = ("x", "lora_a", "lora_b", "coeff")
        assert ops.plan_layer_norm_mlae_linear(args["x"], args["weight"], args["lora_a"]).fused
        torch.manual_seed(1)
        clean = call(args, 0.5, grads, names)
        torch.manual_seed(1)
        with poisoned(device):
            poisoned_call = call(args, 0.5, grads, names)
        for a, b in zip((*clean[0], *clean[1].values()), (*poisoned_call[0], *poisoned_call[1].values()), strict=True):
            assert torch.equal(a, b)

    def test_rows_lie_apart_by_the_code(self):
        args = make((128, 96, 8, 1), (2, 5), device="cuda", **BF16)
        _, normalised, code, *_ = namespace.layer_norm_mlae_linear(*args.values(), 0.0, True)
        assert normalised.stride() == (5 * 136, 136, 1)
        behind = normalised.as_strided((2, 5, 136), normalised.stride())[..., 128:]
        assert torch.equal(behind, code)

    def test_a_graph_replays_with_a_fresh_mask(self):
        device = torch.device("cuda")
        args = make((128, 96, 8, 1), (300,), device=device, **BF16)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            namespace.layer_norm_mlae_linear(*args.values(), 0.5, True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, _, _, _, mask, _, _ = namespace.layer_norm_mlae_linear(*args.values(), 0.5, True)
        masks = []
        for _ in range(8):
            graph.replay()
            masks.append(mask.clone())
        assert len({tuple(m.tolist()) for m in masks}) > 1
