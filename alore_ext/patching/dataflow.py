"""What a transformer block really does with its layers, read from a symbolic trace of its forward.

Attribute names say what a block has; only its forward says what it does with them. Post-norm blocks have the
same `norm1`, `attn`, `norm2`, `mlp` as pre-norm ones, and some attentions read `qkv.weight` instead of
calling `qkv`. An adapter placed by names alone would be wrong in the first and bypassed in the second, so
patching looks here.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps

import torch.nn.functional as F
from torch import fx, nn
from torch.fx import _symbolic_trace

_ROOT = "block"
_METADATA_ATTRIBUTES = ("shape", "dtype", "device", "ndim")
_METADATA_METHODS = ("size", "dim")

# torch.fx traces by replacing nn.Module's __call__ and __getattr__, the functions of `math` and those marked by
# fx.wrap, for the whole process, and puts back what it found: one trace at a time. Other threads' calls of modules
# meanwhile go past the tracer. What remains for them:
# - The functions above are wrappers, which call the original unless an argument is a proxy. A compiled forward that
#   calls one and runs at that moment sees another function, and is compiled once more after the trace.
# - Where fx's flag of a trace is the process's (torch 2.11), it is up until `create_args_for_root`, for the time of a
#   walk over the block's modules, and a compiled function called then raises.
# - Traces by others (torch.export has one inside) are excluded only where their caller takes this lock.
TRACING = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """No other trace, and no compilation.

    Dynamo, in any thread, takes the replacements of a trace away while it compiles and puts them back after, for good
    if the trace has ended.
    """
    with TRACING:  # before the other, as in a caller that compiles under it
        dynamo = sys.modules.get("torch._dynamo.convert_frame")  # where nothing loaded it, nothing is being compiled
        with getattr(dynamo, "compile_lock", nullcontext()):
            yield


class DataflowError(Exception):
    """A block whose forward cannot be traced, or that lacks what was asked for.

    The text completes "block X ...".
    """


@dataclass(frozen=True)
class Consumer:
    """A linear that takes a value: `functional` when the forward goes around the module, through F.linear."""

    linear: str
    functional: bool
    node: fx.Node


class BlockFlow:
    """The data flow of one block. Names are relative to the block: "norm1", "attn.qkv"."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        with _alone():
            tracer = _BlockTracer()  # looks the functions of `math` up
            try:
                self._graph = tracer.trace(_Probe(block))
            except Exception as error:  # whatever a foreign forward does with symbolic values
                raise DataflowError(f"has a forward that cannot be traced ({type(error).__name__}: {error})") from error
        self._inputs = tracer.container_inputs

    def input_of(self, module: str) -> fx.Node:
        """The value that a module of the block takes as its first argument."""
        nodes = self._inputs.get(module) or [node.args[0] for node in self._calls(module) if node.args]
        if not nodes:
            raise DataflowError(f"never calls its {module}")
        if len(set(nodes)) > 1 or not isinstance(nodes[0], fx.Node):
            raise DataflowError(f"calls its {module} on more than one input")
        return nodes[0]

    def producer(self, value: fx.Node) -> str | None:
        """The module whose output `value` is; None for an input of the block or the result of a function."""
        return _relative(value.target) if value.op == "call_module" else None

    def called(self, module: str) -> bool:
        """Whether the forward calls this module (and does not only read its weight)."""
        return bool(self._calls(module))

    def is_called_once(self, module: str) -> bool:
        """Whether the forward calls this module exactly once."""
        return len(self._calls(module)) == 1

    def linear_consumers(self, value: fx.Node) -> list[Consumer]:
        """The linears among the users of `value`, in the order of their use."""
        return [user for user in self._users(value) if isinstance(user, Consumer)]

    def other_consumers(self, value: fx.Node) -> list[str]:
        """Every user of `value` that is not a linear, in words. Reading its shape or dtype is not a use."""
        return [user for user in self._users(value) if isinstance(user, str)]

    def weight_uses(self, linear: str) -> int:
        """How often the forward uses this linear's weight, by calling the module or reading the weight."""
        reads = [
            node for node in self._graph.nodes if node.op == "get_attr" and node.target == f"{_ROOT}.{linear}.weight"
        ]
        return len(self._calls(linear)) + sum(len(node.users) for node in reads)

    def joint_bias_parts(self, consumer: Consumer) -> list[str] | None:
        """The attributes that a functional consumer concatenates into its bias; None for any other bias."""
        bias = _argument(consumer.node, 2, "bias")
        if not (isinstance(bias, fx.Node) and getattr(bias.target, "__name__", "") in ("cat", "concat")):
            return None
        parts = bias.args[0] if bias.args else bias.kwargs.get("tensors")
        if not all(isinstance(part, fx.Node) and part.op == "get_attr" for part in parts):
            return None
        return [_relative(part.target) for part in parts]

    def _calls(self, module: str) -> list[fx.Node]:
        return [n for n in self._graph.nodes if n.op == "call_module" and n.target == f"{_ROOT}.{module}"]

    def _users(self, value: fx.Node) -> list[Consumer | str]:
        return [use for node in value.users if (use := self._use(value, node)) is not None]

    def _use(self, value: fx.Node, node: fx.Node) -> Consumer | str | None:
        if node.op == "call_module":
            name = _relative(node.target)
            module = self._block.get_submodule(name)
            if isinstance(module, nn.Linear):
                return Consumer(name, False, node)
            return f"{type(module).__name__} {name}"
        if node.op == "call_function" and node.target is F.linear and _argument(node, 0, "input") is value:
            weight = _argument(node, 1, "weight")
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                name, _, attribute = _relative(weight.target).rpartition(".")
                if attribute == "weight" and name and isinstance(self._block.get_submodule(name), nn.Linear):
                    return Consumer(name, True, node)
            return "F.linear with a weight that belongs to no nn.Linear"
        if node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA_ATTRIBUTES:
            return None
        if node.op == "call_method" and node.target in _METADATA_METHODS:
            return None
        if node.op == "output":
            return "the block's output"
        if node.target in (operator.add, operator.iadd):
            return "an addition"
        return getattr(node.target, "__name__", str(node.target))


class _Probe(nn.Module):
    """Calls the block with its first argument alone: all others take their defaults."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


class _BlockTracer(fx.Tracer):
    """Looks inside what contains linears, and no deeper.

    Hooks on the containers do not run: they are the user's. Modules called by other threads are none of its business.
    """

    def __init__(self) -> None:
        super().__init__()
        self.container_inputs: dict[str, list] = {}
        self._flag = _FlagOfThread()
        self._untraced = (nn.Module.__call__, nn.Module.__getattr__)

    def trace(self, root, concrete_args=None):
        try:
            return super().trace(root, concrete_args)
        finally:
            self._flag.thread = None

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        if getattr(_symbolic_trace, "_is_fx_tracing_flag", False):  # later versions have one for each thread
            _symbolic_trace._is_fx_tracing_flag = self._flag
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)

        @wraps(function)
        def run(*args):
            self._release_other_threads()
            return function(*args)

        return run, args

    def _release_other_threads(self) -> None:
        """Put a choice by thread over fx's methods of nn.Module; fx takes it away with its own.

        Before `call_module`, fx's __call__ wraps what the called module's file imported from `math`. From another
        thread that may come after fx has put everything back, and stay.
        """
        for name, untraced in zip(("__call__", "__getattr__"), self._untraced, strict=True):
            setattr(nn.Module, name, _by_thread(self._flag, getattr(nn.Module, name), untraced))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear) or not any(isinstance(child, nn.Linear) for child in m.modules())

    def call_module(self, m, forward, args, kwargs):
        if not self._flag:  # called before `_release_other_threads`
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return self.create_proxy("call_module", name, args, kwargs)
        if args and isinstance(args[0], fx.Proxy):
            self.container_inputs.setdefault(_relative(name), []).append(args[0].node)
        return m.forward(*args, **kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if not self._flag:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _FlagOfThread:
    """True in the thread that made it, and nowhere once `thread` is None.

    In the place of fx's flag, since some of torch puts that down and back in any thread, perhaps after the trace.
    """

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread


def _by_thread(flag: _FlagOfThread, traced, untraced):
    @wraps(untraced)
    def method(self, *args, **kwargs):
        return (traced if flag else untraced)(self, *args, **kwargs)

    return method


def _relative(name: str) -> str:
    return name.removeprefix(_ROOT).removeprefix(".")


def _argument(node: fx.Node, position: int, name: str):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
