"""The masking tables of the MLAE paper."""

import backbones
import pytest
import torch

import alore_ext as ae
from alore_ext.config import MlaeConfig
from alore_ext.masking import expert_counts, mask_probabilities


@pytest.mark.parametrize(
    ("pattern", "counts"),
    [
        ("incremental", [2] * 3 + [6] * 3 + [10] * 3 + [14] * 3),
        ("decremental", [14] * 3 + [10] * 3 + [6] * 3 + [2] * 3),
        ("hourglass", [14] * 3 + [2] * 6 + [14] * 3),
        ("protruding", [2] * 3 + [14] * 6 + [2] * 3),
    ],
)
def test_fixed_patterns_of_the_paper(pattern, counts):
    config = MlaeConfig(num_experts=8, masking="fixed", pattern=pattern)
    assert list(expert_counts(config, 12)) == counts
    assert sum(counts) == 96
    assert set(mask_probabilities(config, 12)) == {0.0}


@pytest.mark.parametrize("num_experts", [4, 8, 16])
@pytest.mark.parametrize("depth", [1, 3, 12, 24])
def test_random_pattern(num_experts, depth):
    config = MlaeConfig(num_experts=num_experts, masking="fixed", pattern="random")
    torch.manual_seed(1)
    counts = expert_counts(config, depth)
    assert sum(counts) == num_experts * depth
    assert all(1 <= count <= num_experts * 7 // 4 for count in counts)
    torch.manual_seed(1)
    assert expert_counts(config, depth) == counts


def test_stochastic_patterns():
    incremental = mask_probabilities(MlaeConfig(pattern="incremental"), 12)
    assert incremental == (0.8, 0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
    assert mask_probabilities(MlaeConfig(pattern="decremental"), 12) == incremental[::-1]
    protruding = mask_probabilities(MlaeConfig(pattern="protruding"), 12)
    assert protruding == (0.8, 0.6, 0.5, 0.3, 0.1, 0.0, 0.0, 0.1, 0.3, 0.5, 0.6, 0.8)
    hourglass = mask_probabilities(MlaeConfig(pattern="hourglass"), 12)
    assert hourglass == (0.0, 0.1, 0.3, 0.5, 0.6, 0.8, 0.8, 0.6, 0.5, 0.3, 0.1, 0.0)
    assert mask_probabilities(MlaeConfig(dropout=0.3), 5) == (0.3,) * 5
    assert mask_probabilities(MlaeConfig(masking="none"), 5) == (0.0,) * 5
    assert expert_counts(MlaeConfig(pattern="incremental"), 3) == (8, 8, 8)


def test_mixed_is_a_fixed_pattern_and_one_probability():
    config = MlaeConfig(masking="mixed", pattern="protruding", dropout=0.1)
    assert expert_counts(config, 12) == (2,) * 3 + (14,) * 6 + (2,) * 3
    assert mask_probabilities(config, 12) == (0.1,) * 12


@pytest.mark.parametrize("depth", [1, 2, 4, 24, 32])
def test_other_depths_read_the_table_stretched(depth):
    config = MlaeConfig(masking="fixed", pattern="incremental")
    counts = expert_counts(config, depth)
    assert len(counts) == depth and list(counts) == sorted(counts)
    if depth % 4 == 0:
        assert sum(counts) == 8 * depth


def test_lists_are_taken_as_they_are():
    fixed = MlaeConfig(num_experts=3, masking="fixed", pattern=[5, 1, 2])
    assert expert_counts(fixed, 3) == (5, 1, 2) and mask_probabilities(fixed, 3) == (0.0,) * 3
    mixed = MlaeConfig(masking="mixed", pattern=(5, 1, 2), dropout=0.25)
    assert expert_counts(mixed, 3) == (5, 1, 2) and mask_probabilities(mixed, 3) == (0.25,) * 3
    stochastic = MlaeConfig(num_experts=3, pattern=[0, 0.5, 0.25])
    assert expert_counts(stochastic, 3) == (3,) * 3 and mask_probabilities(stochastic, 3) == (0.0, 0.5, 0.25)


@pytest.mark.parametrize("fields", [dict(masking="fixed", pattern=[5, 1]), dict(pattern=[0.5, 0.1])], ids=str)
def test_a_list_must_have_an_entry_a_block(fields):
    model = backbones.build("vit")
    before = backbones.snapshot(model)
    with pytest.raises(ValueError, match="pattern must have an entry for each of the model's 3 blocks, got 2"):
        ae.patch(model, MlaeConfig(**fields))
    backbones.assert_unchanged(model, before)


def test_a_list_survives_the_adapter_file(tmp_path):
    model = ae.patch(backbones.build("vit"), MlaeConfig(masking="fixed", pattern=[3, 1, 2], layers=(0, 2)))
    path = ae.save_adapter(model, tmp_path / "adapter.safetensors")
    loaded = ae.load_adapter(ae.unpatch(model), path)
    assert loaded.blocks[0].attn.qkv.coeff.numel() == 3 and loaded.blocks[2].attn.qkv.coeff.numel() == 2
