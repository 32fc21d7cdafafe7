"""plan_merge: which merges the grouped CUDA kernel takes, and in what tiles. A pure function, asked without a GPU."""

import pytest
import torch

from alore_ext import _C, ops

LEAST = _C.LEAST_SHARED_LIMIT
HOPPER = 227 * 1024
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def plan(weight, n, rank, side="before", factor_dtype=torch.float32, shared_limit=LEAST):
    p = weight.shape[1 if side == "before" else 0] // n
    factors = meta(n, n, n, dtype=factor_dtype), meta(n, p, rank), meta(n, rank, p)
    return ops.plan_merge_kron(weight, *factors, side, shared_limit=shared_limit)


def test_vit_base_fills_a_gpu():
    """qkv [2304, 768], n=4 r=4: tiles of 64 rows, and several of a tile's shared memory fit on a processor."""
    p = plan(meta(2304, 768, dtype=torch.bfloat16), 4, 4)
    assert (p.taken, p.rows, p.tokens_per_tile, p.num_tiles, p.splits) == (True, True, 64, 36, 1)
    assert 4 * p.shared_bytes <= HOPPER
    assert "path=grouped" in repr(p) and "num_tiles=36" in repr(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("others", [1, 7, 64, 65, 1000])
def test_tiles_cover_the_tokens(dtype, side, others):
    for n, rank in ((1, 4), (4, 4), (3, 5), (16, 8), (32, 1)):
        shape = (others, n * 6) if side == "before" else (n * 6, others)
        p = plan(meta(*shape, dtype=dtype), n, rank, side)
        assert p.taken
        assert (p.num_tiles - 1) * p.tokens_per_tile < others <= p.num_tiles * p.tokens_per_tile
        assert p.tokens_per_tile * n <= (64 if dtype == torch.float64 else 256)
        assert p.tokens_per_tile <= 8 or p.tokens_per_tile % 8 == 0
        assert p.shared_bytes <= LEAST and p.shared_bytes % 16 == 0


def test_neighbouring_threads_read_neighbouring_elements():
    assert plan(meta(40, 96), 4, 2).rows
    assert not plan(meta(96, 40), 4, 2, "after").rows
    assert not plan(meta(96, 40).t(), 4, 2).rows
    assert plan(meta(40, 96).t(), 4, 2, "after").rows


def test_wide_codes_make_small_tiles_until_none_fits():
    """Mixed codes are kept in shared memory: 16 experts of rank r are 16 r columns for each of a tile's rows."""
    weight, tokens = meta(500, 768, dtype=torch.bfloat16), []
    for rank in range(1, 65):
        p = plan(weight, 16, rank, shared_limit=LEAST)
        if not p.taken:
            break
        assert p.shared_bytes <= LEAST
        tokens.append(p.tokens_per_tile)
    assert tokens[0] == 16 and tokens == sorted(tokens, reverse=True) and tokens[-1] < 8 and not p.taken
    assert "shared memory" in p.reason and "path=composed" in repr(p) and p.reason in repr(p)
    assert plan(weight, 16, rank, shared_limit=HOPPER).taken


def test_the_limit_is_kept_to_the_byte():
    weight = meta(500, 768, dtype=torch.bfloat16)
    needed = plan(weight, 8, 8).shared_bytes
    assert plan(weight, 8, 8, shared_limit=needed).tokens_per_tile == plan(weight, 8, 8).tokens_per_tile
    assert plan(weight, 8, 8, shared_limit=needed - 1).tokens_per_tile < plan(weight, 8, 8).tokens_per_tile


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_factors_need_a_float64_weight(dtype):
    weight = meta(40, 96, dtype=dtype)
    factors = [f.double() for f in (meta(4, 4, 4), meta(4, 24, 2), meta(4, 2, 24))]
    p = ops.plan_merge_kron(weight, *factors, "before")
    assert p.taken == (dtype == torch.float64)
    assert ops.plan_merge_lora(weight, meta(3, 96).double()).taken == p.taken
    assert p.taken or "float64 factors" in p.reason


def test_more_blocks_than_rows():
    n = 257
    p = ops.plan_merge_kron(meta(8, n), meta(1, n, n), meta(1, 1, 1), meta(1, 1, 1), "before")
    assert not p.taken and "blocks" in p.reason
    n = 256
    p = ops.plan_merge_kron(meta(8, n), meta(1, n, n), meta(1, 1, 1), meta(1, 1, 1), "before")
    assert p.taken and p.tokens_per_tile == 1


@pytest.mark.parametrize(
    ("shape", "strides", "taken"),
    [
        ((40, 96), (96, 1), True),
        ((40, 96), (200, 2), True),
        ((40, 96), (1, 40), True),
        ((40, 96), (3, 120), True),
        ((40, 96), (95, 1), False),
        ((40, 96), (1, 39), False),
        ((40, 96), (0, 1), False),
        ((1, 96), (0, 1), True),
        ((40, 96), (97, 97), False),
    ],
)
def test_strides_that_may_overlap(shape, strides, taken):
    weight = torch.empty_strided(shape, strides, device="meta")
    p = plan(weight, 4, 2)
    assert p.taken == taken
    assert taken or "overlap" in p.reason


def test_no_tokens_are_no_tiles():
    p = plan(meta(0, 96), 4, 2)
    assert p.taken and p.num_tiles == 0


def test_sizes_beyond_32_bits():
    assert not plan(meta(2**31, 4), 2, 1).taken
    assert not plan(meta(2**16, 2**16), 4, 2, "after").taken
    assert plan(meta(2**16, 2**14), 4, 2, "after").taken


def test_low_rank_tiles_are_split_along_the_rows():
    p = ops.plan_merge_lora(meta(2304, 768, dtype=torch.bfloat16), meta(8, 768))
    assert (p.taken, p.tokens_per_tile, p.splits, p.num_tiles) == (True, 256, 3, 27)
    assert ops.plan_merge_lora(meta(5, 257), meta(8, 257)).splits == 2
    assert not ops.plan_merge_lora(meta(64, 64), meta(4096, 64)).taken
