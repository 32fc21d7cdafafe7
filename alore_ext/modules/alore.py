"""ALoRE layers: a norm with an adapter behind it, a linear with one behind it, a layer with one before it.

Each has `down` [num_experts, p, rank] and `up` [num_experts, rank, p], p = width / num_experts. The scale
matrices [num_experts, num_experts, num_experts] are the model's `alore_scale`, or the layer's own `scale`
where the config does not share them.
"""

from __future__ import annotations

from torch import Tensor, nn

from alore_ext import ops

from .adapter import Adapter
from .experts import keep_experts
from .shared_scale import shared_scale


class AloreAdapter(Adapter):
    """What every layer with an ALoRE module shares."""

    adapter_parameters = ("down", "up", "scale")
    adapter_attributes = ("_alore_root", "_alore_dropout", "_kept_experts")

    _alore_root: nn.Module | None  # where alore_scale is registered; None where the layer has its own scale
    _alore_dropout: float

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """scale, down and up of the experts that run."""
        kept = self._kept_experts
        return keep_experts(self._scale(), kept), keep_experts(self.down, kept), keep_experts(self.up, kept)

    def _scale(self) -> Tensor:
        root = self._alore_root
        return self.scale if root is None else shared_scale(root)

    def _alore(self, x: Tensor) -> Tensor:
        return ops.alore(x, *self._factors(), self._alore_dropout, self.training)

    def extra_repr(self) -> str:
        num_experts, _, rank = self.down.shape
        own = ", own scale" if self._alore_root is None else ""
        adapter = f"alore: experts={num_experts}, rank={rank}, dropout={self._alore_dropout}{own}"
        return ", ".join(filter(None, (super().extra_repr(), adapter)))


class AloreLayerNorm(AloreAdapter):
    """`alore(layer_norm(x))` in one operator, for `nn.LayerNorm` and timm's over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., embed_dim] -> [..., embed_dim]."""
        return ops.layer_norm_alore(
            x,
            self.weight,
            self.bias,
            self.eps,
            *self._factors(),
            self._alore_dropout,
            self.training,
        )


class _AloreBehind(AloreAdapter):
    def forward(self, x: Tensor, *args, **kwargs):
        """alore(layer(x)), on the last dimension of the layer's output, or of its first where it returns a tuple."""
        y = super().forward(x, *args, **kwargs)
        return (self._alore(y[0]), *y[1:]) if isinstance(y, tuple) else self._alore(y)


class AloreNorm(_AloreBehind):
    """Any other norm, run as it is, then `alore` on the last dimension of its output."""


class AloreLinear(_AloreBehind):
    """A linear, run as it is, then `alore` on its output: the `after_attn` and `after_ffn` locations."""


class AloreInput(AloreAdapter):
    """A layer that runs as it is on `alore(x)`: the `before_*` locations where no norm comes before the layer.

    Only the first argument is adapted. `nn.MultiheadAttention`, which takes its input three times, is not for it.
    """

    def forward(self, x: Tensor, *args, **kwargs):
        """layer(alore(x), *args, **kwargs), on the last dimension of x."""
        return super().forward(self._alore(x), *args, **kwargs)
