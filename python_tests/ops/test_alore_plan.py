"""plan_alore at the boundaries of the fused kernels' domain, for devices that are not there, and over many shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alore_ext import ops

H200 = {"capability": 90, "num_sms": 132, "shared_per_block": 232448}
A100 = {"capability": 80, "num_sms": 108, "shared_per_block": 166912}
RTX = {"capability": 86, "num_sms": 84, "shared_per_block": 101376}
T4 = {"capability": 75, "num_sms": 40, "shared_per_block": 65536}
DEVICES = {"h200": H200, "a100": A100, "rtx": RTX}


def tensors(num_experts=4, embed_dim=768, rank=4, tokens=50432, dtype=torch.bfloat16, blocks=None):
    """x, scale, down and up of these shapes, without memory."""
    blocks = num_experts if blocks is None else blocks
    block_dim = embed_dim // blocks
    factor = {"dtype": torch.float32, "device": "meta"}
    return (
        torch.empty(tokens, embed_dim, dtype=dtype, device="meta"),
        torch.empty(num_experts, blocks, blocks, **factor),
        torch.empty(num_experts, block_dim, rank, **factor),
        torch.empty(num_experts, rank, block_dim, **factor),
    )


def plan(
    limits=H200, backward=False, norm=True, residual=True, out_dtype=None, dropout_p=0.0, returns_sum=False, **shape
):
    options = {"norm": norm, "residual": residual, "out_dtype": out_dtype, "backward": backward}
    options |= {"dropout_p": dropout_p, "returns_sum": returns_sum}
    return ops.plan_alore(*tensors(**shape), **options, **limits)


@pytest.mark.parametrize("backward", [False, True])
class TestDomain:
    """Pairs of neighbours, one inside and one outside, and what is said of the one outside."""

    @pytest.mark.parametrize(
        ("inside", "outside", "reason"),
        [
            ({}, {"limits": T4}, "compute capability 8.0"),
            ({"dtype": torch.float16}, {"dtype": torch.float32}, "activations are not 16-bit"),
            ({}, {"dtype": torch.float64}, "activations are not 16-bit"),
            (
                {"dtype": torch.float32, "out_dtype": torch.bfloat16},
                {"dtype": torch.float32, "out_dtype": torch.bfloat16, "norm": False},
                "mixed activation types without a norm",
            ),
            (
                {"dtype": torch.float32, "out_dtype": torch.float16},
                {"dtype": torch.bfloat16, "out_dtype": torch.float16},
                "mixed activation types",
            ),
            ({"embed_dim": 4 * 24}, {"embed_dim": 4 * 20}, "not a multiple of 8"),
            ({"embed_dim": 4 * 8}, {"embed_dim": 4 * 9}, "not a multiple of 8"),
            ({"num_experts": 8, "embed_dim": 256}, {"num_experts": 9, "embed_dim": 9 * 32}, "more than 8 blocks"),
            ({"rank": 16, "embed_dim": 96}, {"rank": 17, "embed_dim": 96}, "num_experts * rank above 64"),
            ({"num_experts": 1, "rank": 64, "embed_dim": 64}, {"num_experts": 1, "rank": 65}, "above 64"),
            (
                {"num_experts": 64, "blocks": 4, "rank": 1, "embed_dim": 96},
                {"num_experts": 65, "blocks": 4, "rank": 1, "embed_dim": 96},
                "num_experts * rank above 64",
            ),
            ({"embed_dim": 1536}, {"embed_dim": 2080}, "embed_dim above 2048"),
        ],
    )
    def test_boundary(self, inside, outside, reason, backward):
        limits = outside.get("limits", H200)
        fits = plan(backward=backward, **inside)
        assert fits.fused and fits.reason == "" and "path=fused" in repr(fits)
        refused = plan(limits, backward, **{n: v for n, v in outside.items() if n != "limits"})
        assert not refused.fused and reason in refused.reason
        assert "path=general" in repr(refused) and refused.reason in repr(refused)

    def test_kron_linear_and_alore_have_the_same_domain(self, backward):
        for residual in (True, False):
            assert plan(backward=backward, norm=False, residual=residual).fused

    @pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
    def test_what_the_documentation_promises(self, limits, backward):
        """embed_dim up to 1536 at 227 KiB, 1408 at 163 KiB and 768 at 99 KiB, with 4 experts of rank 4."""
        largest = {90: 1536, 80: 1408, 86: 768}[limits["capability"]]
        for embed_dim in range(32, largest + 1, 32):
            p = plan(limits, backward, embed_dim=embed_dim)
            assert p.fused and p.shared_bytes <= limits["shared_per_block"], p
        # What comes behind is not fused in one of the passes at least.
        passes = [plan(limits, back, embed_dim=largest + 32) for back in (False, True)]
        assert not all(p.fused for p in passes)

    def test_shared_memory_decides(self, backward):
        """The least that a plan can do with is enough for it, and a byte less is not."""
        refused = plan(H200 | {"shared_per_block": 4096}, backward)
        assert not refused.fused and "shared memory" in refused.reason
        low, high = 4096, 232448
        while high - low > 1:
            middle = (low + high) // 2
            fused = plan(H200 | {"shared_per_block": middle}, backward).fused
            low, high = (low, middle) if fused else (middle, high)
        assert plan(H200 | {"shared_per_block": high}, backward).shared_bytes == high

    def test_one_token_is_one_block(self, backward):
        for shape in ({}, {"embed_dim": 96}, {"num_experts": 8, "embed_dim": 256}, {"embed_dim": 1536}):
            assert plan(backward=backward, tokens=1, **shape).blocks == 1
            assert plan(backward=backward, tokens=16, **shape).blocks == 1
            assert plan(backward=backward, tokens=17 * 8 * 16, **shape).blocks > 1

    def test_rectangular_maps_are_refused(self, backward):
        x, scale, down, up = tensors()
        for wrong in ((x, scale[:, :, :2], down, up), (x, scale, down, up[:, :, :96])):
            with pytest.raises(ValueError, match="plan_alore: the map must be square block by block; got scale"):
                ops.plan_alore(*wrong, backward=backward, **H200)

    def test_a_device_without_limits_is_refused(self, backward):
        with pytest.raises(ValueError, match="plan_alore: give a CUDA device, or capability, .*; got device cpu"):
            ops.plan_alore(*tensors(), backward=backward, device="cpu")
        with pytest.raises(ValueError, match=r"got device meta and \(90, 132, None\)"):
            ops.plan_alore(*tensors(), backward=backward, capability=90, num_sms=132)


class TestBackwardOnly:
    @pytest.mark.parametrize(("rank", "fused"), [(8, True), (9, False), (12, False), (13, True), (16, True)])
    def test_widths_of_three_code_tiles(self, rank, fused):
        p = plan(backward=True, embed_dim=96, rank=rank)
        assert p.fused == fused
        assert fused or "num_experts * rank between 33 and 48" in p.reason
        assert plan(embed_dim=96, rank=rank).fused  # the forward takes them all

    def test_registers(self):
        """Factor gradients are summed in registers: at most two pieces a warp, one with more than 4 blocks."""
        for p in (plan(backward=True, num_experts=1, rank=64), plan(backward=True, num_experts=8, embed_dim=2048)):
            assert p.fused or "factor gradients do not fit the registers" in p.reason
        refused = plan(backward=True, num_experts=1, rank=64, embed_dim=2048)
        assert not refused.fused and "factor gradients do not fit the registers" in refused.reason


@pytest.mark.parametrize("backward", [False, True])
class TestPipelined:
    """The kernels of the common shapes: what is inside, and each way out of it."""

    @pytest.mark.parametrize("embed_dim", [128, 256, 384, 512, 768, 1024])
    @pytest.mark.parametrize("norm", [True, False])
    def test_widths(self, embed_dim, norm, backward):
        for rank in (1, 4):
            p = plan(backward=backward, embed_dim=embed_dim, norm=norm, rank=rank)
            assert p.fused and p.pipelined == (embed_dim < 1024 or not backward), p
            assert f"pipelined={str(p.pipelined).lower()}" in repr(p)
            if not p.pipelined:
                continue
            if backward:
                assert p.warps * p.items_per_warp == p.row_tiles * embed_dim // 32 and p.stages == 3
                assert p.key_splits * p.items_per_warp == embed_dim // 128
            else:
                assert p.warps_per_tile * p.groups_per_warp % (embed_dim // 32) == 0
                assert 32 * p.warps_per_tile * p.tiles_per_block in (512, 768)

    @pytest.mark.parametrize(
        "other",
        [
            {"embed_dim": 640},
            {"num_experts": 2},
            {"rank": 5},
            {"dtype": torch.float32, "out_dtype": torch.bfloat16},
            {"dropout_p": 0.1},
            {"returns_sum": True},
            {"limits": RTX},
        ],
        ids=str,
    )
    def test_what_is_outside(self, other, backward):
        options = {name: value for name, value in other.items() if name != "limits"}
        p = plan(other.get("limits", H200), backward, **options)
        assert p.fused and not p.pipelined and "pipelined=false" in repr(p), p

    def test_float16(self, backward):
        """Behind a norm the gradient's code times rstd is rounded, which needs bfloat16's range."""
        assert plan(backward=backward, norm=False, dtype=torch.float16).pipelined
        assert plan(backward=backward, dtype=torch.float16).pipelined == (not backward)

    def test_shared_memory(self, backward):
        least = plan(backward=backward).shared_bytes
        assert plan(H200 | {"shared_per_block": least}, backward).pipelined
        assert not plan(H200 | {"shared_per_block": least - 1}, backward).pipelined

    def test_a_block_has_a_full_tile_before_there_is_another(self, backward):
        for embed_dim in (128, 256, 384, 512, 768):
            p = plan(backward=backward, embed_dim=embed_dim)
            rows = 16 * (p.row_tiles if backward else p.tiles_per_block * (2 if embed_dim <= 256 else 1))
            assert plan(backward=backward, embed_dim=embed_dim, tokens=rows).blocks == 1
            assert plan(backward=backward, embed_dim=embed_dim, tokens=rows + 1).blocks == 2


class TestForwardOnly:
    def test_registers(self):
        """A float32 row takes twice the registers of a 16-bit one: 8 warps of 6 groups of 32 columns hold no more."""
        wide = {"dtype": torch.float32, "out_dtype": torch.bfloat16}
        assert plan(num_experts=1, embed_dim=1536, rank=4, **wide).groups_per_warp == 6
        refused = plan(num_experts=1, embed_dim=1568, rank=4, **wide)
        assert not refused.fused and refused.reason == "a row does not fit the registers of 8 warps"

    @pytest.mark.parametrize(
        ("shape", "even"),
        [
            ({"embed_dim": 768}, True),
            ({"embed_dim": 384}, True),
            ({"embed_dim": 96}, False),
            ({"embed_dim": 640}, True),
        ],
        ids=str,
    )
    def test_even(self, shape, even):
        """Whole groups of 32 columns a block, and a full count of them a warp."""
        p = plan(**shape)
        assert p.even == even
        assert f"even={str(even).lower()}" in repr(p)

    def test_prints_what_it_holds(self):
        p = plan()
        for name in ("blocks", "tiles_per_block", "warps_per_tile", "groups_per_warp", "shared_bytes"):
            assert f"{name}={getattr(p, name)}" in repr(p)


def test_a_backward_plan_prints_what_it_holds():
    p = plan(backward=True)
    for name in ("blocks", "warps", "row_tiles", "stages", "key_splits", "items_per_warp", "parts", "shared_bytes"):
        assert f"{name}={getattr(p, name)}" in repr(p)
    assert f"workspace_bytes={p.workspace_bytes}" in repr(p)


def test_launches_overlap_from_9_0_on():
    """The attribute that lets the second launch begin early is refused by older devices."""
    assert plan(H200, True).overlaps_launches and "overlaps_launches=true" in repr(plan(H200, True))
    assert not plan(A100, True).overlaps_launches and not plan(RTX, True).overlaps_launches


def test_the_same_limits_whatever_the_device_of_x():
    """Limits given by hand win over x's device, and only sizes and dtypes are read."""
    x, scale, down, up = tensors(tokens=19)
    real = [torch.empty_like(t, device="cpu") for t in (x, scale, down, up)]
    assert repr(ops.plan_alore(*real, **H200)) == repr(ops.plan_alore(x, scale, down, up, **H200))


SHAPES = st.fixed_dictionaries(
    {
        "num_experts": st.integers(1, 10),
        "blocks": st.integers(1, 10),
        "block_dim": st.one_of(st.integers(1, 40), st.integers(1, 64).map(lambda n: 8 * n)),
        "rank": st.integers(1, 70),
        "tokens": st.one_of(st.integers(0, 40), st.integers(0, 10**7)),
    }
)
TYPES = st.sampled_from(
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "norm": False},
        {"dtype": torch.float16, "norm": False, "residual": False},
        {"dtype": torch.float32, "out_dtype": torch.bfloat16},
    ]
)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(SHAPES, TYPES, st.sampled_from(list(DEVICES.values())))
def test_any_shape(shape, types, limits):
    """A plan fits its device and covers its tokens, or says why there is none."""
    block_dim, tokens = shape["block_dim"], shape["tokens"]
    sizes = {n: v for n, v in shape.items() if n != "block_dim"} | {"embed_dim": shape["blocks"] * block_dim}
    width = shape["num_experts"] * shape["rank"]
    inside = block_dim % 8 == 0 and shape["blocks"] <= 8 and width <= 64 and sizes["embed_dim"] <= 2048
    tiles = -(-tokens // 16)
    forward, backward = (plan(limits, back, **sizes, **types) for back in (False, True))
    for p in (forward, backward):
        assert p.fused == (p.reason == "") and (inside or not p.fused), p
        if p.fused:
            assert 0 < p.shared_bytes <= limits["shared_per_block"] and p.blocks >= 1, p
    if forward.fused:
        teams, warps = forward.tiles_per_block, forward.warps_per_tile
        assert (forward.blocks - 1) * teams < max(tiles, 1), forward
    if forward.fused and not forward.pipelined:
        most = {4: 8, 6: 8 if types.get("out_dtype") else 12, 8: 6}[forward.groups_per_warp]
        assert warps * forward.groups_per_warp * 32 >= sizes["embed_dim"] and 1 <= teams * warps <= most, forward
    if backward.fused:
        items = -(-block_dim // 32) * -(-width // 16)
        assert (backward.blocks - 1) * backward.row_tiles < max(tiles, 1), backward
        assert backward.blocks <= limits["num_sms"]
        factors = shape["num_experts"] * shape["blocks"] ** 2 + 2 * width * block_dim
        assert backward.workspace_bytes == 4 * backward.blocks * factors
    if backward.fused and not backward.pipelined:
        assert backward.warps in (8, 12) and backward.row_tiles in (1, 2, 4, 8), backward
        assert backward.warps * backward.items_per_warp >= items * backward.parts, backward
        assert 1 <= backward.stages and 1 <= backward.key_splits and 1 <= backward.parts, backward
        assert backward.row_tiles * shape["blocks"] * backward.key_splits <= max(
            backward.warps, backward.row_tiles * shape["blocks"]
        ), backward
