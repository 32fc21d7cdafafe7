"""mlae_linear: the low-rank linear that draws its own mask over experts, and the fold under autocast."""

import pytest
import torch
from marks import needs_cuda
from op_cases import DTYPES, EAGER, assert_within_budget, draw, leaves, mlae_args, to_double
from torch.utils.checkpoint import checkpoint

from alore_ext import ops, reference

namespace = torch.ops.alore_ext

# in_features, out_features, num_experts, expert_rank. On CUDA in 16 bits, features in multiples of 8 and R <= 16 run
# fused, the others by matrix products.
DIMS = [
    pytest.param(dims, id="in{}-out{}-E{}-r{}".format(*dims))
    for dims in [
        (12, 9, 1, 1),
        (17, 23, 5, 1),
        (64, 96, 8, 1),
        (40, 200, 3, 2),
        (136, 72, 5, 3),
        (768, 104, 14, 1),
        (24, 8, 1, 8),
        (72, 40, 8, 4),
        (33, 16, 16, 4),
    ]
]


def with_mask(library, args, mask, grad_out):
    """Output and gradients of the plain op under a mask that is already known, differentiated through it."""
    inputs = leaves(args)
    expert_rank = args["lora_a"].shape[0] // mask.numel()
    coeff = (inputs["coeff"] * mask.to(inputs["coeff"].dtype)).repeat_interleave(expert_rank)
    y = library.masked_lora_linear(*(inputs | {"coeff": coeff}).values())
    wanted = {name: value for name, value in inputs.items() if value is not None}
    return y.detach(), dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_out), strict=True))


def masked_call(args, mask_p, grad_out, training=True):
    """Output, gradients by name and the mask of one mlae_linear."""
    inputs = leaves(args)
    y, _, _, mask = namespace.mlae_linear(*inputs.values(), mask_p, training)
    wanted = {name: value for name, value in inputs.items() if value is not None}
    grads = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_out), strict=True))
    return y.detach(), grads, mask


def make(dims, lead, dtype=torch.float64, factor_dtype=None, device="cpu"):
    *features, num_experts, expert_rank = dims
    options = {"lead": lead, "dtype": dtype, "factor_dtype": factor_dtype, "device": device}
    return mlae_args((*features, num_experts), expert_rank, **options)


def grad_like(args, lead):
    return draw(*lead, args["weight"].shape[0], dtype=args["x"].dtype, device=args["x"].device)


def assert_matches_oracle(args, lead, mask_p=0.5):
    # The error of one sum, or of one token's few, is partly chance: judged over several calls together.
    single = args["coeff"].numel() == 1 or args["x"][..., 0].numel() == 1
    draws = []
    for _ in range(8 if single else 1):
        grad_out = grad_like(args, lead)
        y, grads, mask = masked_call(args, mask_p, grad_out)
        oracle = with_mask(reference, to_double_all(args), mask.double(), grad_out.double())
        draws.append(((y, grads), oracle, with_mask(EAGER, args, mask, grad_out)))
    for name in ("y", *draws[0][0][1]):
        pick = [[r[0] if name == "y" else r[1][name] for r in results] for results in draws]
        got, oracle, eager = (torch.stack(list(column)) for column in zip(*pick, strict=True))
        assert_within_budget(got, oracle, eager, name, 3 if single else 2)


def to_double_all(args):
    return {name: None if value is None else value for name, value in to_double(args).items()}


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("dims", DIMS)
def test_values_and_gradients(dims, dtype, factor_dtype, device):
    assert_matches_oracle(make(dims, (67,), dtype, factor_dtype, device), (67,))


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (19,), (2, 197)], ids=str)
def test_token_counts(lead, dtype, factor_dtype, device):
    for features in ((17, 23), (24, 40)):
        assert_matches_oracle(make((*features, 4, 1), lead, dtype, factor_dtype, device), lead)


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_without_bias_and_at_the_widths_of_vit_base(dtype, factor_dtype, device):
    args = make((768, 2304, 8, 1), (33,), dtype, factor_dtype, device)
    assert_matches_oracle(args | {"bias": None}, (33,))


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_experts(dims, dtype, device):
    """Exact zeros for A, B and, through the mask, the coefficient; nothing of what they hold reaches the output."""
    args = make(dims, (19,), dtype, torch.float32, device)
    expert_rank = dims[3]
    for _ in range(20):
        y, grads, mask = masked_call(args, 0.5, grad_like(args, (19,)))
        masked, rows = mask == 0, (mask == 0).repeat_interleave(expert_rank)
        assert (mask[~masked] == 2).all()
        assert torch.equal(grads["lora_a"].count_nonzero(dim=1) == 0, rows)
        assert torch.equal(grads["lora_b"].count_nonzero(dim=0) == 0, rows)
        assert torch.equal(grads["coeff"] == 0, masked)
        if masked.any():
            break
    broken = {**args, "lora_a": args["lora_a"].clone(), "lora_b": args["lora_b"].clone()}
    torch.manual_seed(3)
    y, grads, mask = masked_call(args, 0.5, torch.ones_like(y))
    rows = (mask == 0).repeat_interleave(expert_rank)
    broken["lora_a"][rows] = torch.inf
    broken["lora_b"][:, rows] = torch.nan
    torch.manual_seed(3)
    again, again_grads, _ = masked_call(broken, 0.5, torch.ones_like(y))
    assert torch.equal(y, again)
    for name in ("x", "lora_a", "lora_b", "coeff"):
        assert torch.equal(grads[name], again_grads[name]), name


class TestMask:
    ARGS = (64, 48, 8, 1)

    def masks(self, device, mask_p, calls, training=True, args=None):
        args = args or make(self.ARGS, (0,), torch.float32, device=device)
        return torch.stack([namespace.mlae_linear(*args.values(), mask_p, training)[3] for _ in range(calls)])

    @pytest.mark.parametrize("mask_p", [0.1, 0.5, 0.8])
    def test_statistics(self, mask_p, device):
        masks = self.masks(device, mask_p, 1000)
        kept = masks != 0
        torch.testing.assert_close(masks[kept], torch.full_like(masks[kept], 1 / (1 - mask_p)))
        deviation = (mask_p * (1 - mask_p)) ** 0.5
        assert abs(kept.double().mean() - (1 - mask_p)) < 5 * deviation / 8000**0.5
        assert ((kept.double().mean(0) - (1 - mask_p)).abs() < 5 * deviation / 1000**0.5).all()
        # Experts and calls are drawn apart: no correlation beyond chance.
        centred = (kept.double() - (1 - mask_p)) / deviation
        between_experts = (centred.T @ centred / 1000).fill_diagonal_(0)
        between_calls = (centred[1:] * centred[:-1]).mean(0)
        assert between_experts.abs().max() < 0.2 and between_calls.abs().max() < 0.2

    def test_follows_torchs_seed(self, device):
        args = make(self.ARGS, (0,), torch.float32, device=device)
        torch.manual_seed(5)
        first = self.masks(device, 0.5, 8, args=args)
        assert not torch.equal(first, self.masks(device, 0.5, 8, args=args))
        torch.manual_seed(5)
        assert torch.equal(first, self.masks(device, 0.5, 8, args=args))

    @pytest.mark.parametrize(("mask_p", "training"), [(0.5, False), (0.0, True)])
    def test_none_is_drawn_where_none_is_wanted(self, mask_p, training, device):
        args = make(self.ARGS, (0,), torch.float32, device=device)
        torch.manual_seed(5)
        expected = torch.rand(4, device=device)
        torch.manual_seed(5)
        assert (self.masks(device, mask_p, 2, training, args) == 1).all()
        assert torch.equal(torch.rand(4, device=device), expected)

    def test_two_forwards_before_one_backward(self, device):
        """Each keeps the mask it drew: gradients add up over both."""
        args = make((64, 48, 8, 2), (19,), torch.float32, device=device)
        inputs = leaves(args)
        torch.manual_seed(1)
        outputs = [namespace.mlae_linear(*inputs.values(), 0.5, True) for _ in range(2)]
        masks = [out[3] for out in outputs]
        assert not torch.equal(*masks)
        (outputs[0][0].sum() + outputs[1][0].square().sum()).backward()
        grads = [
            with_mask(ops, args, masks[0], torch.ones_like(outputs[0][0]))[1],
            with_mask(ops, args, masks[1], 2 * outputs[1][0].detach())[1],
        ]
        for name, value in inputs.items():
            torch.testing.assert_close(value.grad, grads[0][name] + grads[1][name], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoint_sees_the_same_mask(self, use_reentrant, device):
        args = make((64, 48, 8, 1), (19,), torch.float32, device=device)

        def gradients(checkpointed):
            inputs = leaves(args)
            forward = lambda *tensors: ops.mlae_linear(*tensors, 0.5)  # noqa: E731
            torch.manual_seed(3)
            run = (lambda *t: checkpoint(forward, *t, use_reentrant=use_reentrant)) if checkpointed else forward
            y = run(*inputs.values())
            torch.manual_seed(99)  # what happens between forward and backward must not matter
            y.square().sum().backward()
            return [y.detach(), *(value.grad for value in inputs.values())]

        for a, b in zip(gradients(False), gradients(True), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("op", [pytest.param("mlae_linear", marks=needs_cuda)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_cuda_graph_replays_draw_anew(self, op, dtype):
        args = make((64, 48, 8, 1), (19,), dtype, torch.float32, "cuda")
        inputs = leaves(args)
        grad_out = grad_like(args, (19,))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                getattr(namespace, op)(*inputs.values(), 0.5, True)[0].backward(grad_out)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        wanted = list(inputs.values())
        with torch.cuda.graph(graph):
            y, _, _, mask = getattr(namespace, op)(*wanted, 0.5, True)
            grads = torch.autograd.grad(y, wanted, grad_out)
        seen = set()
        for _ in range(20):
            graph.replay()
            seen.add(tuple(mask.tolist()))
            expected, expected_grads = with_mask(ops, args, mask, grad_out)
            torch.testing.assert_close(y.detach(), expected)
            for name, grad in zip(inputs, grads, strict=True):
                torch.testing.assert_close(grad, expected_grads[name], msg=name)
        assert len(seen) > 10


# Features, ranks, weight's dtype and the plan on a GPU with 227 KiB of shared memory a block.
CUDA_PATHS = [
    pytest.param((64, 96, 8, 1), None, ("extended", "staged"), marks=needs_cuda),
    pytest.param((96, 64, 5, 1), None, ("fused", "staged"), marks=needs_cuda),
    pytest.param((384, 1152, 4, 2), None, ("extended", "staged"), marks=needs_cuda),
    pytest.param((768, 2304, 8, 1), None, ("extended", "staged"), marks=needs_cuda),
    pytest.param((768, 64, 8, 1), None, ("fused", "staged"), marks=needs_cuda),
    pytest.param((72, 96, 8, 1), None, ("extended", "fused"), marks=needs_cuda),
    pytest.param((96, 64, 12, 1), None, ("fused", "fused"), marks=needs_cuda),
    pytest.param((768, 2304, 14, 1), None, ("extended", "fused-half"), marks=needs_cuda),
    pytest.param((64, 96, 8, 4), None, ("gemm", "gemm"), marks=needs_cuda),
    pytest.param((64, 96, 8, 1), torch.float32, ("fold", "staged"), marks=needs_cuda),
    pytest.param((64, 92, 8, 1), torch.float32, ("fold", "gemm"), marks=needs_cuda),
]


@pytest.mark.parametrize(("dims", "weight_dtype", "paths"), CUDA_PATHS)
def test_every_path_is_deterministic_and_only_enqueues(dims, weight_dtype, paths):
    args = make(dims, (5, 197), torch.bfloat16, torch.float32, "cuda")
    args["weight"] = args["weight"].to(weight_dtype or torch.bfloat16)
    plan = ops.plan_lora(args["x"], args["weight"], args["lora_a"])
    if torch.cuda.get_device_capability() == (9, 0):
        assert (plan.forward, plan.backward) == paths, plan
    assert_matches_oracle(args | {"weight": args["weight"].to(torch.bfloat16)}, (5, 197))
    grad_out = grad_like(args, (5, 197))
    results = []
    for _ in range(3):
        torch.manual_seed(1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y, grads, _ = masked_call(args, 0.5, grad_out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([y, *grads.values()])
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


@pytest.mark.parametrize(
    ("dims", "tokens"),
    [
        pytest.param(dims, tokens, marks=needs_cuda, id=f"in{dims[0]}-out{dims[1]}-t{tokens}")
        for dims, tokens in (
            ((64, 96, 8, 1), 40001),
            ((128, 384, 8, 1), 40001),
            ((256, 768, 8, 1), 17001),
            ((384, 1152, 8, 1), 17001),
            ((512, 1536, 8, 1), 8501),
            ((768, 2304, 8, 1), 8501),
        )
    ],
)
def test_staged_backward_over_several_rounds(dims, tokens):
    """Each of its two stages is filled again while the other is read."""
    args = make(dims, (tokens,), torch.bfloat16, torch.float32, "cuda")
    if torch.cuda.get_device_capability() == (9, 0):
        assert ops.plan_lora(args["x"], args["weight"], args["lora_a"]).backward == "staged"
    assert_matches_oracle(args, (tokens,))


@pytest.mark.parametrize("offset", [pytest.param(k, marks=needs_cuda) for k in (1, 3)])
def test_views_that_start_off_a_16_byte_boundary(offset):
    """What the fused kernels load 16 bytes at a time is copied first where it does not start on such a boundary."""
    args = make((64, 96, 8, 1), (19,), torch.bfloat16, torch.float32, "cuda")
    shifted = {
        name: torch.cat([value.new_zeros(offset), value.flatten()])[offset:].view(value.shape)
        for name, value in args.items()
    }
    grad_out = grad_like(args, (19,))
    results = []
    for call in (args, shifted):
        torch.manual_seed(2)
        y, grads, _ = masked_call(call, 0.5, grad_out)
        results.append([y, *grads.values()])
    for a, b in zip(*results, strict=True):
        # cuBLAS may choose another algorithm for the views; a sum that cancels differs by the rounding of its terms.
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-8 * a.abs().max().item())


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_dynamo(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_training_step(self, backend, device):
        """fullgraph; the compiled step draws what eager draws, afresh at each call, and backward sees that mask."""
        args = make((64, 48, 8, 2), (19,), torch.float32, device=device)
        grad_out = grad_like(args, (19,))

        def step(function):
            inputs = leaves(args)
            y = function(*inputs.values(), 0.5)
            y.backward(grad_out)
            return [y.detach(), *(value.grad for value in inputs.values())]

        function = torch.compile(ops.mlae_linear, fullgraph=True, backend=backend)
        step(function)
        torch.manual_seed(4)
        first, second = step(function), step(function)
        torch.manual_seed(4)
        for a, b in zip(first, step(ops.mlae_linear), strict=True):
            torch.testing.assert_close(a, b)
        assert not torch.equal(first[0], second[0])

    def test_opcheck_with_a_mask(self, device):
        args = make((24, 40, 8, 1), (19,), torch.bfloat16, torch.float32, device)
        arguments = [value.requires_grad_() for value in args.values()]
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(namespace.mlae_linear.default, [*arguments, 0.5, True], test_utils=checks)


class TestFold:
    """A float32 weight under 16-bit activations: W + B diag(c) A is rounded once, in the place of autocast's cast."""

    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
    def test_error_of_the_adapters_own_contribution(self, size, low, device):
        """y - x W0 against float64, for adapters from 1e-4 to 1 times the weight's scale: the sums of squares over
        three draws stay within twice those of eager's two paths under the same autocast."""
        ours = eagers = 0.0
        for _ in range(3):
            args = make((96, 88, 8, 1), (197,), torch.float32, device=device)
            update = (args["lora_b"] * args["coeff"]) @ args["lora_a"]
            args["lora_b"] *= size * args["weight"].std() / update.std()
            args["x"] = args["x"].to(low).float()  # rounding x is the same for both
            exact = to_double(args)
            base = torch.nn.functional.linear(exact["x"], exact["weight"], exact["bias"])
            contribution = reference.masked_lora_linear(*exact.values()) - base
            with torch.autocast(device.type, low):
                got, eager = ops.masked_lora_linear(*args.values()), EAGER.masked_lora_linear(*args.values())
            assert got.dtype == low
            ours += (got.double() - base - contribution).square().sum().sqrt()
            eagers += (eager.double() - base - contribution).square().sum().sqrt()
        assert ours <= 2 * eagers

    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dims", DIMS)
    def test_gradients(self, dims, low, device):
        args = make(dims, (67,), low, torch.float32, device)
        args["weight"] = args["weight"].float() * (1 + draw(1).item() * 1e-3)
        draws = []
        for _ in range(8 if args["coeff"].numel() == 1 else 1):
            grad_out = grad_like(args, (67,))
            y, grads, mask = masked_call(args, 0.5, grad_out)
            with torch.autocast(device.type, low):
                eager = with_mask_autocast(args, mask, grad_out, low)
            oracle = with_mask(reference, to_double(args), mask.double(), grad_out.double())
            draws.append(((y, grads), oracle, eager))
        for name in ("y", *draws[0][0][1]):
            pick = [[r[0] if name == "y" else r[1][name] for r in results] for results in draws]
            got, oracle, eager = (torch.stack(list(column)) for column in zip(*pick, strict=True))
            assert name == "y" or got.dtype == args[name].dtype
            assert_within_budget(got.to(low), oracle, eager, name, 3 if len(draws) > 1 else 2)

    def test_a_weight_stored_in_sixteen_bits_does_not_fold(self, device):
        args = make((64, 48, 4, 1), (19,), torch.bfloat16, torch.float32, device)
        for weight, path in ((args["weight"], "side"), (args["weight"].float(), "fold")):
            _, code, operand, _ = namespace.mlae_linear(*(args | {"weight": weight}).values())
            assert (operand.shape == weight.shape) == (path == "fold")
            assert code.shape[-1] == (0 if path == "fold" else 8)


def with_mask_autocast(args, mask, grad_out, low):
    """Eager's two paths with the weight cast as autocast casts it."""
    inputs = leaves(args)
    expert_rank = args["lora_a"].shape[0] // mask.numel()
    coeff = (inputs["coeff"] * mask).repeat_interleave(expert_rank)
    y = EAGER.masked_lora_linear(*(inputs | {"coeff": coeff, "weight": inputs["weight"].to(low)}).values())
    return y.detach(), dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad_out), strict=True))
