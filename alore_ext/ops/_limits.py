"""What a plan needs to know of a GPU."""

from __future__ import annotations

import torch


def device_limits(
    caller: str,
    device: torch.device,
    capability: int | None = None,
    num_sms: int | None = None,
    shared_per_block: int | None = None,
) -> tuple[int, int, int]:
    """Compute capability as 10 * major + minor, multiprocessors, and bytes of shared memory that a block may ask for.

    Those given, or `device`'s where one is not.

    Raises:
        ValueError: some are missing, and `device` is no CUDA device.
    """
    limits = (capability, num_sms, shared_per_block)
    if None not in limits:
        return limits
    if device.type != "cuda":
        raise ValueError(
            f"{caller}: give a CUDA device, or capability, num_sms and shared_per_block; got device {device} and "
            f"{limits}"
        )
    properties = torch.cuda.get_device_properties(device)
    return (
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )
