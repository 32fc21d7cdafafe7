"""The channel-axis operators under torch.compile(fullgraph=True) and torch.export, and what bad input gets."""

import math

import pytest
import torch
from channel_cases import DENSE, FACTORED, FORMATS, OPS, channel_args, small
from op_cases import leaves, output_like, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from alore_ext import ops

FACTORS = {"alore_channels": "scale", "layer_norm_alore_channels": "scale", "mlae_channels": "lora_a"}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def every_args(op, **options):
    """A call of each way that op runs."""
    if op == "mlae_channels":
        return [small(op, **options)]
    return [channel_args(op, dims, **options) for dims in (FACTORED[2], DENSE[1])]


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0])
    for name, grad in got[1].items():
        torch.testing.assert_close(grad, expected[1][name])
    assert got[0].stride() == expected[0].stride()


class Compiled:
    """ops, each compiled."""

    def __init__(self, backend="aot_eager"):
        self.backend = backend

    def __getattr__(self, op):
        return torch.compile(getattr(ops, op), fullgraph=True, backend=self.backend)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("op", OPS)
def test_training_step(op, memory_format, device):
    for args in every_args(op, memory_format=memory_format, device=device):
        grad_out = output_like(op, args)
        assert_same(run(Compiled(), op, args, grad_out), run(ops, op, args, grad_out))


@pytest.mark.parametrize("op", OPS)
def test_inductor(op, device):
    args = small(op, dtype=torch.float32, device=device)
    grad_out = output_like(op, args)
    assert_same(run(Compiled("inductor"), op, args, grad_out), run(ops, op, args, grad_out))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("op", OPS)
def test_autocast_inside(op, memory_format, device):
    for args in every_args(op, memory_format=memory_format, dtype=torch.float32, device=device):

        def forward(*tensors):
            with torch.autocast(device.type, torch.bfloat16):
                return getattr(ops, op)(*tensors)

        with torch.no_grad():
            got = torch.compile(forward, fullgraph=True, backend="aot_eager")(*args.values())
            torch.testing.assert_close(got, forward(*args.values()))
        assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("op", OPS)
def test_dropout_is_drawn_anew(op, device):
    args = small(op, device=device)
    function = getattr(Compiled(), op)
    results = [function(*args.values(), 0.5) for _ in range(12)]
    assert any(not torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("op", OPS)
def test_dynamic_batch_and_size_compile_once(op, device):
    counter = CompileCounterWithBackend("aot_eager")
    function = getattr(Compiled(counter), op)
    for batch, size in ((2, (7, 5)), (3, (14, 9)), (5, (8, 6))):
        args = small(op, batch=batch, size=size, device=device)
        for axis in (0, 2, 3):
            torch._dynamo.mark_dynamic(args["x"], axis)
        torch.testing.assert_close(function(*args.values()), getattr(ops, op)(*args.values()))
    assert counter.frame_count == 1


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("op", OPS)
def test_export_with_a_dynamic_batch(op, memory_format, device):
    class Layer(torch.nn.Module):
        def __init__(self, args):
            super().__init__()
            self.names = [name for name in args if name != "x"]
            self.rest = {name: value for name, value in args.items() if name == "eps"}
            for name in set(self.names) - {"eps"}:
                self.register_buffer(name, args[name])

        def forward(self, x):
            return getattr(ops, op)(x, *(self.rest.get(name, getattr(self, name, None)) for name in self.names))

    for args in every_args(op, memory_format=memory_format, device=device):
        layer = Layer(args)
        program = export(layer, (args["x"],), dynamic_shapes={"x": {0: Dim("batch", min=2, max=64)}})
        for batch in (2, 7):
            x = torch.randn(batch, *args["x"].shape[1:], dtype=torch.float64, device=device)
            x = x.contiguous(memory_format=memory_format)
            torch.testing.assert_close(program.module()(x), layer(x))


# Argument, what becomes of it, the error, and what its message says.
KRON_ERRORS = [
    ("x", lambda t: t[0, :, 0, 0], ValueError, ["x must be [batch, channels, ...]", "[24]"]),
    ("x", lambda t: t[:, 1:], ValueError, ["axis 1 of x must be num_blocks * p = 4 * 6 = 24", "[2, 23, 7, 5]"]),
    ("x", lambda t: t.long(), TypeError, ["x must be float64, float32, bfloat16 or float16", "int64"]),
    ("x", lambda t: t.double(), TypeError, ["scale must be torch.float64", "torch.float32"]),
    ("scale", lambda t: t[:, 1:], ValueError, ["scale must be [num_experts, num_blocks, num_blocks]", "[4, 3, 4]"]),
    ("scale", lambda t: t[0], ValueError, ["scale must be [num_experts, num_blocks, num_blocks]", "[4, 4]"]),
    ("scale", lambda t: t[1:], ValueError, ["down must be [num_experts, p, rank] = [3, 6, 2]", "[4, 6, 2]"]),
    ("down", lambda t: t.flatten(1), ValueError, ["down must be [num_experts, p, rank]", "[4, 12]"]),
    ("down", lambda t: t[..., :1], ValueError, ["up must be [num_experts, rank, p] = [4, 1, 6]", "[4, 2, 6]"]),
    ("up", lambda t: t[:, :, 1:], ValueError, ["up must be [num_experts, rank, p] = [4, 2, 6]", "[4, 2, 5]"]),
    ("up", lambda t: t.bfloat16(), TypeError, ["up must be torch.float32", "torch.bfloat16"]),
    ("down", lambda t: t.to("meta"), ValueError, ["down must be on x's device", "meta"]),
    ("dropout_p", 1.0, ValueError, ["dropout_p must be in [0, 1), got 1.0"]),
    ("dropout_p", math.nan, ValueError, ["dropout_p must be in [0, 1), got nan"]),
]
MLAE_ERRORS = [
    ("x", lambda t: t[0], ValueError, ["x must be [batch, in_channels, height, width]", "[12, 7, 5]"]),
    ("x", lambda t: t.double(), TypeError, ["weight must be torch.float64", "torch.float32"]),
    ("weight", lambda t: t.expand(-1, -1, 3, 3), ValueError, ["weight must be [out_channels, 12]", "[10, 12, 3, 3]"]),
    ("weight", lambda t: t[:, 1:], ValueError, ["weight must be [out_channels, 12]", "[10, 11, 1, 1]"]),
    ("bias", lambda t: t[1:], ValueError, ["bias must be [out_channels] = [10]", "[9]"]),
    ("lora_a", lambda t: t[:, 1:], ValueError, ["lora_a must be [R, in_channels] = [R, 12]", "[8, 11]"]),
    ("lora_b", lambda t: t[:, 1:], ValueError, ["lora_b must be [out_channels, R] = [10, 8]", "[10, 7]"]),
    ("coeff", lambda t: t[1:], ValueError, ["coeff must be [num_experts], num_experts dividing R = 8", "[3]"]),
    ("coeff", lambda t: t[:0], ValueError, ["coeff must be [num_experts]", "[0]"]),
    ("coeff", lambda t: t.double(), TypeError, ["coeff must be torch.float32", "torch.float64"]),
    ("lora_b", lambda t: t.to("meta"), ValueError, ["lora_b must be on x's device", "meta"]),
    ("mask_p", 1.0, ValueError, ["mask_p must be in [0, 1), got 1.0"]),
    ("mask_p", -0.1, ValueError, ["mask_p must be in [0, 1), got -0.1"]),
]
NORM_ERRORS = [
    ("weight", lambda t: t[1:], ValueError, ["weight must be [channels] = [24]", "[23]"]),
    ("bias", lambda t: t[1:], ValueError, ["bias must be [channels] = [24]", "[23]"]),
]
ERRORS = [
    *(("alore_channels", *case) for case in KRON_ERRORS),
    *(("layer_norm_alore_channels", *case) for case in NORM_ERRORS + KRON_ERRORS),
    *(("mlae_channels", *case) for case in MLAE_ERRORS),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("op", "argument", "bad", "error", "says"), ERRORS)
def test_bad_input_names_the_argument(op, argument, bad, error, says, memory_format, training, device):
    """The same in both memory formats, though other operators run behind them."""
    probability = "mask_p" if op == "mlae_channels" else "dropout_p"
    args = small(op, memory_format=memory_format, dtype=torch.float32, device=device)
    args |= {probability: 0.0, "training": training}
    with pytest.raises(error) as raised:
        getattr(ops, op)(*(args | {argument: bad(args[argument]) if callable(bad) else bad}).values())
    for part in [f"{op}: ", *says]:
        assert part in str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_factors_of_one_dtype(op, device):
    args = small(op, dtype=torch.bfloat16, device=device)
    args[FACTORS[op]] = args[FACTORS[op]].float()
    with pytest.raises(TypeError, match=f"must have {FACTORS[op]}'s dtype torch.float32, got torch.bfloat16"):
        getattr(ops, op)(*args.values())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_shape_and_format(op, memory_format):
    for args in every_args(op, memory_format=memory_format):
        meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in args.items()}
        real, shape_only = (getattr(ops, op)(*leaves(each).values()) for each in (args, meta))
        assert shape_only.shape == real.shape and shape_only.stride() == real.stride()
