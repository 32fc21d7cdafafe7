"""torch.compile(fullgraph=True), torch.export and autocast inside a compiled region. Mostly aot_eager: it runs all of
tracing, fake tensors, functionalisation and the joint graph, without minutes of code generation."""

import pytest
import torch
from marks import needs_cuda
from op_cases import OPS, draw, kron_args, leaves, lora_args, output_like, run, small_args
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from alore_ext import ops


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def step(function, args, grad_out, *tail):
    """Output and gradients of one training step."""
    inputs = leaves(args)
    y = function(*inputs.values(), *tail)
    y.backward(grad_out)
    return [y.detach(), *(v.grad for v in inputs.values() if isinstance(v, torch.Tensor))]


def assert_all_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPS)
def test_training_step_of_each_op(op, device):
    args = small_args(op, device)
    grad_out = output_like(op, args)
    assert_all_close(step(compiled(getattr(ops, op)), args, grad_out), step(getattr(ops, op), args, grad_out))


@pytest.mark.parametrize("op", ["alore", "layer_norm_alore"])
def test_dropout(op, device):
    """A compiled step draws a fresh seed each time, from torch's generator, and its backward sees forward's mask."""
    args = small_args(op, device, lead=(64,))
    grad_out = output_like(op, args)
    function = compiled(getattr(ops, op))
    torch.manual_seed(4)
    first, second = (step(function, args, grad_out, 0.5) for _ in range(2))
    torch.manual_seed(4)
    again = step(getattr(ops, op), args, grad_out, 0.5)
    assert not torch.equal(first[0], second[0])
    assert_all_close(first, again)  # aot_eager runs the same randint: the same seed, mask and gradients


@pytest.mark.parametrize("op", OPS)
def test_dynamic_token_count_compiles_once(op, device):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(getattr(ops, op), counter)

    def any_length(x, *rest):
        torch._dynamo.mark_dynamic(x, 1)
        return function(x, *rest)

    for num_tokens in (5, 19, 197):
        args = small_args(op, device, lead=(2, num_tokens))
        grad_out = output_like(op, args)
        assert_all_close(step(any_length, args, grad_out), step(getattr(ops, op), args, grad_out))
    assert counter.frame_count == 1


def test_merges_are_functionalised(device):
    """Two in-place merges with a use before, between and after: the compiler may not reorder them."""
    args = kron_args(device=device)
    weight, bias, x = draw(12, 12, device=device), draw(12, device=device), args.pop("x")
    lora = lora_args((12, 12, 3), device=device)
    low_rank = lora["lora_a"], lora["lora_b"], lora["coeff"]

    def function(weight, bias, x):
        outputs = [torch.nn.functional.linear(x, weight, bias)]
        ops.merge_kron_(weight, bias, *args.values(), "after")
        outputs.append(torch.nn.functional.linear(x, weight, bias))
        ops.merge_lora_(weight, *low_rank)
        outputs.append(torch.nn.functional.linear(x, weight, bias))
        return outputs

    again = weight.clone(), bias.clone()
    with torch.no_grad():
        expected, got = function(weight, bias, x), compiled(function)(*again, x)
    assert_all_close(got, expected)
    assert_all_close(again, (weight, bias))


@pytest.mark.parametrize("op", ["layer_norm_alore", "masked_lora_linear"])
def test_autocast(op, device):
    """Mixed-precision training: float32 parameters, autocast around a compiled model."""
    args = small_args(op, device, dtype=torch.float32)
    grad_out = output_like(op, args).bfloat16()

    def forward(*inputs):
        with torch.autocast(device.type, torch.bfloat16):
            return getattr(ops, op)(*inputs)

    got, expected = step(compiled(forward), args, grad_out), step(forward, args, grad_out)
    assert got[0].dtype == torch.bfloat16
    assert_all_close(got, expected)


class Block(torch.nn.Module):
    """Every differentiable op once: norm with adapter, masked low-rank linear, adapter, Kronecker map."""

    def __init__(self, device, dropout=0.0):
        super().__init__()
        norm, lora = (small_args(op, device, dtype=torch.float32) for op in OPS[2:])
        (alore, kron) = (small_args(op, device, dtype=torch.float32) for op in OPS[:2])
        lora = lora_args((12, 12, 3), dtype=torch.float32, device=device)
        for prefix, args in (("norm", norm), ("lora", lora), ("alore", alore), ("kron", kron)):
            names = [n for n, v in args.items() if isinstance(v, torch.Tensor) and n != "x"]
            parameters = {n: torch.nn.Parameter(args[n]) for n in names}
            setattr(self, prefix, torch.nn.ParameterDict(parameters))
        self.dropout = dropout

    def forward(self, x):
        n, m, a, k = (dict(getattr(self, name).items()) for name in ("norm", "lora", "alore", "kron"))
        dropout = {"dropout_p": self.dropout, "training": self.training}
        x = ops.layer_norm_alore(x, n["weight"], n["bias"], 1e-6, n["scale"], n["down"], n["up"], **dropout)
        x = ops.masked_lora_linear(x, m["weight"], m["bias"], m["lora_a"], m["lora_b"], m["coeff"])
        x = ops.alore(x, a["scale"], a["down"], a["up"], **dropout)
        return ops.kron_linear(x, k["scale"], k["down"], k["up"])


def block_step(function, block, x):
    block.zero_grad()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in block.parameters())]


def test_inductor(device):
    """One real compilation, with dropout: the ops stay single calls in the generated code, and training works."""
    block, x = Block(device), draw(3, 7, 12, dtype=torch.float32, device=device)
    expected = block_step(block, block, x)
    got, code = run_and_get_code(lambda: block_step(compiled(block, "inductor"), block, x))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for op in OPS:
        assert sum(text.count(f"alore_ext.{op}.default(") for text in code) == 1, op
        assert sum(text.count(f"alore_ext.{op}_backward.default(") for text in code) == 1, op


def test_inductor_dropout_draws_from_torchs_generator(device):
    args = small_args("alore", device, dtype=torch.float32, lead=(64,))
    function = compiled(lambda *a: ops.alore(*a, 0.5), "inductor")
    torch.manual_seed(4)
    first, second = function(*args.values()), function(*args.values())
    torch.manual_seed(4)
    again = function(*args.values())
    assert torch.equal(first, again) and not torch.equal(first, second)
    kept = (first - args["x"]).ne(0).double().mean()
    assert 0.4 < kept < 0.6


@pytest.mark.parametrize("training", [False, True])
def test_export(training, device):
    """The exported program holds the ops by name and runs for any number of tokens."""
    block = Block(device, dropout=0.3).train(training)
    x = draw(2, 7, 12, dtype=torch.float32, device=device)
    program = torch.export.export(block, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", min=2)},))
    targets = [str(node.target) for node in program.graph.nodes]
    for op in OPS:
        assert targets.count(f"alore_ext.{op}.default") == 1, op
    for num_tokens in (7, 19):
        x = draw(2, num_tokens, 12, dtype=torch.float32, device=device)
        torch.manual_seed(2)
        got = program.module()(x)
        torch.manual_seed(2)
        torch.testing.assert_close(got, block(x))


def test_export_of_a_merge(device):
    class Merge(torch.nn.Module):
        def forward(self, weight, scale, down, up):
            weight = weight.clone()
            ops.merge_kron_(weight, None, scale, down, up, "before")
            return weight

    args = kron_args(device=device)
    args["x"] = draw(9, 12, device=device)
    with torch.no_grad():
        program = torch.export.export(Merge(), tuple(args.values()))
        torch.testing.assert_close(program.module()(*args.values()), Merge()(*args.values()))


@pytest.mark.parametrize("op", [pytest.param(op, marks=needs_cuda) for op in OPS])
def test_reduce_overhead_mode(op):
    """CUDA graphs under torch.compile: replayed steps give what eager gives, for new inputs too."""
    args = small_args(op, "cuda", dtype=torch.float32, lead=(19,))
    function = torch.compile(getattr(ops, op), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        args["x"] = draw(*args["x"].shape, dtype=torch.float32, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(function(*args.values()), run(ops, op, args)[0])
