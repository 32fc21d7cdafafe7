"""The axial shifts. Forward is a copy, so it must give the reference's bits; backward of the pair rounds once.

opcheck, gradcheck and results in poisoned memory of these ops are in test_registration and test_uninitialised, with
those of all others."""

import pytest
import torch
from marks import needs_cuda
from op_calls import namespace
from op_cases import draw, misaligned, negated, strided, transposed

from alore_ext import ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
# Channels that fill vectors of 16 bytes and that do not, a shift wider than the image, planes smaller than a vector.
SHAPES = [(2, 16, 5, 6), (1, 7, 3, 4), (3, 32, 7, 7), (2, 40, 1, 9), (2, 3, 2, 1), (1, 24, 1, 1), (1, 64, 14, 13)]
SHIFT_SIZES = [1, 2, 3, 4, 5, 6, 7, 12, 1000, 2**62]

each_format = pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
each_dim = pytest.mark.parametrize("dim", [2, 3, -2, -1])


def image(shape, device, dtype=torch.float64, memory_format=torch.contiguous_format):
    return draw(*shape, dtype=dtype, device=device).to(memory_format=memory_format)


def gradient(function, x, *grads):
    """x's gradient, from one incoming gradient for each of function's results."""
    x = x.detach().requires_grad_()
    out = function(x)
    torch.autograd.backward(out if isinstance(out, tuple) else (out,), grads)
    return x.grad


def assert_same_format(out, x):
    assert out.stride() == torch.empty_like(x).stride()
    assert out.dtype == x.dtype and out.device == x.device


@each_format
@each_dim
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_single(shape, dtype, dim, memory_format, device):
    x, grad = (image(shape, device, dtype, memory_format) for _ in range(2))
    for shift_size in SHIFT_SIZES:
        out = ops.axial_shift(x, shift_size, dim)
        assert torch.equal(out, reference.axial_shift(x, shift_size, dim)), shift_size
        assert_same_format(out, x)
        got = gradient(lambda v, s=shift_size: ops.axial_shift(v, s, dim), x, grad)
        assert torch.equal(got, gradient(lambda v, s=shift_size: reference.axial_shift(v, s, dim), x, grad))


@each_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair(shape, dtype, memory_format, device):
    x, grad_w, grad_h = (image(shape, device, dtype, memory_format) for _ in range(3))
    for shift_size in SHIFT_SIZES:
        pair = ops.axial_shift_pair(x, shift_size)
        for out, dim in zip(pair, (3, 2), strict=True):
            assert torch.equal(out, reference.axial_shift(x, shift_size, dim)), (shift_size, dim)
            assert_same_format(out, x)
        got = gradient(lambda v, s=shift_size: ops.axial_shift_pair(v, s), x, grad_w, grad_h)
        along_w = gradient(lambda v, s=shift_size: reference.axial_shift(v, s, 3), x, grad_w)
        along_h = gradient(lambda v, s=shift_size: reference.axial_shift(v, s, 2), x, grad_h)
        assert torch.equal(got, along_w + along_h), shift_size
        assert_same_format(got, grad_w)


def test_what_moves_where(device):
    """AS-MLP's figure, spelled out: five channels, shift size 5, one row."""
    x = torch.arange(1.0, 6.0, device=device).expand(1, 5, 1, 5).contiguous()
    expected = [[3, 4, 5, 0, 0], [2, 3, 4, 5, 0], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert ops.axial_shift(x, 5, 3)[0, :, 0].tolist() == expected
    assert ops.axial_shift(x.mT.contiguous(), 5, 2)[0, :, :, 0].tolist() == expected


@pytest.mark.parametrize("shift_size", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("channels", [7, 20, 3])
def test_published_definition(shift_size, channels, device):
    """The paper's algorithm 1: pad, cut into chunks of channels, roll each, join, and cut the padding off."""
    x = image((2, channels, 6, 5), device)
    pad = shift_size // 2
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
    for dim in (2, 3):
        chunks = zip(padded.chunk(shift_size, 1), range(-pad, pad + 1), strict=False)
        rolled = torch.cat([chunk.roll(by, dim) for chunk, by in chunks], 1)
        expected = rolled.narrow(2, pad, 6).narrow(3, pad, 5)
        assert torch.equal(ops.axial_shift(x, shift_size, dim), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [strided, transposed, misaligned, negated], ids=lambda f: f.__name__)
def test_other_layouts(layout, dtype, device):
    x, grad_w, grad_h = (layout(image((2, 16, 5, 4), device, dtype)) for _ in range(3))
    plain = [t.contiguous() for t in (x, grad_w, grad_h)]
    for out, dim in zip(ops.axial_shift_pair(x, 5), (3, 2), strict=True):
        assert torch.equal(out, reference.axial_shift(x, 5, dim))
        assert torch.equal(out, ops.axial_shift(x, 5, dim))
        assert out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)
    got, expected = (gradient(lambda v: ops.axial_shift_pair(v, 5), *args) for args in ((x, grad_w, grad_h), plain))
    assert torch.equal(got, expected)


@each_format
def test_slices_of_channels_and_of_pixels(memory_format, device):
    x = image((2, 32, 6, 8), device, torch.float32, memory_format)
    for part in (x[:, 3:19], x[:, :, 1:-1, 2:-1], x[1:, ::2]):
        for dim in (2, 3):
            out = ops.axial_shift(part, 5, dim)
            assert torch.equal(out, reference.axial_shift(part, 5, dim))
            assert out.is_contiguous(memory_format=memory_format)


def test_expanded_input_and_gradient(device):
    x = image((1, 16, 1, 5), device).expand(3, 16, 4, 5)
    assert torch.equal(ops.axial_shift(x, 5, 2), reference.axial_shift(x, 5, 2))
    one = torch.ones((), dtype=x.dtype, device=device)
    got = gradient(lambda v: ops.axial_shift_pair(v, 5), x, one.expand_as(x), one.expand_as(x))
    expected = gradient(lambda v: reference.axial_shift_pair(v, 5), x, torch.ones_like(x), torch.ones_like(x))
    assert torch.equal(got, expected)


def test_gradients_of_two_formats(device):
    x = image((2, 16, 5, 4), device, torch.float32)
    grad_w, grad_h = image(x.shape, device, x.dtype, torch.channels_last), image(x.shape, device, x.dtype)
    got = namespace.axial_shift_pair_backward(grad_w, grad_h, 5)
    assert torch.equal(got, namespace.axial_shift_pair_backward(grad_w.contiguous(), grad_h, 5))
    assert got.is_contiguous(memory_format=torch.channels_last)


@each_format
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0)], ids=str)
def test_empty(shape, memory_format, device):
    x = torch.zeros(shape, device=device).to(memory_format=memory_format)
    assert ops.axial_shift(x, 5, 3).shape == x.shape
    got = gradient(lambda v: ops.axial_shift_pair(v, 5), x, x, x)
    assert got.shape == x.shape


def test_pair_with_one_gradient(device):
    x, grad = (image((2, 16, 5, 4), device) for _ in range(2))
    for index, dim in enumerate((3, 2)):
        got = gradient(lambda v, i=index: ops.axial_shift_pair(v, 5)[i], x, grad)
        assert torch.equal(got, gradient(lambda v, d=dim: reference.axial_shift(v, 5, d), x, grad))


def test_nothing_is_saved_for_backward(device):
    x = image((2, 16, 5, 4), device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        ops.axial_shift(x, 5, 2)
        ops.axial_shift_pair(x, 5)
    assert saved == []


def test_large_gaps_stay_zero_beside_infinities(device):
    """Zeros are filled in, not multiplied in."""
    x = torch.full((1, 10, 3, 3), torch.inf, device=device)
    for dim in (2, 3):
        assert torch.equal(ops.axial_shift(x, 5, dim), reference.axial_shift(x, 5, dim))


@pytest.mark.parametrize("compile_", [False, True], ids=["eager", "compiled"])
def test_autocast_passes_the_dtype_through(compile_, device):
    x = image((2, 16, 5, 4), device, torch.float32)

    def forward(x):
        with torch.autocast(device.type, torch.bfloat16):
            return ops.axial_shift_pair(x, 5)

    function = torch.compile(forward, fullgraph=True, backend="aot_eager") if compile_ else forward
    assert [t.dtype for t in function(x)] == [torch.float32] * 2


class Shifts(torch.nn.Module):
    def forward(self, x):
        along_w, along_h = ops.axial_shift_pair(x, 5)
        return ops.axial_shift(along_w.sin() + along_h.cos(), 3, -1)


@each_format
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, memory_format, device):
    torch._dynamo.reset()
    x, grad = (image((2, 16, 5, 4), device, torch.float32, memory_format) for _ in range(2))
    function = torch.compile(Shifts(), fullgraph=True, backend=backend)
    torch.testing.assert_close(function(x), Shifts()(x))
    assert function(x).stride() == x.stride()
    torch.testing.assert_close(gradient(function, x, grad), gradient(Shifts(), x, grad))


def test_compile_with_dynamic_sizes(device):
    torch._dynamo.reset()
    function = torch.compile(Shifts(), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(2, 16, 5, 4), (3, 16, 7, 9), (4, 16, 6, 8)]:
        x = image(shape, device, torch.float32)
        torch.testing.assert_close(gradient(function, x, x), gradient(Shifts(), x, x))


def test_export(device):
    x = image((2, 16, 5, 4), device, torch.float32)
    sizes = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=2)}
    program = torch.export.export(Shifts(), (x,), dynamic_shapes=(sizes,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("alore_ext.axial_shift_pair.default") == targets.count("alore_ext.axial_shift.default") == 1
    larger = image((3, 16, 9, 4), device, torch.float32)
    torch.testing.assert_close(program.module()(larger), Shifts()(larger))


@pytest.mark.parametrize("op", ["axial_shift", "axial_shift_pair"])
def test_double_backward_raises(op, device):
    x = image((2, 16, 5, 4), device).requires_grad_()
    out = getattr(ops, op)(x, *((5, 2) if op == "axial_shift" else (5,)))
    total = sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))
    (first,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
        first.sum().backward()


@pytest.mark.parametrize("where", ["cpu", "meta", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(
    ("op", "arguments", "says"),
    [
        ("axial_shift", (torch.zeros(8, 4, 4), 5, 2), "x must be [batch, channels, height, width], got [8, 4, 4]"),
        ("axial_shift", (torch.zeros(1, 8, 4, 4), 0, 2), "shift_size must be at least 1, got 0"),
        ("axial_shift", (torch.zeros(1, 8, 4, 4), 5, 1), "dim must be 2 or -2 (height), or 3 or -1 (width), got 1"),
        ("axial_shift", (torch.zeros(1, 8, 4, 4), 5, -3), "got -3"),
        ("axial_shift", (torch.zeros(1, 8, 4, 4).int(), 5, 2), "x must be float64, float32, bfloat16 or float16"),
        ("axial_shift_backward", (torch.zeros(4, 4), 5, 2), "grad_out must be [batch, channels, height, width]"),
        ("axial_shift_backward", (torch.zeros(1, 8, 4, 4), 5, 4), "dim must be"),
        ("axial_shift_pair", (torch.zeros(8, 4, 4), 5), "x must be [batch, channels, height, width], got [8, 4, 4]"),
        ("axial_shift_pair", (torch.zeros(1, 8, 4, 4), -1), "shift_size must be at least 1, got -1"),
        (
            "axial_shift_pair_backward",
            (torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 5), 5),
            "grad_height must have grad_width's shape [1, 8, 4, 4], got [1, 8, 4, 5]",
        ),
        (
            "axial_shift_pair_backward",
            (torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4).half(), 5),
            "grad_height must have grad_width's dtype Float, got Half",
        ),
        ("axial_shift_pair_backward", (torch.zeros(8), torch.zeros(8), 5), "grad_width must be [batch, channels"),
    ],
)
def test_errors(op, arguments, says, where):
    arguments = [a.to(where) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError) as caught:
        getattr(namespace, op)(*arguments)
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"{op}: ") and says in message


@pytest.mark.parametrize("meta_first", [False, True])
def test_gradients_on_two_devices(meta_first, device):
    pair = [torch.zeros(1, 8, 4, 4, device=device), torch.zeros(1, 8, 4, 4, device="meta")]
    with pytest.raises(RuntimeError, match="grad_height must be on grad_width's device"):
        namespace.axial_shift_pair_backward(*(reversed(pair) if meta_first else pair), 5)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [pytest.param(f, marks=needs_cuda) for f in FORMATS], ids=str)
@pytest.mark.parametrize("shape", [(17, 32, 2048, 2048), (1, 40, 8192, 8192)], ids=str)
def test_more_elements_than_32_bits_count(shape, memory_format):
    """Images that are counted in 32 bits, and one that is not."""
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).normal_()
    for out, dim in zip(ops.axial_shift_pair(x, 5), (3, 2), strict=True):
        for c in (0, shape[1] // 2, shape[1] - 1):  # of the first, the middle and the last group
            group = c // -(-shape[1] // 5)
            expected = reference.axial_shift(x[-1:, c : c + 1].expand(1, 5, *shape[2:]), 5, dim)[:, group]
            assert torch.equal(out[-1:, c], expected), (dim, c)
