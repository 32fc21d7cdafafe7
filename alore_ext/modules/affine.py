"""Bottleneck adapters with biases, `y = x + up(act(down(x)))`: ALoRE's stacked structures and RepAdapter.

They are plain products of torch, along the last axis or along the channels of NCHW, and need no operator of their own:
the code between `down` and `up` is narrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .adapter import Adapter
from .experts import keep_experts


class AffineMaps(NamedTuple):
    """An adapter as two affine maps: `code = x down^T + down_bias`, `branch = code up + up_bias`.

    `down` [R, d], `down_bias` [R], `up` [R, d], `up_bias` [d].
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


@dataclass(frozen=True)
class AffineForm:
    """How an adapter's parameters make its maps, and what is done around them.

    Attributes:
        channel_axis: the axis that the adapter acts on: -1, or 1 for NCHW.
        gelu: GELU on the code, or the identity.
        code_dropout, dropout: probabilities, on the code and on the branch.
    """

    channel_axis: int
    gelu: bool = False
    code_dropout: float = 0.0
    dropout: float = 0.0

    def maps(
        self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, kept: tuple[int, ...] | None = None
    ) -> AffineMaps:
        """The maps of an adapter's own parameters; of the experts `kept` alone, where it has experts."""
        raise NotImplementedError


@dataclass(frozen=True)
class StackedForm(AffineForm):
    """n adapters side by side: `down` [n, d, r], `down_bias` [n, r], `up` [n, r, d], `up_bias` [n, d]."""

    def maps(
        self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, kept: tuple[int, ...] | None = None
    ) -> AffineMaps:
        down, down_bias, up, up_bias = (keep_experts(factor, kept) for factor in (down, down_bias, up, up_bias))
        return AffineMaps(down.mT.flatten(0, 1), down_bias.flatten(), up.flatten(0, 1), up_bias.sum(0))


@dataclass(frozen=True)
class GroupedForm(AffineForm):
    """`down` [d, r], `down_bias` [r], `up` [g, r / g, d / g] in g blocks, `up_bias` [d]; the branch times `scale`."""

    scale: float = 1.0

    def maps(
        self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, kept: tuple[int, ...] | None = None
    ) -> AffineMaps:
        # The zeros between the blocks cost less than a product for each block would: the code is narrow.
        return AffineMaps(down.mT, down_bias, torch.block_diag(*up.unbind()) * self.scale, up_bias * self.scale)


@fx.wrap
def affine(
    x: Tensor,
    form: AffineForm,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    kept: tuple[int, ...] | None,
    training: bool,
) -> Tensor:
    """x + branch(x), in x's shape, dtype and memory format.

    Products are in x's dtype, or autocast's. NCHW memory is multiplied as it lies, channels_last memory as tokens.
    """
    maps = AffineMaps(*(factor.to(x.dtype) for factor in form.maps(down, down_bias, up, up_bias, kept)))
    if form.channel_axis == -1 or x.stride(form.channel_axis) == 1:
        tokens = x.movedim(form.channel_axis, -1)
        code = _on_code(F.linear(tokens, maps.down, maps.down_bias), form, training)
        branch = F.linear(code, maps.up.mT, maps.up_bias).movedim(-1, form.channel_axis)
    else:
        code = _on_code(_product(maps.down, maps.down_bias, x.flatten(2)), form, training)
        branch = _product(maps.up.mT, maps.up_bias, code).view(x.shape)
    return (x + F.dropout(branch, form.dropout, training)).to(x.dtype)


def _on_code(code: Tensor, form: AffineForm, training: bool) -> Tensor:
    return F.dropout(F.gelu(code) if form.gelu else code, form.code_dropout, training)


def _product(matrix: Tensor, bias: Tensor, image: Tensor) -> Tensor:
    """matrix [m, k] @ image [batch, k, spatial] + bias [m]."""
    return torch.baddbmm(bias[:, None], matrix.expand(image.shape[0], -1, -1), image)


class AffineAdapter(Adapter):
    """What every layer with such an adapter shares."""

    adapter_parameters = ("down", "down_bias", "up", "up_bias")
    adapter_attributes = ("_affine_form", "_kept_experts")

    _affine_form: AffineForm

    def _affine(self, x: Tensor) -> Tensor:
        factors = (self.down, self.down_bias, self.up, self.up_bias)
        return affine(x, self._affine_form, *factors, self._kept_experts, self.training)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(getattr(self, name).shape)}" for name in ("down", "up"))
        return ", ".join(filter(None, (super().extra_repr(), f"{type(self._affine_form).__name__}: {shapes}")))


class AffineBehind(AffineAdapter):
    """A layer that runs as it is, then the adapter on its output, or on the first where it returns a tuple."""

    def forward(self, x: Tensor, *args, **kwargs):
        """adapter(layer(x, *args, **kwargs))."""
        y = super().forward(x, *args, **kwargs)
        return (self._affine(y[0]), *y[1:]) if isinstance(y, tuple) else self._affine(y)


class AffineInput(AffineAdapter):
    """A layer that runs as it is on the adapted x, its first argument."""

    def forward(self, x: Tensor, *args, **kwargs):
        """layer(adapter(x), *args, **kwargs)."""
        return super().forward(self._affine(x), *args, **kwargs)
