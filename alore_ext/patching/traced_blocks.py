"""Pre-norm transformer blocks of whatever make, read from the data flow of their forward.

    location      layer              folds into
    before_attn   norm1              qkv (or q, k and v; a gate that reads norm1 as well)
    after_attn    attn.proj          itself
    before_ffn    norm2              fc1 (SwiGLU: fc1_g and fc1_x)
    after_ffn     mlp.fc2            itself

Layer scale and drop path stand after all four, so they change nothing.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from alore_ext.modules import FusedBiasAttention
from alore_ext.modules.adapter import adapted_class

from .dataflow import BlockFlow, Consumer, DataflowError
from .linear_map import LinearMap
from .registry import AloreSite, BlockSites, Host, MlaeSite

BLOCK_CHILDREN = ("norm1", "attn", "norm2", "mlp")
_PLACES = ("before_attn", "after_attn", "qkv", "proj", "before_ffn", "after_ffn", "fc1", "fc2")
_JOINT_BIAS = ["attn.q_bias", "attn.k_bias", "attn.v_bias"]


def is_block_list(module: nn.Module) -> bool:
    """Whether a module is a list of blocks with these children."""
    children = list(module.children())
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and bool(children)
        and all(set(BLOCK_CHILDREN) <= set(child._modules) for child in children)
    )


def traced_block_sites(name: str, block: nn.Module) -> BlockSites:
    """What a block offers, and why not where it does not."""
    norms = tuple(f"{name}.{child}" for child in BLOCK_CHILDREN if child.startswith("norm"))
    try:
        reader = _BlockReader(name, block)
    except DataflowError as reason:
        return BlockSites(name, norms=norms, refused=dict.fromkeys(_PLACES, f"{name} {reason}"))
    sites = BlockSites(name, norms=norms)
    for inner, norm, last, (before, after, role_in, role_out) in (
        ("attn", "norm1", "attn.proj", _PLACES[:4]),
        ("mlp", "norm2", "mlp.fc2", _PLACES[4:]),
    ):
        for place, table, find, arguments in (
            (before, sites.alore, reader.before, (inner, norm)),
            (after, sites.alore, reader.after, (last,)),
            (role_in, sites.mlae, reader.inputs, (inner, norm)),
            (role_out, sites.mlae, reader.output, (last,)),
        ):
            try:
                table[place] = find(*arguments)
            except DataflowError as reason:
                sites.refused[place] = f"{name} {reason}"
    return sites


class _BlockReader:
    """Finds the sites of one block.

    Every method raises DataflowError where the block has none that is exact.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name = name
        self.block = block
        self.flow = BlockFlow(block)

    def before(self, inner: str, norm: str) -> AloreSite:
        """The site at `norm`, where all that it feeds is linears that take nothing else."""
        value = self.flow.input_of(inner)
        if self.flow.producer(value) != norm:
            raise DataflowError(f"does not feed {norm} into its {inner}: only pre-norm blocks can be adapted there")
        if not self.flow.is_called_once(norm):
            raise DataflowError(f"calls its {norm} more than once")
        if others := self.flow.other_consumers(value):
            raise DataflowError(f"feeds its {norm} into {', '.join(others)}: no linear map can be merged into that")
        linears = tuple(dict.fromkeys(consumer.linear for consumer in self.flow.linear_consumers(value)))
        for linear in linears:
            if self.flow.weight_uses(linear) != 1:
                raise DataflowError(f"uses {linear} on more than the output of {norm}")
        widths = {self.block.get_submodule(linear).in_features for linear in linears}
        if len(widths) != 1:
            raise DataflowError(f"feeds its {norm} into no linear, or into linears of several widths {sorted(widths)}")
        return AloreSite(self._full(norm), "before", tuple(map(self._map, linears)), widths.pop())

    def after(self, last: str) -> AloreSite:
        """The site at the linear `last`."""
        return AloreSite(self._full(last), "after", (self._map(last),), self._called_linear(last).out_features)

    def inputs(self, inner: str, norm: str) -> tuple[MlaeSite, ...]:
        """The linears inside `inner` that take its input: qkv, or q, k and v; fc1, or SwiGLU's two."""
        value = self.flow.input_of(inner)
        consumers = [
            consumer
            for consumer in self.flow.linear_consumers(value)
            # The gate of a gated attention takes that input as well, but it is none of q, k and v.
            if consumer.linear.startswith(f"{inner}.") and consumer.linear != "attn.gate"
        ]
        if not consumers:
            raise DataflowError(f"has no linear that takes the input of its {inner}")
        sites = tuple(map(self._input_site, consumers))
        if len(sites) == 1 and self.flow.producer(value) == norm and self.flow.is_called_once(norm):
            sites = (replace(sites[0], norm=self._full(norm)),)
        return sites

    def output(self, last: str) -> tuple[MlaeSite, ...]:
        """The linear `last`."""
        self._called_linear(last)
        return (MlaeSite(self._map(last)),)

    def _called_linear(self, name: str) -> nn.Linear:
        try:
            linear = self.block.get_submodule(name)
        except AttributeError:
            raise DataflowError(f"has nothing at {name}: expected an nn.Linear") from None
        if not isinstance(linear, nn.Linear):
            raise DataflowError(f"has a {type(linear).__name__} at {name}: expected an nn.Linear")
        if not self.flow.is_called_once(name) or self.flow.weight_uses(name) != 1:
            raise DataflowError(f"does not call {name} exactly once")
        return linear

    def _input_site(self, consumer: Consumer) -> MlaeSite:
        linear = consumer.linear
        if self.flow.weight_uses(linear) != 1:
            raise DataflowError(f"uses {linear} more than once")
        if not consumer.functional:
            return MlaeSite(self._map(linear))
        is_joint = linear == "attn.qkv" and self.flow.joint_bias_parts(consumer) == _JOINT_BIAS
        if not is_joint or not _calls_qkv_without_q_bias(self.block):
            raise DataflowError(f"goes around {linear}: it reads the weight in a way that no adapter can follow")
        return MlaeSite(self._map(linear), host=Host(self._full("attn"), FusedBiasAttention))

    def _full(self, name: str) -> str:
        return f"{self.name}.{name}"

    def _map(self, name: str) -> LinearMap:
        return LinearMap(self._full(name))


def _calls_qkv_without_q_bias(block: nn.Module) -> bool:
    """Whether the block, tried on a copy, calls `attn.qkv` once its attention is a FusedBiasAttention."""
    attention = copy.copy(block.attn)
    attention.__class__ = adapted_class(FusedBiasAttention, type(attention))
    trial = copy.copy(block)
    trial._modules = {**block._modules, "attn": attention}
    try:
        flow = BlockFlow(trial)
        consumers = flow.linear_consumers(flow.input_of("attn"))
    except DataflowError:
        return False
    return [c.functional for c in consumers if c.linear == "attn.qkv"] == [False]
