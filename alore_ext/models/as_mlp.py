"""AS-MLP in three sizes: the paper "AS-MLP: An Axial Shifted MLP Architecture for Vision" (ICLR 2022).

A hierarchy of stages like Swin's, without attention: a block mixes space by shifting groups of channels along the
width and the height (`alore_ext.ops.axial_shift_pair`) in front of 1x1 convolutions. Names and shapes of the
parameters are those of the published checkpoints: see :func:`~alore_ext.models.load_as_mlp_checkpoint`.

The models have timm's interface (``forward_features``, ``forward_head``, ``reset_classifier``, ``group_matcher``, ...),
but need no timm. They take any image whose sides are multiples of 32, in contiguous or channels_last memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops

__all__ = ["AsMlp", "as_mlp_base", "as_mlp_small", "as_mlp_tiny"]

PATCH = 4  # the stem's stride


def channel_norm(channels: int) -> nn.GroupNorm:
    """Normalises each image over all its channels and pixels."""
    return nn.GroupNorm(1, channels, eps=1e-5)


class DropPath(nn.Module):
    """Stochastic depth: in training, each sample loses the branch with probability ``drop_prob``; kept ones are
    divided by ``1 - drop_prob``."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1.0 - self.drop_prob)
        return x * keep.div_(1.0 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class ChannelMlp(nn.Module):
    """Two 1x1 convolutions with a GELU between, on ``[B, C, H, W]``."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class AxialShift(nn.Module):
    """The token mixer: a shift along each axis, each with a 1x1 convolution of its own behind it, added."""

    def __init__(self, dim: int, shift_size: int) -> None:
        super().__init__()
        self.shift_size = shift_size
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.norm1 = channel_norm(dim)
        self.conv2_1 = nn.Conv2d(dim, dim, 1)
        self.conv2_2 = nn.Conv2d(dim, dim, 1)
        self.norm2 = channel_norm(dim)
        self.conv3 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        along_width, along_height = ops.axial_shift_pair(x, self.shift_size)
        x = F.gelu(self.conv2_1(along_width)) + F.gelu(self.conv2_2(along_height))
        return self.conv3(self.norm2(x))

    def extra_repr(self) -> str:
        return f"shift_size={self.shift_size}"


class AsMlpBlock(nn.Module):
    """``x + drop(axial_shift(norm1(x)))``, then ``x + drop(mlp(norm2(x)))``."""

    def __init__(self, dim: int, shift_size: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = channel_norm(dim)
        self.axial_shift = AxialShift(dim, shift_size)
        self.norm2 = channel_norm(dim)
        self.mlp = ChannelMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.axial_shift(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Halves height and width, doubles the channels. ``[B, C, H, W]`` with even H and W."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = channel_norm(4 * dim)
        self.reduction = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=1)))


class AsMlpStage(nn.Module):
    """Blocks of one width, and in all but the last stage the step down to the next one."""

    def __init__(
        self, dim: int, shift_size: int, mlp_ratio: float, drop_path: Sequence[float], downsample: bool
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(AsMlpBlock(dim, shift_size, mlp_ratio, rate) for rate in drop_path)
        self.downsample = PatchMerging(dim) if downsample else None

    def forward_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_blocks(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """The stem: patches of 4x4 pixels to vectors, and a norm."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, PATCH, stride=PATCH)
        self.norm = channel_norm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class AsMlp(nn.Module):
    """An AS-MLP backbone with a linear classifier.

    Args:
        embed_dim: channels of the first stage; every further stage has twice as many.
        depths: blocks of each stage.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        shift_size, mlp_ratio: of the blocks.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        global_pool: "avg", or "" for feature maps ``[B, C, H/32, W/32]``, which takes ``num_classes=0``.

    Images are ``[B, in_chans, H, W]`` with H and W multiples of 32 (with four stages).
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        shift_size: int = 5,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"AsMlp: {name} must be in [0, 1), got {rate}")
        if shift_size < 1:
            raise ValueError(f"AsMlp: shift_size must be at least 1, got {shift_size}")
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        count = sum(depths)
        rates = [drop_path_rate * index / max(count - 1, 1) for index in range(count)]
        starts = [sum(depths[:stage]) for stage in range(len(depths))]
        self.layers = nn.ModuleList(
            AsMlpStage(dim, shift_size, mlp_ratio, rates[start : start + depth], downsample=dim != dims[-1])
            for dim, depth, start in zip(dims, depths, starts, strict=True)
        )
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm = channel_norm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.feature_info = [
            {"num_chs": dim, "reduction": PATCH * 2**stage, "module": f"layers.{stage}"}
            for stage, dim in enumerate(dims)
        ]
        self.apply(_init_weights)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of ``num_classes`` outputs (0: none), and another pooling unless None.

        Raises:
            ValueError: a pooling that is neither "avg" nor "", or a classifier without pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise ValueError(f'AsMlp: global_pool must be "avg" or "", got {pool!r}')
        if pool == "" and num_classes > 0:
            raise ValueError(f"AsMlp: without pooling there is no classifier; got num_classes={num_classes}, not 0")
        self.num_classes, self.global_pool = num_classes, pool
        like = self.patch_embed.proj.weight
        self.head = nn.Linear(self.num_features, num_classes, device=like.device) if num_classes > 0 else nn.Identity()
        _init_weights(self.head)  # in float32: drawn in 16 bits, a truncated normal has outliers at its bounds
        self.head.to(like.dtype)

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay besides norms and biases: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter names to depths, for timm's layer-wise learning rates; ``coarse`` has one depth a stage."""
        blocks = [
            (r"^layers\.(\d+)\.downsample", (99999,)),  # timm's mark for "with what is in front of it"
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping what is inside it."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to normalised features ``[B, num_features, H/32, W/32]``."""
        self._check_image(x)
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits ``[B, num_classes]``; with ``pre_logits`` to what the classifier would see."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Iterable[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages, each before its downsampling: strides 4, 8, 16 and 32.

        Args:
            x: ``[B, in_chans, H, W]``.
            indices: stages, negative ones from the end; a number for that many last ones; None for all.
            norm: apply the final norm to the last stage's map as well.
            stop_early: do not compute stages behind the last one asked for; the features returned are then that
                stage's.
            output_fmt: "NCHW" only.
            intermediates_only: leave the final features out.

        Returns:
            The final features, as of :meth:`forward_features`, and the maps; or the maps alone.

        Raises:
            ValueError: an index that is no stage, or another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'AsMlp: output_fmt must be "NCHW", got {output_fmt!r}')
        taken = self._stage_indices(indices)
        self._check_image(x)
        x = self.patch_embed(x)
        maps = []
        last = len(self.layers) - 1
        for index, stage in enumerate(self.layers):
            if stop_early and index > max(taken, default=-1):
                break
            x = stage.forward_blocks(x)
            if index in taken:
                maps.append(self.norm(x) if norm and index == last else x)
            x = self.norm(x) if index == last else x
            if stage.downsample is not None and not (stop_early and index == max(taken, default=-1)):
                x = stage.downsample(x)
        return maps if intermediates_only else (x, maps)

    def _stage_indices(self, indices: int | Iterable[int] | None) -> set[int]:
        count = len(self.layers)
        if indices is None:
            return set(range(count))
        if isinstance(indices, int):
            if not 0 <= indices <= count:
                raise ValueError(f"AsMlp: indices must be at most {count}, the number of stages, got {indices}")
            return set(range(count - indices, count))
        indices = list(indices)
        for index in indices:
            if not -count <= index < count:
                raise ValueError(f"AsMlp: there are stages 0 to {count - 1}, got index {index}")
        return {index % count for index in indices}

    def _check_image(self, x: Tensor) -> None:
        multiple = PATCH * 2 ** (len(self.layers) - 1)
        if x.dim() != 4 or x.shape[2] % multiple != 0 or x.shape[3] % multiple != 0:
            raise ValueError(
                f"AsMlp: images must be [batch, channels, height, width] with sides in multiples of {multiple} (every "
                f"stage halves them), got {list(x.shape)}"
            )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def as_mlp_tiny(num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float | None = None, **kwargs) -> AsMlp:
    """AS-MLP-T, 28.3 M parameters, freshly initialised.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth; None for the paper's, here 0.2.
        **kwargs: further arguments of :class:`AsMlp`.
    """
    return _as_mlp(96, (2, 2, 6, 2), 0.2 if drop_path_rate is None else drop_path_rate, num_classes, in_chans, kwargs)


def as_mlp_small(num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float | None = None, **kwargs) -> AsMlp:
    """AS-MLP-S, 49.6 M parameters; arguments as of :func:`as_mlp_tiny`, the paper's drop_path_rate is 0.3."""
    return _as_mlp(96, (2, 2, 18, 2), 0.3 if drop_path_rate is None else drop_path_rate, num_classes, in_chans, kwargs)


def as_mlp_base(num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float | None = None, **kwargs) -> AsMlp:
    """AS-MLP-B, 87.8 M parameters; arguments as of :func:`as_mlp_tiny`, the paper's drop_path_rate is 0.5."""
    return _as_mlp(128, (2, 2, 18, 2), 0.5 if drop_path_rate is None else drop_path_rate, num_classes, in_chans, kwargs)


def _as_mlp(
    embed_dim: int, depths: Sequence[int], drop_path_rate: float, num_classes: int, in_chans: int, kwargs: dict
) -> AsMlp:
    return AsMlp(embed_dim, depths, num_classes, in_chans, drop_path_rate=drop_path_rate, **kwargs)
