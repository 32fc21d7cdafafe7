"""alore_channels, layer_norm_alore_channels and mlae_channels: the maps of the token operators along axis 1."""

import pytest
import torch
import torch.nn.functional as F
from channel_cases import (
    CHANNEL_EAGER,
    DENSE,
    DIMS,
    FACTORED,
    FORMATS,
    MLAE_DIMS,
    OPS,
    SIZES,
    assert_oracle,
    channel_args,
    small,
)
from op_cases import DTYPES, assert_within_budget, draw, leaves, output_like, run, to_double
from torch.utils._python_dispatch import TorchDispatchMode

from alore_ext import ops, reference
from alore_ext.ops.channels import _builds_dense


class Seen(TorchDispatchMode):
    """The aten and alore_ext calls of a region."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.name(), out))
        return out

    def copies(self, numel):
        """Names of the calls that copy a tensor of at least numel elements as it is."""
        copying = ("aten::clone", "aten::copy_", "aten::contiguous", "aten::_to_copy")
        return [
            name
            for name, out in self.calls
            if name.startswith(copying) and isinstance(out, torch.Tensor) and out.numel() >= numel
        ]


class TestValues:
    @pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dims", DIMS)
    def test_alore(self, dims, memory_format, dtype, factor_dtype, device):
        options = {"dtype": dtype, "factor_dtype": factor_dtype, "device": device}
        assert_oracle("alore_channels", channel_args("alore_channels", dims, memory_format=memory_format, **options))

    @pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dims", MLAE_DIMS)
    def test_mlae(self, dims, memory_format, dtype, factor_dtype, device):
        options = {"dtype": dtype, "factor_dtype": factor_dtype, "device": device}
        assert_oracle("mlae_channels", channel_args("mlae_channels", dims, memory_format=memory_format, **options))

    @pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_layer_norm(self, memory_format, dtype, factor_dtype, device):
        options = {"dtype": dtype, "factor_dtype": factor_dtype, "device": device, "memory_format": memory_format}
        for dims in (FACTORED[1], DENSE[1]):
            assert_oracle("layer_norm_alore_channels", channel_args("layer_norm_alore_channels", dims, **options))

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("op", OPS)
    def test_sizes(self, op, memory_format, size, device):
        for batch in (1, 3):
            options = {"dtype": torch.float32, "device": device, "memory_format": memory_format}
            assert_oracle(op, small(op, batch=batch, size=size, **options))

    @pytest.mark.parametrize("size", [(7, 5), (0, 5)], ids=str)
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dims", [FACTORED[2], DENSE[1]], ids=["factored", "dense"])
    def test_empty(self, dims, memory_format, size, device):
        batch = 2 if 0 in size else 0
        for op in OPS:
            op_dims = (12, 10, 4, 2) if op == "mlae_channels" else dims
            args = channel_args(op, op_dims, batch=batch, size=size, memory_format=memory_format, device=device)
            y, grads = run(ops, op, args, output_like(op, args))
            assert y.shape == (batch, op_dims[1] if op == "mlae_channels" else args["x"].shape[1], *size)
            assert all(grad.count_nonzero() == 0 for grad in grads.values())

    @pytest.mark.parametrize("dims", [FACTORED[2], DENSE[1]], ids=["factored", "dense"])
    @pytest.mark.parametrize("spatial", [(), (11,), (2, 3, 4)], ids=str)
    def test_other_numbers_of_spatial_axes(self, spatial, dims, device):
        args = channel_args("alore_channels", dims, device=device)
        channels = args["x"].shape[1]
        for x in (
            draw(3, channels, *spatial, device=device),
            draw(3, *spatial, channels, device=device).movedim(-1, 1),
            draw(channels, 3, *spatial, device=device).transpose(0, 1),
        ):
            assert_oracle("alore_channels", args | {"x": x})

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
            lambda x: torch.cat([x, x + 1], 3)[..., : x.shape[3]],
            lambda x: x[:1].expand_as(x),
            lambda x: x.mT.contiguous().mT,
        ],
        ids=["channels", "crop", "expanded", "transposed"],
    )
    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_strided_views(self, memory_format, view, op, device):
        args = small(op, memory_format=memory_format, device=device)
        x = view(args["x"])
        assert x.stride() != args["x"].stride()
        assert_oracle(op, args | {"x": x})

    def test_weight_may_be_that_of_a_linear(self, device):
        args = small("mlae_channels", device=device)
        flat = ops.mlae_channels(*(args | {"weight": args["weight"].flatten(1)}).values())
        assert torch.equal(flat, ops.mlae_channels(*args.values()))
        assert_oracle("mlae_channels", args | {"bias": None})

    @pytest.mark.parametrize("op", OPS)
    def test_gradcheck(self, op, device):
        args = small(op, batch=1, size=(2, 3), device=device)
        names = [name for name, value in args.items() if isinstance(value, torch.Tensor)]

        def function(*tensors):
            return getattr(ops, op)(*(args | dict(zip(names, tensors, strict=True))).values())

        assert torch.autograd.gradcheck(function, [leaves(args)[name] for name in names])


class TestMemory:
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dims", [FACTORED[1], DENSE[0]], ids=["factored", "dense"])
    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_alore_keeps_the_format_and_copies_nothing(self, p, dims, memory_format, device):
        args = channel_args("alore_channels", dims, size=(14, 14), memory_format=memory_format, device=device)
        self.assert_in_place(ops.alore_channels, args, memory_format, p)

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("p", [0.0, 0.5])
    def test_mlae_keeps_the_format_and_copies_nothing(self, p, memory_format, device):
        args = channel_args("mlae_channels", (64, 96, 4, 2), size=(14, 14), memory_format=memory_format, device=device)
        args["weight"] = args["weight"].contiguous(memory_format=memory_format)
        self.assert_in_place(ops.mlae_channels, args, memory_format, p)

    def assert_in_place(self, function, args, memory_format, p):
        inputs = leaves(args)
        with Seen() as seen:
            y = function(*inputs.values(), p)
            grad_out = torch.ones_like(y)
            grads = torch.autograd.grad(y, list(inputs.values()), grad_out)
        assert len(seen.calls) > 3
        assert not seen.copies(args["x"].numel())
        for tensor in (y, grads[0]):
            assert tensor.is_contiguous(memory_format=memory_format)

    def test_the_search_for_copies_finds_one(self):
        x = torch.randn(2, 3, 4, 5)
        with Seen() as seen:
            x.contiguous(memory_format=torch.channels_last)
            x.movedim(1, -1).reshape(-1, 3)
        assert len(seen.copies(x.numel())) == 2

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_a_channels_last_weight_does_not_change_the_format(self, weight_format, device):
        args = small("mlae_channels", device=device)
        args["weight"] = args["weight"].contiguous(memory_format=weight_format)
        assert ops.mlae_channels(*args.values()).is_contiguous()

    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_layer_norm_returns_the_format_of_layer_norm_2d(self, memory_format, device):
        args = small("layer_norm_alore_channels", memory_format=memory_format, device=device)
        plain = F.layer_norm(args["x"].movedim(1, -1), args["weight"].shape).movedim(-1, 1)
        assert ops.layer_norm_alore_channels(*args.values()).stride() == plain.stride()

    def test_rule_of_the_dense_map(self):
        """Backbones with 4 experts of rank 4 (64 codes): W' is built at 96 and 128 channels, not above."""
        assert [_builds_dense(channels, 64) for channels in (96, 128, 192, 1024)] == [True, True, False, False]
        for kind, expected in ((FACTORED, False), (DENSE, True)):
            assert all(_builds_dense(n * p, n * e * r) is expected for e, n, p, r in kind)


class TestZeroInit:
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dims", [FACTORED[1], DENSE[0]], ids=["factored", "dense"])
    def test_alore_is_the_identity(self, dims, dtype, memory_format, device):
        options = {"dtype": dtype, "factor_dtype": torch.float32 if dtype.itemsize == 2 else dtype, "device": device}
        args = channel_args("alore_channels", dims, memory_format=memory_format, **options)
        args["up"].zero_()
        for p in (0.0, 0.5):
            assert torch.equal(ops.alore_channels(*args.values(), p), args["x"])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_mlae_is_the_plain_convolution(self, dtype, device):
        args = small("mlae_channels", dtype=dtype, device=device)
        args["lora_b"].zero_()
        y = ops.mlae_channels(*args.values(), 0.5)
        assert torch.equal(y, F.conv2d(args["x"], args["weight"], args["bias"]))


class TestMixedPrecision:
    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("stored", ["float32", "low"])
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("op", OPS)
    def test_autocast(self, op, memory_format, stored, low, device):
        """Over float32 tensors, and over 16-bit activations with float32 factors."""
        dtype = torch.float32 if stored == "float32" else low
        options = {"memory_format": memory_format, "dtype": dtype, "factor_dtype": torch.float32, "device": device}
        every_dims = [MLAE_DIMS[2].values[0]] if op == "mlae_channels" else [FACTORED[1], DENSE[0]]
        for dims in every_dims:
            args = channel_args(op, dims, **options)
            grad_out = output_like(op, args).to(low)
            results = []
            for library in (ops, CHANNEL_EAGER):
                inputs = leaves(args)
                with torch.autocast(device.type, low):
                    y = getattr(library, op)(*inputs.values())
                wanted = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
                grads = torch.autograd.grad(y, list(wanted.values()), grad_out.to(y.dtype))
                results.append((y.detach(), dict(zip(wanted, grads, strict=True))))
            (got, got_grads), (eager, eager_grads) = results
            oracle, oracle_grads = run(reference, op, to_double(args), grad_out.double())
            assert got.dtype == low
            assert_within_budget(got, oracle, eager, op)
            for name, grad in got_grads.items():
                assert grad.dtype == args[name].dtype
                assert_within_budget(grad.to(low), oracle_grads[name], eager_grads[name], f"{op} gradient of {name}")

    @pytest.mark.parametrize("op", OPS)
    def test_float64_is_left_alone_by_autocast(self, op, device):
        args = small(op, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            y = getattr(ops, op)(*args.values())
        torch.testing.assert_close(y, getattr(reference, op)(*args.values()))

    @pytest.mark.parametrize("dims", [FACTORED[1], DENSE[0]], ids=["factored", "dense"])
    def test_autocast_casts_x_and_no_factor_before_its_products(self, dims, device):
        args = channel_args("alore_channels", dims, dtype=torch.float32, device=device)
        expected = ops.alore_channels(*(args | {"x": args["x"].bfloat16()}).values())
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(ops.alore_channels(*args.values()), expected)

    @pytest.mark.parametrize("p", [64, 16], ids=["factored", "dense"])
    def test_small_updates_are_not_swallowed(self, p, device):
        """W' has 0.001 on its diagonal. In bfloat16 I + W' would have 1 there; here the sum is the product's own.

        Beside the diagonal, W' adds every channel to the next: alone, 1.001 x would round to x in any formulation.
        """
        x = draw(8, p, 14, 14, dtype=torch.bfloat16, device=device)
        down, eye = torch.eye(p, 16, device=device), torch.eye(16, p, device=device)
        up = eye.roll(1, 0) + 0.001 * eye
        y = ops.alore_channels(x, torch.ones(1, 1, 1, device=device), down[None], up[None])[:, :16].double()
        x = x[:, :16].double()
        diagonal = y - x - torch.einsum("bchw,cd->bdhw", x, eye.roll(1, 0)[:, :16].double())
        assert ((diagonal * x).sum() / x.square().sum()).item() == pytest.approx(0.001, rel=0.5)
