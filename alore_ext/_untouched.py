"""Trying things on a model and leaving it, to the bit, as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to values, flags, gradients or random generators is undone, also where it raises.

    Covers every registered parameter and buffer, `training`, `requires_grad`, `.grad`, and torch's generators of the
    CPU and of the model's GPUs. Needs memory for one copy of the model. What is written to is what has changed: a
    tensor that kept its bits is not touched.
    """
    parameters = {(module, name): p for module in model.modules() for name, p in module._parameters.items()}
    buffers = {(module, name): b for module in model.modules() for name, b in module._buffers.items()}
    tensors = {id(tensor): tensor for tensor in (*parameters.values(), *buffers.values()) if tensor is not None}
    copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=_gpus(model)):
        try:
            yield
        finally:
            for (module, name), parameter in parameters.items():
                module._parameters[name] = parameter
            for (module, name), buffer in buffers.items():
                module._buffers[name] = buffer
            with torch.no_grad():
                for key, tensor in tensors.items():
                    if not same_bits(tensor, copies[key]):
                        tensor.copy_(copies[key])
            for parameter, requires_grad, grad in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for module, mode in training:
                module.training = mode


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 products in float32: where operands are cut to TF32, a rounding of the weights now and then moves one by
    a thousand roundings, and no bound that follows from roundings holds.
    """
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def seed_(model: nn.Module, seed: int) -> None:
    """Seed the generators that `left_as_it_was` gives back. `torch.manual_seed` would seed those of all GPUs."""
    torch.random.default_generator.manual_seed(seed)
    for index in _gpus(model):
        torch.cuda.default_generators[index].manual_seed(seed)


def _gpus(model: nn.Module) -> list[int]:
    return sorted({tensor.get_device() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals itself, and 0 is not -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.numel() == 0:
        return True
    flat = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(*flat)
