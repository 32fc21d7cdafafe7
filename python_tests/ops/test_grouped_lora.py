"""masked_lora_linear_grouped where CUDA fuses it: 16-bit activations, features in multiples of 8, R <= 64.

On the CPU the same calls run on the CPU's own path."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from marks import needs_cuda
from op_cases import draw, lora_args
from test_grouped import LORA, assert_matches

from alore_ext import ops

HALF = [torch.bfloat16, torch.float16]
# in_features, out_features: whole chunks of 32 and not; fewer chunks than a block has warps, and several rounds.
FEATURES = [(8, 8), (40, 264), (96, 40), (200, 72), (768, 2304), (1032, 96)]
# R by adapter: one, two, four and eight tiles of 8 rank rows at most, alone and beside smaller ones.
RANKS = [[1], [8, 3, 8], [9], [16, 1, 8, 11], [17, 32, 2], [64], [5, 64, 33, 8]]


def batch(features, ranks, index, lead=(19,), dtype=torch.bfloat16, factor_dtype=torch.float32, device="cpu"):
    """Arguments of the op by name."""
    options = {"dtype": dtype, "factor_dtype": factor_dtype, "device": device}
    entries = [lora_args((*features, rank), (), **options) for rank in ranks]
    x = draw(len(index), *lead, features[0], dtype=dtype, device=device)
    args = {"x": x, "weight": entries[0]["weight"], "bias": entries[0]["bias"]}
    args |= {name: [entry[name] for entry in entries] for name in ("lora_a", "lora_b", "coeff")}
    return args | {"index": torch.tensor(index, dtype=torch.int64, device=device)}


def some_index(ranks):
    """Every adapter, one of them twice, and a sample without."""
    return [len(ranks) - 1, -1, *range(len(ranks))]


@pytest.mark.parametrize("factors", ["same", "float32"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_against_the_oracle(ranks, features, dtype, factors, device):
    factor_dtype = dtype if factors == "same" else torch.float32
    args = batch(features, ranks, some_index(ranks), dtype=dtype, factor_dtype=factor_dtype, device=device)
    assert ops.plan_lora_grouped(args["x"], args["weight"], args["lora_a"]).fused
    assert_matches(ops, LORA, args)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16, 17, 197])
@pytest.mark.parametrize("bias", [True, False])
def test_around_the_size_of_a_tile(tokens, bias, device):
    """No sample's tokens reach into the next one's tile."""
    for ranks in ([8], [3, 20]):
        args = batch((72, 104), ranks, some_index(ranks), (tokens,), device=device)
        assert_matches(ops, LORA, args | ({} if bias else {"bias": None}))


def test_more_adapters_than_are_packed_at_once(device):
    ranks = [1 + i % 17 for i in range(200)]
    assert_matches(ops, LORA, batch((64, 40), ranks, [199, 95, 96, -1, 97, 0, 191, 192, 95], device=device))


def test_without_an_adapter_it_is_the_linear(device):
    args = batch((96, 136), [8], [-1, -1], (33,), device=device)
    got = getattr(ops, LORA)(*args.values())
    # To a rounding: on CUDA another product may add the bias.
    torch.testing.assert_close(got, F.linear(args["x"], args["weight"], args["bias"]), rtol=2**-7, atol=2**-7)


def test_coefficients_of_zero_add_nothing(device):
    """Not even where the rows they belong to are not finite."""
    args = batch((64, 48), [8, 12], [0, 1, -1], device=device)
    for i in range(2):
        args["coeff"][i][::2] = 0
    expected = getattr(ops, LORA)(*args.values())
    for i in range(2):
        args["lora_a"][i][::2] = torch.nan
        args["lora_b"][i][:, ::2] = torch.inf
    assert torch.equal(getattr(ops, LORA)(*args.values()), expected) and expected.isfinite().all()


def test_bits_do_not_depend_on_company(device):
    """A sample's result is the same alone and beside adapters of more rank rows."""
    args = batch((64, 48), [3, 50], [0, 1, 0], device=device)
    together = getattr(ops, LORA)(*args.values())
    few = args | {name: args[name][:1] for name in ("lora_a", "lora_b", "coeff")}
    few["index"] = torch.tensor([0, -1, 0], device=device)
    alone = getattr(ops, LORA)(*few.values())
    assert torch.equal(alone[[0, 2]], together[[0, 2]])


def test_factors_and_bias_of_other_layouts(device):
    args = batch((64, 48), [8, 5], [1, 0, -1], device=device)
    expected = getattr(ops, LORA)(*args.values())
    strided = {name: [t.mT.contiguous().mT if t.dim() > 1 else t for t in args[name]] for name in ("lora_a", "lora_b")}
    shifted = torch.cat([args["bias"][:1], args["bias"]])[1:]  # not at a multiple of 16 bytes
    assert torch.equal(getattr(ops, LORA)(*(args | strided | {"bias": shifted}).values()), expected)


# ---- The plan ----------------------------------------------------------------------------------------------


def plan(features=(768, 2304), ranks=(8,), lead=(256, 197), dtype=torch.bfloat16):
    x, weight = torch.empty(*lead, features[0], dtype=dtype, device="meta"), torch.empty(*features[::-1], device="meta")
    return ops.plan_lora_grouped(x, weight, [torch.empty(rank, features[0], device="meta") for rank in ranks])


@pytest.mark.parametrize(("most", "tiles"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (63, 8), (64, 8)])
def test_the_plan_of_what_is_fused(most, tiles):
    got = plan(ranks=[1, most])
    assert got.fused and got.rank_tiles == tiles
    # A directory of 8 bytes an adapter, then 16-bit factors, features and rank rows padded to 32 and to 8.
    assert got.workspace_bytes == 16 + (768 + 2304) * 2 * 8 * (1 + tiles)
    assert repr(got) == f"LoraGroupedPlan(path=fused, rank_tiles={tiles}, workspace_bytes={got.workspace_bytes})"


@pytest.mark.parametrize(
    ("change", "adapter", "reason"),
    [
        ({"dtype": torch.float32}, 0, "activations that are not 16-bit"),
        ({"dtype": torch.float64}, 0, "activations that are not 16-bit"),
        ({"features": (60, 40)}, 0, "features that are no multiple of 8"),
        ({"features": (64, 41)}, 0, "features that are no multiple of 8"),
        ({"ranks": (8, 64, 65)}, 2, "more than 64 rank rows"),
        ({"ranks": (100,) * 3}, 0, "more than 64 rank rows"),
        ({"lead": (2**31, 1)}, 0, "sizes beyond 32 bits"),
        ({"features": (2**30, 8)}, 0, "sizes beyond 32 bits"),
    ],
)
def test_the_plan_of_what_is_not(change, adapter, reason):
    got = plan(**change)
    assert (got.fused, got.refused, got.reason) == (False, adapter, reason)
    assert repr(got) == f'LoraGroupedPlan(path=composed, adapter={adapter}, reason="{reason}")'


def test_the_plan_of_nothing():
    assert plan(lead=(0, 5)).fused and plan(lead=(5, 0)).fused
    assert plan(lead=(7,)).rank_tiles == 1


# ---- CUDA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=needs_cuda)])
@pytest.mark.parametrize("ranks", [[8, 4], [64]])
def test_what_is_launched(ranks, device):
    """Factors packed, y0 written, the base product: nothing else, and nothing said."""
    args = batch((768, 2304), ranks, some_index(ranks), (197,), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(ops, LORA)(*args.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        getattr(ops, LORA)(*args.values())
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("lora_grouped_pack_kernel" in name for name in kernels) == 1, kernels
    assert sum("lora_grouped_kernel" in name for name in kernels) == 1, kernels
    assert not any("copy" in name.lower() or "elementwise" in name.lower() for name in kernels), kernels
