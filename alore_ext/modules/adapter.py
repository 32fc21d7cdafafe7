"""Turning a layer into its adapted self, and back, in place.

A layer is adapted by giving the very same object another class: a subclass of its own class with the
adapter's forward in front. Nothing else about it moves: identity, parameters, buffers, names, hooks and the
training flag stay, and `isinstance(layer, type_it_had)` stays true. Giving the old class back is all that
taking an adapter off means.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn


class Adapter(nn.Module):
    """First base of every adapted class.

    Subclasses name what they put on a layer, so that `detach` can take it off.
    """

    adapter_parameters: ClassVar[tuple[str, ...]] = ()
    adapter_attributes: ClassVar[tuple[str, ...]] = ()
    # The experts that run, where not all do (see `alore_ext.retain_experts`).
    _kept_experts: tuple[int, ...] | None = None
    # Set on the classes that `adapted_class` makes: the pair that names such a class to pickle.
    adapter_bases: ClassVar[tuple[type[Adapter], type[nn.Module]]]

    def __reduce_ex__(self, protocol):
        # An adapted class is made at run time, so pickle and deepcopy cannot find it by name: they get the
        # class that it began as and the adapters on it, first to last. Instances are made empty and filled
        # afterwards, since a layer and the model that it refers to form a cycle.
        adapters, base = [], type(self)
        while "adapter_bases" in vars(base):
            adapter, base = base.adapter_bases
            adapters.insert(0, adapter)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _new_adapted, (base, *adapters), state


@functools.cache
def adapted_class(adapter: type[Adapter], base: type[nn.Module]) -> type[Adapter]:
    """The subclass of `base` that runs `adapter`'s forward; the same class object for the same pair."""
    namespace = {
        "adapter_bases": (adapter, base),
        "__module__": adapter.__module__,
        "__doc__": adapter.__doc__,
    }
    return type(adapter.__name__, (adapter, base), namespace)


def _new_adapted(base: type[nn.Module], *adapters: type[Adapter]) -> Adapter:
    cls = functools.reduce(lambda cls, adapter: adapted_class(adapter, cls), adapters, base)
    return cls.__new__(cls)


def attach(
    module: nn.Module,
    adapter: type[Adapter],
    parameters: Mapping[str, nn.Parameter],
    attributes: Mapping[str, Any],
) -> None:
    """Make `module` an `adapter` of its own class, with these parameters and plain attributes.

    Attributes go around `nn.Module.__setattr__`: a reference to another module must not become a submodule.
    """
    module.__class__ = adapted_class(adapter, type(module))
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
    module.__dict__.update(attributes)


def detach(module: Adapter) -> dict[str, nn.Parameter]:
    """Undo `attach`: the class the module had, no adapter parameter, no attribute.

    Returns the parameters taken off.
    """
    adapter, base = module.adapter_bases
    taken = {name: module._parameters.pop(name) for name in adapter.adapter_parameters if name in module._parameters}
    for name in adapter.adapter_attributes:
        module.__dict__.pop(name, None)
    module.__class__ = base
    return taken
