"""Blocks that are known by the code that they run.

A table entry names a class of some library, and says of its forward which norm feeds which linears. It holds for every
block that runs that very forward: the class itself and subclasses that keep it. A block with the same children and
another forward is not what the table speaks of, and is not recognised. The libraries are never imported: classes are
compared by name, so an entry costs nothing where its library is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from alore_ext.modules.adapter import Adapter

from .linear_map import LinearMap
from .registry import AloreSite, BlockSites, Host, MlaeSite, NotThisFamily, Structure

LINEAR = "torch.nn.modules.linear.Linear"
CONV = "torch.nn.modules.conv.Conv2d"
SEQUENTIAL = "torch.nn.modules.container.Sequential"

FindHost = Callable[[nn.Module], type[Adapter] | None]


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block: linears that take a value, and the linear that gives the result.

    Names are relative to the block.

    Attributes:
        takes: the linears that consume the branch's input, and nothing else.
        gives: the last linear.
        norm: the norm whose output they consume, and nothing else does; None in post-norm blocks.
        norm_behind: in post-norm blocks, the norm that takes what the branch gives.
        inlet: the module whose input they consume. In a pre-norm block it is named only where zeros are padded in
            between the norm and the inlet.
        host: the module that may go around `takes` and `gives`.
        host_of_takes, host_of_gives: give the class under which the host calls them, or None where it calls them as
            it is.
        takes_adapter: the class that the owner of `takes` becomes for MLAE, where they are no module of their own.
        bias_refused: why a bias of `takes` does not always reach the result; None where it does.
    """

    takes: tuple[str | LinearMap, ...]
    gives: str
    norm: str | None = None
    norm_behind: str | None = None
    inlet: str | None = None
    host: str | None = None
    host_of_takes: FindHost = lambda host: None
    host_of_gives: FindHost = lambda host: None
    takes_adapter: type[Adapter] | None = None
    bias_refused: str | None = None


@dataclass(frozen=True)
class KnownBlock:
    """A class of block.

    Attributes:
        runs: full name of the class, whose `methods` the block must run.
        methods: the methods that decide what feeds what.
        parts: for children, the classes whose forward they may run.
        attn, ffn: the two branches; None where there is no such branch, and `refused` says why.
        channel_axis: 1 for NCHW.
        refused: for places that the block lacks, why.
    """

    runs: str
    ffn: Branch
    attn: Branch | None = None
    methods: tuple[str, ...] = ("forward",)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    channel_axis: int = -1
    refused: Mapping[str, str] = field(default_factory=dict)


def find_known_structure(model: nn.Module, family: str, table: Iterable[KnownBlock]) -> Structure:
    """The model's blocks and their sites, by the table.

    Raises NotThisFamily where no module runs an entry's code.
    """
    table = tuple(table)
    blocks = list(_find_blocks(model, table))
    if not blocks:
        looked_for = ", ".join(dict.fromkeys(known.runs.rpartition(".")[2] for known in table))
        raise NotThisFamily(f"expected blocks that run the forward of {looked_for}, found none")
    sites = tuple(known_block_sites(name, block, known) for name, block, known in blocks)
    return Structure(family, _backbone_name(model, blocks[0][0], table), sites)


def _find_blocks(model: nn.Module, table: tuple[KnownBlock, ...]) -> Iterator[tuple[str, nn.Module, KnownBlock]]:
    for name, module in model.named_modules():
        if known := next((known for known in table if is_block(module, known)), None):
            yield name, module, known


def _backbone_name(model: nn.Module, block: str, table: tuple[KnownBlock, ...]) -> str:
    """The outermost module around a block that comes from the libraries of the table; all else is the user's."""
    libraries = tuple({known.runs.partition(".")[0] + "." for known in table})
    path = block.split(".")
    for depth in range(len(path)):
        name = ".".join(path[:depth])
        if any(cls.__module__.startswith(libraries) for cls in type(model.get_submodule(name)).__mro__):
            return name
    return block.rpartition(".")[0]


def is_block(module: nn.Module, known: KnownBlock) -> bool:
    """Whether the module and its parts run the code that the entry speaks of."""
    return (
        runs(module, known.runs, known.methods)
        and all(any(runs(_descendant(module, name), part) for part in parts) for name, parts in known.parts.items())
        and all(_has_linears(module, branch) for branch in (known.attn, known.ffn) if branch is not None)
    )


def _has_linears(module: nn.Module, branch: Branch) -> bool:
    """Whether the layers of a branch are there: another version of the library may call them something else."""
    names = [linear if isinstance(linear, str) else linear.module for linear in (*branch.takes, branch.gives)]
    return all(_descendant(module, name) is not None for name in names)


def runs(module: nn.Module | None, cls: str, methods: Iterable[str] = ("forward",)) -> bool:
    """Whether these methods of the module are those of the class of this full name."""
    for method in methods:
        code = getattr(type(module), method, None)
        found = f"{getattr(code, '__module__', '')}.{getattr(code, '__qualname__', '')}"
        if found != f"{cls}.{method}" or method in getattr(module, "__dict__", ()):
            return False
    return True


def known_block_sites(name: str, block: nn.Module, known: KnownBlock) -> BlockSites:
    """What a block offers, by its entry."""
    prefix = f"{name}." if name else ""
    branches = [branch for branch in (known.attn, known.ffn) if branch is not None]
    norms = tuple(prefix + norm for branch in branches if (norm := branch.norm or branch.norm_behind))
    refused = {place: f"{name}: {reason}" for place, reason in known.refused.items()}
    sites = BlockSites(name, norms=norms, refused=refused)
    for branch, (before, after, role_in, role_out) in (
        (known.attn, ("before_attn", "after_attn", "qkv", "proj")),
        (known.ffn, ("before_ffn", "after_ffn", "fc1", "fc2")),
    ):
        if branch is None:
            continue
        place = _Placement(name, block, branch, known.channel_axis)
        sites.alore[before], sites.alore[after] = place.before(), place.after()
        sites.mlae[role_in] = place.takes()
        sites.mlae[role_out] = place.gives()
    return sites


class _Placement:
    """The sites of one branch, with full names."""

    def __init__(self, name: str, block: nn.Module, branch: Branch, channel_axis: int) -> None:
        self.block = block
        self.branch = branch
        self.axis = channel_axis
        self.prefix = f"{name}." if name else ""

    def before(self) -> AloreSite:
        if self.branch.norm is None:
            return self._inlet()
        behind_padding = None if self.branch.inlet is None else self._inlet()
        return self._before(self.branch.norm, "output", None, behind_padding)

    def _inlet(self) -> AloreSite:
        inlet = self.branch.inlet
        host = self._host(self.branch.host_of_takes) if inlet in self.branch.takes else None
        return self._before(inlet, "input", host, None)

    def _before(self, module: str, end: str, host: Host | None, behind_padding: AloreSite | None) -> AloreSite:
        width = self._relative(self.branch.takes[0]).in_features(self.block)
        linears = tuple(map(self._map, self.branch.takes))
        refused = self.branch.bias_refused
        return AloreSite(self._full(module), "before", linears, width, end, self.axis, host, behind_padding, refused)

    def after(self) -> AloreSite:
        linear = self._map(self.branch.gives)
        width = self._relative(self.branch.gives).out_features(self.block)
        host = self._host(self.branch.host_of_gives)
        return AloreSite(linear.module, "after", (linear,), width, "output", self.axis, host)

    def takes(self) -> tuple[MlaeSite, ...]:
        host = self._host(self.branch.host_of_takes)
        return tuple(MlaeSite(self._map(n), self.axis, host, self.branch.takes_adapter) for n in self.branch.takes)

    def gives(self) -> tuple[MlaeSite, ...]:
        return (MlaeSite(self._map(self.branch.gives), self.axis, self._host(self.branch.host_of_gives)),)

    def _host(self, find: FindHost) -> Host | None:
        if self.branch.host is None or (adapter := find(self.block.get_submodule(self.branch.host))) is None:
            return None
        return Host(self._full(self.branch.host), adapter)

    def _full(self, name: str) -> str:
        return self.prefix + name

    def _relative(self, linear: str | LinearMap) -> LinearMap:
        return LinearMap(linear) if isinstance(linear, str) else linear

    def _map(self, linear: str | LinearMap) -> LinearMap:
        linear = self._relative(linear)
        return LinearMap(self._full(linear.module), linear.weight, linear.bias)


def _descendant(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
