"""ALoRE in plain PyTorch (DESIGN section 2; ALoRE paper, section 3).

A token x of width s_in * p_in is s_in blocks of p_in values. Expert i mixes the blocks with `scale[i]` and
the values inside a block with `down[i] @ up[i]`:

    W' = sum_i scale[i] (x) (down[i] @ up[i])        y = x @ W'
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtype import cast, compute_dtype


def kron_linear(x: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """y = x @ W', without building W'.

    Args:
        x: [..., s_in * p_in].
        scale: [num_experts, s_in, s_out].
        down: [num_experts, p_in, rank].
        up: [num_experts, rank, p_out].

    Returns:
        [..., s_out * p_out], in x's dtype.
    """
    dtype = compute_dtype(x, scale, down, up)
    blocks, scale, down, up = cast(dtype, x.unflatten(-1, (scale.shape[1], down.shape[1])), scale, down, up)
    z = torch.einsum("...ap,epr->...aer", blocks, down)  # Z[m,a,i,:] = X[m,a,:] D_i
    h = torch.einsum("...aer,eab->...ber", z, scale)  # H[m,b,i,:] = sum_a S_i[a,b] Z[m,a,i,:]
    y = torch.einsum("...ber,erq->...bq", h, up)  # Y[m,b,:] = sum_i H[m,b,i,:] U_i
    return y.flatten(-2).to(x.dtype)


def alore(x: Tensor, scale: Tensor, down: Tensor, up: Tensor, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    """x + dropout(x @ W'), shapes as in `kron_linear` with square `scale` and p_in = p_out."""
    dtype = compute_dtype(x, scale, down, up)
    branch = kron_linear(x.to(dtype), scale, down, up)
    return (x.to(dtype) + F.dropout(branch, dropout_p, training)).to(x.dtype)


def layer_norm_alore(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    down: Tensor,
    up: Tensor,
    dropout_p: float = 0.0,
    training: bool = True,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """alore(layer_norm(x)) over the last dimension; `weight` and `bias` are [embed_dim] or None.

    With a residual, of x's shape and dtype, the norm acts on x + residual rounded to that dtype.

    Returns:
        Like x; with a residual that and the sum.
    """
    dtype = compute_dtype(x, weight, bias, scale, down, up)
    total = x if residual is None else (x.to(dtype) + residual.to(dtype)).to(x.dtype)
    values, weight, bias = cast(dtype, total, weight, bias)
    normed = F.layer_norm(values, x.shape[-1:], weight, bias, eps)
    y = alore(normed, scale, down, up, dropout_p, training).to(x.dtype)
    return y if residual is None else (y, total)


def kron_weight(scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The dense W' [s_in * p_in, s_out * p_out] = sum_i scale[i] (x) (down[i] @ up[i])."""
    dense = torch.einsum("eab,epr,erq->apbq", scale, down, up)
    return dense.flatten(2, 3).flatten(0, 1)


def merge_kron_(weight: Tensor, bias: Tensor | None, scale: Tensor, down: Tensor, up: Tensor, side: str) -> None:
    """Fold `x -> x (I + W')` into a linear layer that stands after it ("before") or before it ("after"), in
    place.

        before:  weight <- weight (I + W')^T, bias unchanged
        after:   weight <- (I + W')^T weight, bias <- bias (I + W')

    Args:
        weight: [out_features, in_features].
        bias: [out_features] or None.
        side: "before" or "after", where the adapter stands as seen from the linear.
    """
    dtype = compute_dtype(weight, scale, down, up)
    dense = kron_weight(*cast(dtype, scale, down, up))
    wide = weight.to(dtype)
    with torch.no_grad():
        if side == "before":
            weight.copy_(wide + wide @ dense.T)
        elif side == "after":
            weight.copy_(wide + dense.T @ wide)
            if bias is not None:
                bias.copy_(bias.to(dtype) + bias.to(dtype) @ dense)
        else:
            raise ValueError(f"merge_kron_: side must be 'before' or 'after', got {side!r}")
