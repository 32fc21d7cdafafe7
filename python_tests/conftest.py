"""Shared fixtures: every test runs on the GPU where there is one, from a fixed seed."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _full_float32() -> None:
    """By default cuDNN rounds a float32 convolution's operands to TF32, which no bound for float32 allows for."""
    torch.backends.cudnn.allow_tf32 = False
