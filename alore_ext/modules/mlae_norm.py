"""A layer norm that computes the adapted linear behind it together with itself.

As one operator the two read x once each way, and backward keeps x alone where the linear apart would keep the norm's
output too. But they are two modules with other code between them, so the norm computes both, returns its own output,
and leaves the linear's for the linear to claim. The linear does so if it is called on that very tensor, unchanged, with
the parameters, modes and autograd state of before; in any other case it computes as ever, and what was left is dropped.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from alore_ext import ops
from alore_ext.ops.lora import fuses_norm

from .adapter import Adapter
from .mlae import MlaeLinear

# Results in a row that nobody claims, until a norm stops computing them: something between it and its linear stands in
# the way, such as a checkpoint around the attention alone.
_MOST_UNCLAIMED = 3


class Ahead:
    """A linear's output for the output of the norm before it. Lives no longer than the latter, and is never copied."""

    def __init__(self, norm: MlaeNorm, normalised: Tensor, out: Tensor) -> None:
        linear = norm._mlae_behind
        self._norm = weakref.ref(norm)
        self._normalised = weakref.ref(normalised, lambda _: linear.__dict__.pop("_mlae_ahead", None))
        self._version = normalised._version
        self._state = _state(linear)
        self._out = out

    def claim(self, x: Tensor, linear: MlaeLinear) -> Tensor | None:
        """The output, or None where x or the circumstances are not those of before."""
        if x is not self._normalised() or x._version != self._version or self._state != _state(linear):
            return None
        if x._backward_hooks or x.retains_grad:  # the linear's gradient would go past them
            return None
        if (norm := self._norm()) is not None:
            norm.__dict__["_mlae_unclaimed"] = 0
        return self._out

    def __reduce__(self):
        return _nothing, ()


def _nothing() -> None:
    """What a copy of a linear has in the place of an `Ahead`."""


def _state(linear: MlaeLinear) -> tuple:
    """What the output depends on beside x. The hooks are those of checkpoints, among others: in and out of one, the
    mask is not the same, nor what is saved.
    """
    parameters = [(id(p), p._version) for p in linear._parameters.values() if p is not None]
    return (
        torch.is_grad_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch.is_autocast_enabled("cuda"),
        linear.training,
        linear._kept_experts,
        parameters,
    )


class MlaeNorm(Adapter):
    """See the module's text. Only where the fused kernels run, and only where nothing shows that the two are one.

    The norm and the linear stay apart under autocast (the norm is float32 there), torch.compile (which fuses the norm
    itself), inference mode (whose tensors do not tell that they were written to), hooks on the norm (whose gradients
    are to be seen as well), and forward pre-hooks on the linear or a module around it (which may bring its weights).
    What remains to be seen: `torch.autograd.grad` of the norm's output passes by the linear.
    """

    adapter_attributes = ("_mlae_behind", "_mlae_between", "_mlae_unclaimed")

    _mlae_behind: MlaeLinear
    _mlae_between: tuple[nn.Module, ...]  # around the linear, but not around the norm
    _mlae_unclaimed: int

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> layer_norm(x)."""
        if torch.compiler.is_compiling() or not self._computes_ahead(x):
            return super().forward(x)
        linear = self._mlae_behind
        out, normalised = ops.layer_norm_mlae_linear(
            x,
            self.weight,
            self.bias,
            self.eps,
            linear.weight,
            linear._bias(),
            *linear._factors(),
            linear._mlae_mask_p,
            linear.training,
        )
        self.__dict__["_mlae_unclaimed"] += 1
        linear.__dict__["_mlae_ahead"] = Ahead(self, normalised, out)
        return normalised

    def _computes_ahead(self, x: Tensor) -> bool:
        if type(x) is not Tensor or not x.is_cuda or self._mlae_unclaimed >= _MOST_UNCLAIMED:
            return False
        linear = self._mlae_behind
        weight = linear._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.device != x.device:
            return False
        rank = linear.lora_a.shape[0]
        if not fuses_norm(x.device, weight.shape, rank, x.dtype, weight.dtype) or self._is_watched():
            return False
        # Gradients of the backbone's own weights need the norm's output.
        trained = weight.requires_grad or any(p is not None and p.requires_grad for p in (self.weight, self.bias))
        return not (trained or torch.is_autocast_enabled("cuda") or torch.is_inference_mode_enabled())

    def _is_watched(self) -> bool:
        """Whether hooks, a forward of its own or a compiled call see to one of the modules."""
        if nn_module._global_forward_pre_hooks or nn_module._global_forward_hooks:
            return True
        if self._forward_hooks or self._backward_hooks or self._backward_pre_hooks:
            return True
        return any(
            module._forward_pre_hooks or "forward" in module.__dict__ or module._compiled_call_impl is not None
            for module in (self._mlae_behind, *self._mlae_between)
        )
