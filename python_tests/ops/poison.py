"""Memory that is NaN before a call, so that what no kernel wrote shows in the results."""

import contextlib

import torch
import torch.utils.deterministic


def fill_free_blocks():
    """Leaves NaN in what the CUDA allocator hands out next, from small blocks to workspaces."""
    blocks = [torch.full((2**k,), torch.nan, device="cuda") for k in range(7, 26, 2) for _ in range(3)]
    torch.cuda.synchronize()
    del blocks


@contextlib.contextmanager
def poisoned(device):
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(64, device=device).isnan().all()
        assert (torch.empty(64, device=device, dtype=torch.uint8) == 255).all()
        if device.type == "cuda":
            fill_free_blocks()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
