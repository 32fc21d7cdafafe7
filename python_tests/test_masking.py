"""The masking tables of the MLAE paper."""

import pytest
import torch

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
