"""`nn.MultiheadAttention` that calls its output projection, and that lets its input projection be adapted.

torch's own forward passes `out_proj.weight` to a function, and at inference everything to one fused operator, so
that an adapter on `out_proj` would never run. The input projection is no module at all: its weight [3E, E] is the
attention's own parameter `in_proj_weight`, so an adapter of it belongs to the attention.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from alore_ext import ops

from .adapter import Adapter
from .experts import keep_lora_experts


def check_multihead_attention(module: nn.Module) -> str | None:
    """Why `module` cannot be a `CalledMultiheadAttention`; None where it can."""
    kind = type(module).__name__
    if not isinstance(module, nn.MultiheadAttention):
        return f"expected nn.MultiheadAttention, got {kind}"
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{kind} replaces the forward of nn.MultiheadAttention"
    if module.in_proj_weight is None:
        sizes = f"kdim={module.kdim}, vdim={module.vdim}, embed_dim={module.embed_dim}"
        return f"keys or values have a width of their own ({sizes}), so there is no joint in_proj_weight"
    if module.bias_k is not None or module.bias_v is not None:
        return "it appends a learned key and value (add_bias_kv=True)"
    if module.add_zero_attn:
        return "it appends a key and value of zeros (add_zero_attn=True)"
    return None


class CalledMultiheadAttention(Adapter):
    """`nn.MultiheadAttention` with `out_proj` called as a module and the input projection a method.

    For modules that `check_multihead_attention` has nothing against. Takes what torch's own takes, with the same
    results, except nested tensors, which only its fused inference operator knows.
    """

    # nn.TransformerEncoderLayer has a fused inference path that reads the weights past this class. It takes that
    # path only where this attribute is true, and calls the attention otherwise.
    _qkv_same_embed_dim = property(lambda self: False)

    def in_projection(self, x: Tensor) -> Tensor:
        """x: [..., E] -> [..., 3E], its queries, keys and values."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)

    def cross_projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each input [..., E] under its own third of the projection -> [..., E]."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        thirds = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in thirds)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: the attended values, and the weights [N, L, S] where they are asked for.

        Raises:
            ValueError: an input is a nested tensor; a shape does not fit; is_causal without the attn_mask that it
                is a hint about.
        """
        if is_causal and attn_mask is None:
            raise ValueError("MultiheadAttention: is_causal is a hint about attn_mask, which is None")
        _check_inputs(query, key, value, key_padding_mask, attn_mask, self.num_heads, self.batch_first)
        if query is key and key is value:
            q, k, v = self.in_projection(query).chunk(3, dim=-1)
        else:
            q, k, v = self.cross_projections(query, key, value)
        y, weights = _attend(
            q,
            k,
            v,
            key_padding_mask,
            attn_mask,
            is_causal,
            self.num_heads,
            self.batch_first,
            self.dropout if self.training else 0.0,
            need_weights,
            average_attn_weights,
        )
        return self.out_proj(y), weights


class MlaeMultiheadAttention(CalledMultiheadAttention):
    """MLAE on the joint input projection: `MlaeLinear` with `in_proj_weight` and `in_proj_bias`.

    `lora_a` [R, E], `lora_b` [3E, R], `coeff` [num_experts], R = num_experts * expert_rank. One mask a training
    forward, also where queries, keys and values are different inputs.
    """

    adapter_parameters = ("lora_a", "lora_b", "coeff")
    adapter_attributes = ("_mlae_mask_p", "_mlae_expert_rank", "_kept_experts")

    _mlae_mask_p: float
    _mlae_expert_rank: int

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """lora_a, lora_b and coeff of the experts that run."""
        return keep_lora_experts(self.lora_a, self.lora_b, self.coeff, self._kept_experts, self._mlae_expert_rank)

    def in_projection(self, x: Tensor) -> Tensor:
        return ops.mlae_linear(
            x,
            self.in_proj_weight,
            self.in_proj_bias,
            *self._factors(),
            self._mlae_mask_p,
            self.training,
        )

    def cross_projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Three products but one draw, which is therefore made here and not inside each of them.
        lora_a, lora_b, coeff = self._factors()
        coeff = F.dropout(coeff, self._mlae_mask_p, self.training).repeat_interleave(self._mlae_expert_rank)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        thirds = zip((query, key, value), self.in_proj_weight.chunk(3), biases, lora_b.chunk(3), strict=True)
        return tuple(ops.masked_lora_linear(x, weight, bias, lora_a, rows, coeff) for x, weight, bias, rows in thirds)

    def extra_repr(self) -> str:
        experts = f"mlae: experts={self.coeff.numel()}, expert_rank={self._mlae_expert_rank}"
        return ", ".join(filter(None, (super().extra_repr(), f"{experts}, mask_p={self._mlae_mask_p}")))


@fx.wrap
def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    batch_first: bool,
) -> None:
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError(
            "MultiheadAttention: an adapted attention takes no nested tensors; build nn.TransformerEncoder "
            "with enable_nested_tensor=False"
        )
    if query.dim() not in (2, 3) or key.dim() != query.dim():
        raise ValueError(
            "MultiheadAttention: expected query and key both [L, E] or both with a batch dimension, "
            f"got {list(query.shape)} and {list(key.shape)}"
        )
    if key.shape != value.shape:
        raise ValueError(
            f"MultiheadAttention: expected key and value of one shape, got {list(key.shape)} and {list(value.shape)}"
        )
    length_dim = 1 if query.dim() == 3 and batch_first else 0
    num_queries, num_keys = query.size(length_dim), key.size(length_dim)
    batch = [] if query.dim() == 2 else [query.size(1 - length_dim)]
    if key_padding_mask is not None and list(key_padding_mask.shape) != [*batch, num_keys]:
        raise ValueError(
            f"MultiheadAttention: expected key_padding_mask {[*batch, num_keys]}, got {list(key_padding_mask.shape)}"
        )
    shared, apart = [num_queries, num_keys], [math.prod(batch) * num_heads, num_queries, num_keys]
    if attn_mask is not None and list(attn_mask.shape) not in (shared, apart):
        raise ValueError(f"MultiheadAttention: expected attn_mask {shared} or {apart}, got {list(attn_mask.shape)}")


@fx.wrap
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    num_heads: int,
    batch_first: bool,
    dropout: float,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention between the projections, in their layout: [L, E], [N, L, E] (batch_first) or [L, N, E].

    Masks are as `nn.MultiheadAttention` takes them: true where not to attend, or numbers to add.
    """
    is_batched = q.dim() == 3
    # [N, heads, length, head_dim]
    if not is_batched:
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(0, 1)[None] for x in (q, k, v))
    elif batch_first:
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))

    # The hint replaces the mask only where nothing else needs it.
    is_causal = is_causal and key_padding_mask is None and not need_weights
    mask = None
    if attn_mask is not None and not is_causal:
        mask = _added(attn_mask, q.dtype)
        mask = mask if mask.dim() == 2 else mask.view(-1, num_heads, *mask.shape[1:])
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, q.dtype).view(q.size(0), 1, 1, -1)
        mask = padding if mask is None else mask + padding

    weights = None
    if need_weights:
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout)
        y = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if is_batched else weights[0]
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal)
    if not is_batched:
        return y[0].transpose(0, 1).flatten(-2), weights
    return (y.transpose(1, 2) if batch_first else y.permute(2, 0, 1, 3)).flatten(-2), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add: -inf where a boolean one is true."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
