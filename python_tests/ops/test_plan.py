"""Plans are plain values: chunk counts and workspace at their boundaries, and the chunked path against the oracle."""

import itertools

import pytest
import torch
from marks import needs_cuda
from op_cases import assert_matches_oracle, kron_args

from alore_ext import _C, ops

SHAPES = [  # num_experts, s_in, s_out, p_in, p_out, rank
    (4, 4, 4, 192, 192, 4),
    (1, 1, 1, 768, 768, 64),
    (2, 3, 5, 7, 4, 3),
    (32, 32, 32, 24, 24, 64),
]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]
CASES = [
    pytest.param(dims, *dtypes, backward, id=f"{dims}-{str(dtypes[0])[6:]}-{'backward' if backward else 'forward'}")
    for dims, dtypes, backward in itertools.product(SHAPES, DTYPES, [False, True])
]
HUGE = 50_000_000


def plan(dims, num_tokens, dtype, factor_dtype, backward):
    num_experts, s_in, s_out, p_in, p_out, rank = dims
    options = {"dtype": factor_dtype, "device": "meta"}
    return ops.plan_kron(
        torch.empty(num_tokens, s_in * p_in, dtype=dtype, device="meta"),
        torch.empty(num_experts, s_in, s_out, **options),
        torch.empty(num_experts, p_in, rank, **options),
        torch.empty(num_experts, rank, p_out, **options),
        backward=backward,
    )


def factor_bytes(dims, dtype, backward):
    """Packed factors, and in backward their gradients, all in the accumulate type; 256 bytes of padding each."""
    num_experts, s_in, s_out, p_in, p_out, rank = dims
    elements = num_experts * (s_in * s_out + (p_in + p_out) * rank)
    size = 8 if dtype == torch.float64 else 4
    return (2 if backward else 1) * (elements * size + 3 * 256)


@pytest.mark.parametrize(("dims", "dtype", "factor_dtype", "backward"), CASES)
class TestPlan:
    def test_no_tokens(self, dims, dtype, factor_dtype, backward):
        assert plan(dims, 0, dtype, factor_dtype, backward).num_chunks == 0

    def test_chunks_cover_the_tokens(self, dims, dtype, factor_dtype, backward):
        for num_tokens in (1, 19, 197, 50432, HUGE):
            p = plan(dims, num_tokens, dtype, factor_dtype, backward)
            assert 1 <= p.chunk_tokens <= num_tokens
            assert (p.num_chunks - 1) * p.chunk_tokens < num_tokens <= p.num_chunks * p.chunk_tokens

    def test_boundary_between_one_chunk_and_two(self, dims, dtype, factor_dtype, backward):
        largest = plan(dims, HUGE, dtype, factor_dtype, backward)
        assert largest.num_chunks >= 2
        fits = plan(dims, largest.chunk_tokens, dtype, factor_dtype, backward)
        assert (fits.num_chunks, fits.chunk_tokens) == (1, largest.chunk_tokens)
        over = plan(dims, largest.chunk_tokens + 1, dtype, factor_dtype, backward)
        assert (over.num_chunks, over.chunk_tokens) == (2, largest.chunk_tokens)
        assert fits.workspace_bytes == over.workspace_bytes == largest.workspace_bytes

    def test_workspace_is_bounded(self, dims, dtype, factor_dtype, backward):
        for num_tokens in (0, 1, 197, 50432, HUGE):
            p = plan(dims, num_tokens, dtype, factor_dtype, backward)
            allowed = _C.MAX_WORKSPACE_BYTES + factor_bytes(dims, dtype, backward)
            assert p.workspace_bytes <= allowed, p
            assert p.workspace_bytes % 256 == 0

    def test_workspace_is_used_well(self, dims, dtype, factor_dtype, backward):
        """Chunks are not needlessly small: a huge input takes most of what it may."""
        p = plan(dims, HUGE, dtype, factor_dtype, backward)
        assert p.workspace_bytes > 0.8 * _C.MAX_WORKSPACE_BYTES

    def test_workspace_holds_the_low_rank_codes(self, dims, dtype, factor_dtype, backward):
        """Z in the accumulate type and H in the activations' at least; in backward dZ and dH too."""
        num_experts, s_in, s_out, _, _, rank = dims
        p = plan(dims, 197, dtype, factor_dtype, backward)
        element, acc = dtype.itemsize, max(dtype.itemsize, 4)
        token = num_experts * rank * (s_in * acc + s_out * element)
        token += num_experts * rank * (s_in * element + s_out * acc) if backward else 0
        assert p.workspace_bytes >= min(197, p.chunk_tokens) * token

    def test_partial_sums_of_the_scale_gradient(self, dims, dtype, factor_dtype, backward):
        counts = [plan(dims, n, dtype, factor_dtype, backward).scale_grad_blocks for n in (1, 197, 50432, HUGE)]
        if backward:
            assert counts[0] == 1 and counts == sorted(counts) and counts[-1] <= 512
        else:
            assert counts == [0, 0, 0, 0]

    def test_prints_what_it_holds(self, dims, dtype, factor_dtype, backward):
        p = plan(dims, 50432, dtype, factor_dtype, backward)
        for name in ("num_chunks", "chunk_tokens", "workspace_bytes"):
            assert f"{name}={getattr(p, name)}" in repr(p)


def test_vit_base_at_batch_256_is_one_chunk():
    """The shape that DESIGN section 6 measures: no reason to launch twice."""
    for backward in (False, True):
        p = plan((4, 4, 4, 192, 192, 4), 50432, torch.bfloat16, torch.float32, backward)
        assert p.num_chunks == 1


# 2,048 code columns on 32 blocks make 0.5 MiB a token, so that a few hundred tokens of width 64 need several chunks.
CHUNKED = (32, 32, 32, 2, 2, 64)


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("op", [pytest.param(op, marks=needs_cuda) for op in ("kron_linear", "alore")])
def test_chunked_path_against_the_oracle(op, dtype, factor_dtype):
    """Only CUDA runs in chunks. The last chunk is a partial one, and factor gradients add up over all of them."""
    num_tokens = 1501
    for backward in (False, True):
        p = plan(CHUNKED, num_tokens, dtype, factor_dtype, backward)
        assert p.num_chunks >= 3 and num_tokens % p.chunk_tokens
    assert_matches_oracle(op, kron_args(CHUNKED, (num_tokens,), dtype, factor_dtype, "cuda"))
