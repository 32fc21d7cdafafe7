"""MLAE's masking patterns: how many experts each block has, and how likely each is to be masked at a step.

The tables are those of the MLAE paper (Table 4 and A.5) for ViT-B's 12 blocks and 8 experts. A model of
another depth reads them stretched: block i of `depth` takes entry `12 * i // depth`. All functions are pure.
A config may list the blocks' values instead of naming a pattern: they are then taken as they are.
"""

from __future__ import annotations

import torch

from .config import MlaeConfig

_TABLE_DEPTH = 12

_MASK_PROBABILITIES = {
    "incremental": (0.8, 0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
    "decremental": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.8),
    "protruding": (0.8, 0.6, 0.5, 0.3, 0.1, 0.0, 0.0, 0.1, 0.3, 0.5, 0.6, 0.8),
    "hourglass": (0.0, 0.1, 0.3, 0.5, 0.6, 0.8, 0.8, 0.6, 0.5, 0.3, 0.1, 0.0),
}

# Experts of a block in quarters of num_experts: with 8 experts, 2, 6, 10 and 14.
_EXPERT_QUARTERS = {
    "incremental": (1,) * 3 + (3,) * 3 + (5,) * 3 + (7,) * 3,
    "decremental": (7,) * 3 + (5,) * 3 + (3,) * 3 + (1,) * 3,
    "protruding": (1,) * 3 + (7,) * 6 + (1,) * 3,
    "hourglass": (7,) * 3 + (1,) * 6 + (7,) * 3,
}


def mask_probabilities(config: MlaeConfig, depth: int) -> tuple[float, ...]:
    """The probability of masking an expert in a training step, for each of a model's `depth` blocks.

    Raises ValueError for a list of another length.
    """
    if config.masking in ("fixed", "none"):
        return (0.0,) * depth
    if config.masking == "stochastic" and not isinstance(config.pattern, str):
        return _listed(config, depth)
    if config.masking == "mixed" or config.pattern == "uniform":
        return (config.dropout,) * depth
    return _stretch(_MASK_PROBABILITIES[config.pattern], depth)


def expert_counts(config: MlaeConfig, depth: int) -> tuple[int, ...]:
    """The number of experts of each of a model's `depth` blocks.

    Only pattern "random" draws: integers in 1..14 with mean 8 (for 8 experts), from torch's global generator.

    Raises ValueError for a list of another length.
    """
    if config.masking in ("stochastic", "none"):
        return (config.num_experts,) * depth
    if not isinstance(config.pattern, str):
        return _listed(config, depth)
    if config.pattern == "random":
        return _random_counts(config.num_experts, depth)
    return tuple(config.num_experts * quarters // 4 for quarters in _stretch(_EXPERT_QUARTERS[config.pattern], depth))


def _listed(config: MlaeConfig, depth: int) -> tuple:
    if len(config.pattern) != depth:
        raise ValueError(
            f"MlaeConfig: pattern must have an entry for each of the model's {depth} blocks, got {len(config.pattern)}"
        )
    return config.pattern


def _stretch(table: tuple, depth: int) -> tuple:
    return tuple(table[_TABLE_DEPTH * block // depth] for block in range(depth))


def _random_counts(num_experts: int, depth: int) -> tuple[int, ...]:
    largest = num_experts * 7 // 4
    counts = torch.randint(1, largest + 1, (depth,), device="cpu").tolist()
    # Move one expert at a time, in random blocks, until the mean is num_experts.
    while (excess := sum(counts) - num_experts * depth) != 0:
        step = -1 if excess > 0 else 1
        block = int(torch.randint(depth, (), device="cpu"))
        if 1 <= counts[block] + step <= largest:
            counts[block] += step
    return tuple(counts)
