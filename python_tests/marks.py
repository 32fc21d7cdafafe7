"""Marks that several test files put on tests."""

import pytest
import torch

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: benchmarks/device_check.sh runs it on one"
    ),
]
