"""What the tests of the channel-axis operators share: arguments with x as an image, and eager's way of writing them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from op_cases import EAGER, assert_matches_oracle, draw, kron_args, layer_norm_args, lora_args

OPS = ("alore_channels", "layer_norm_alore_channels", "mlae_channels")
FORMATS = [
    pytest.param(torch.contiguous_format, id="nchw"),
    pytest.param(torch.channels_last, id="nhwc"),
]

# num_experts, num_blocks, p, rank. In NCHW memory the first four are factored, the others build W'.
FACTORED = [(1, 1, 13, 1), (4, 4, 40, 4), (2, 3, 29, 2), (8, 2, 70, 2)]
DENSE = [(4, 4, 24, 4), (3, 3, 7, 5), (8, 8, 3, 16), (1, 1, 6, 16)]
DIMS = [pytest.param(dims, id="E{}-n{}-p{}-r{}".format(*dims)) for dims in FACTORED + DENSE]
SIZES = [(1, 1), (7, 5), (14, 14)]

# in_channels, out_channels, num_experts, expert_rank.
MLAE_DIMS = [
    pytest.param(dims, id="in{}-out{}-E{}-r{}".format(*dims))
    for dims in [(12, 9, 1, 1), (17, 23, 5, 1), (64, 96, 8, 1), (40, 72, 3, 2), (24, 8, 1, 16)]
]


def to_channels(x, batch, size, memory_format):
    """Tokens [batch * h * w, channels] as [batch, channels, h, w]."""
    return x.view(batch, *size, x.shape[-1]).movedim(-1, 1).contiguous(memory_format=memory_format)


def channel_args(op, dims=(2, 2, 6, 2), batch=2, size=(7, 5), memory_format=torch.contiguous_format, **options):
    """Arguments of one of OPS. Every case of kron_args, with x as an image; dims as in DIMS or MLAE_DIMS."""
    lead = (batch * size[0] * size[1],)
    if op == "mlae_channels":
        *features, num_experts, expert_rank = dims
        args = lora_args((*features, num_experts * expert_rank), lead=lead, **options)
        args["coeff"] = draw(num_experts).to(args["coeff"])
        args["weight"] = args["weight"][:, :, None, None]
    else:
        num_experts, num_blocks, p, rank = dims
        make = kron_args if op == "alore_channels" else layer_norm_args
        args = make((num_experts, num_blocks, num_blocks, p, p, rank), lead=lead, **options)
    return args | {"x": to_channels(args["x"], batch, size, memory_format)}


def small(op, **options):
    return channel_args(op, (12, 10, 4, 2) if op == "mlae_channels" else (4, 4, 6, 2), **options)


def _eager(name):
    """What a user would write: eager's token map behind a permutation."""
    tokens = getattr(EAGER, name.removesuffix("_channels"), None)

    def call(x, *rest):
        if name == "mlae_channels":
            weight, bias, lora_a, lora_b, coeff = rest
            factors = [t.to(x.dtype) for t in (lora_a, lora_b, coeff.repeat_interleave(lora_a.shape[0] // len(coeff)))]
            branch = F.linear(F.linear(x.movedim(1, -1), factors[0]) * factors[2], factors[1])
            return F.conv2d(x, weight, bias) + branch.movedim(-1, 1)
        return tokens(x.movedim(1, -1), *rest).movedim(-1, 1)

    return call


CHANNEL_EAGER = SimpleNamespace(**{name: _eager(name) for name in OPS})


def assert_oracle(op, args):
    """MLAE's gradients have a few elements each, so how two errors in one of them compare is partly chance."""
    assert_matches_oracle(op, args, eager=CHANNEL_EAGER, draws=8 if op == "mlae_channels" else 1)
