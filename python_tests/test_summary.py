"""Parameter counts, against the tables of the two papers (FACTS sections 1 and 2)."""

import pytest
import timm
import torch
from backbones import build

import alore_ext as ae


def big(name):
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=0)


def adapters(name, config):
    return ae.trainable_summary(ae.patch(big(name), config)).adapter


RANKS = {1: 36_928, 2: 73_792, 4: 147_520, 8: 294_976, 16: 589_888, 32: 1_179_712}
EXPERTS = {1: 147_457, 2: 147_464, 4: 147_520, 8: 147_968, 16: 151_552, 32: 180_224}
FIRST_LAYERS = {2: 24_640, 4: 49_216, 6: 73_792, 8: 98_368, 10: 122_944, 12: 147_520}


@pytest.fixture(scope="module")
def vit_b():
    return big("vit_base_patch16_224")


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ae.AloreConfig(), 147_520),
        (ae.AloreConfig(locations=("before_attn",)), 73_792),
        *[(ae.AloreConfig(rank=rank), count) for rank, count in RANKS.items()],
        *[(ae.AloreConfig(num_experts=experts), count) for experts, count in EXPERTS.items()],
        *[(ae.AloreConfig(layers=range(depth)), count) for depth, count in FIRST_LAYERS.items()],
        (ae.AloreConfig(share_scale=False), 147_456 + 24 * 64),
        (ae.MlaeConfig(), 295_008),
        (ae.MlaeConfig(masking="fixed", pattern="incremental"), 295_008),
        (ae.MlaeConfig(masking="fixed", pattern="random"), 295_008),
    ],
    ids=repr,
)
def test_vit_b(vit_b, config, count):
    ae.patch(vit_b, config)
    try:
        assert ae.trainable_summary(vit_b).adapter == count
    finally:
        ae.unpatch(vit_b)


@pytest.mark.parametrize(("name", "count"), [("vit_large_patch16_224", 393_280), ("vit_huge_patch14_224", 655_424)])
def test_larger(name, count):
    assert adapters(name, ae.AloreConfig()) == count


def test_roles_add_up():
    model = build("vit")
    plain = ae.trainable_summary(model)
    assert plain.adapter == plain.head == 0 and plain.total == plain.trainable == plain.base
    ae.patch(model, [ae.AloreConfig(locations=("before_ffn", "after_ffn")), ae.MlaeConfig(targets=("qkv", "proj"))])
    summary = ae.trainable_summary(model)
    factors = 2 * 4 * 32 * 3
    assert summary.by_role == {
        "before_ffn": factors,
        "after_ffn": factors,
        "qkv": 3 * 8 * (32 + 96 + 1),
        "proj": 3 * 8 * (32 + 32 + 1),
        "alore_scale": 64,
    }
    assert summary.adapter == sum(summary.by_role.values())
    assert summary.head == 5 * 33
    assert summary.trainable == summary.adapter + summary.head
    assert summary.base == plain.total - summary.head
    assert summary.total == plain.total + summary.adapter
    assert summary.percent == pytest.approx(100 * summary.trainable / summary.total)
    ae.merge_(model)
    assert ae.trainable_summary(model) == summary
    ae.unmerge_(model)
    model.blocks[0].norm2.requires_grad_(False)
    assert ae.trainable_summary(model).trainable == summary.trainable - 2 * 4 * 32


def test_printed():
    lines = str(ae.trainable_summary(ae.patch(build("vit"), ae.AloreConfig()))).splitlines()
    names = "before_attn before_ffn alore_scale --- adapters head base --- trainable total"
    assert [line.split()[0].replace(lines[3], "---") for line in lines] == names.split()
    assert lines[0].split()[1] == "768" and lines[4].split()[1] == "1,600"
    assert "%" in lines[8]


def test_what_is_no_model():
    with pytest.raises(TypeError, match="expected an nn.Module, got int"):
        ae.trainable_summary(3)
