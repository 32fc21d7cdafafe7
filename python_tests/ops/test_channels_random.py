"""Dropout of alore_channels and layer_norm_alore_channels, and the mask of mlae_channels."""

import pytest
import torch
import torch.nn.functional as F
from channel_cases import DENSE, FACTORED, FORMATS, OPS, channel_args, small
from marks import needs_cuda
from op_cases import draw, leaves
from torch.utils.checkpoint import checkpoint

from alore_ext import ops, reference


class TestDropout:
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dims", [FACTORED[1], DENSE[0]], ids=["factored", "dense"])
    def test_drops_and_scales_elements_of_the_branch(self, dims, memory_format, device):
        args = channel_args("alore_channels", dims, size=(14, 14), memory_format=memory_format, device=device)
        branch = reference.alore_channels(*args.values()) - args["x"]
        dropped = ops.alore_channels(*args.values(), 0.25) - args["x"]
        kept = dropped.abs() > 1e-9
        torch.testing.assert_close(dropped[kept], branch[kept] / 0.75)
        deviation = (0.25 * 0.75) ** 0.5
        assert abs(kept.double().mean() - 0.75) < 5 * deviation / kept.numel() ** 0.5
        per_channel = kept.double().mean((0, 2, 3))
        assert (per_channel - 0.75).abs().max() < 5 * deviation / kept[:, 0].numel() ** 0.5

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("op", OPS)
    def test_nothing_is_drawn_where_nothing_is_dropped(self, op, memory_format, device):
        args = small(op, memory_format=memory_format, device=device)
        expected = getattr(ops, op)(*args.values())
        torch.manual_seed(1)
        first = torch.rand(4, device=device)
        torch.manual_seed(1)
        assert torch.equal(getattr(ops, op)(*args.values(), 0.5, False), expected)
        assert torch.equal(torch.rand(4, device=device), first)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("op", OPS)
    def test_checkpointing_sees_the_same_mask(self, op, memory_format, use_reentrant, device):
        args = small(op, memory_format=memory_format, device=device)

        def gradients(checkpointed):
            inputs = leaves(args)
            forward = lambda *tensors: getattr(ops, op)(*tensors, 0.5)  # noqa: E731
            torch.manual_seed(3)
            if checkpointed:
                y = checkpoint(forward, *inputs.values(), use_reentrant=use_reentrant)
            else:
                y = forward(*inputs.values())
            torch.manual_seed(99)  # what happens between forward and backward must not matter
            y.square().sum().backward()
            return [y.detach(), *(value.grad for value in inputs.values() if isinstance(value, torch.Tensor))]

        plain, again = gradients(False), gradients(True)
        for a, b in zip(plain, again, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(getattr(ops, op)(*args.values(), 0.5), plain[0])


class TestMask:
    ARGS = (12, 40, 5, 2)

    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_one_of_the_subsets_of_experts_for_the_whole_batch(self, memory_format, device):
        """And every gradient goes through that mask: zeros for masked experts, 1 / (1 - p) for the others."""
        args = channel_args("mlae_channels", self.ARGS, memory_format=memory_format, device=device)
        base = F.conv2d(args["x"], args["weight"], args["bias"])
        alone = [args | {"coeff": args["coeff"] * (torch.arange(5, device=device) == e)} for e in range(5)]
        parts = torch.stack([reference.mlae_channels(*one.values()) - base for one in alone])
        seen = set()
        for _ in range(24):
            inputs = leaves(args)
            y = ops.mlae_channels(*inputs.values(), 0.6)
            shares = torch.linalg.lstsq(parts.flatten(1).T.cpu(), (y - base).detach().reshape(-1, 1).cpu()).solution[
                :, 0
            ]
            mask = (shares > 1).to(device)
            seen.add(tuple(mask.tolist()))
            torch.testing.assert_close(shares, mask.cpu().double() / 0.4)
            grad_out = draw(*y.shape, device=device)
            grads = torch.autograd.grad(y, list(inputs.values()), grad_out)
            exact = leaves(args)
            known = exact | {"coeff": exact["coeff"] * mask / 0.4}
            expected = torch.autograd.grad(reference.mlae_channels(*known.values()), list(exact.values()), grad_out)
            torch.testing.assert_close(grads, expected)
            assert torch.equal(grads[5] == 0, ~mask)
        assert len(seen) > 6

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("mask_p", [0.1, 0.5, 0.8])
    def test_rate(self, mask_p, memory_format, device):
        args = channel_args("mlae_channels", (8, 4, 200, 1), batch=1, size=(2, 2), memory_format=memory_format)
        inputs = leaves({name: value.to(device) for name, value in args.items()})
        masked = [
            torch.autograd.grad(ops.mlae_channels(*inputs.values(), mask_p).sum(), inputs["coeff"])[0] == 0
            for _ in range(50)
        ]
        rate = torch.stack(masked).double().mean()
        assert abs(rate - mask_p) < 5 * (mask_p * (1 - mask_p) / 10000) ** 0.5

    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_follows_torchs_seed(self, memory_format, device):
        args = channel_args("mlae_channels", self.ARGS, memory_format=memory_format, device=device)
        torch.manual_seed(5)
        first = [ops.mlae_channels(*args.values(), 0.5) for _ in range(8)]
        torch.manual_seed(5)
        again = [ops.mlae_channels(*args.values(), 0.5) for _ in range(8)]
        assert all(map(torch.equal, first, again))
        assert any(not torch.equal(first[0], other) for other in first[1:])

    @pytest.mark.parametrize("op", [pytest.param(op, marks=needs_cuda) for op in OPS])
    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_cuda_graph_replays_draw_anew(self, memory_format, op):
        args = small(op, memory_format=memory_format, dtype=torch.float32, device="cuda")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                getattr(ops, op)(*args.values(), 0.5)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = getattr(ops, op)(*args.values(), 0.5)
        results = []
        for _ in range(12):
            graph.replay()
            results.append(y.clone())
        assert any(not torch.equal(results[0], other) for other in results[1:])
