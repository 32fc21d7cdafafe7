"""A linear map of the backbone, by the parameters that hold it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LinearMap:
    """Where `y = x W^T + b` is stored: an nn.Linear, a 1x1 convolution, or the joint projection of an attention.

    Attributes:
        module: name of the module that owns the parameters.
        weight, bias: the parameters' own names. A module may have no bias.
    """

    module: str
    weight: str = "weight"
    bias: str = "bias"

    @property
    def weight_name(self) -> str:
        """The weight's full name."""
        return f"{self.module}.{self.weight}"

    @property
    def bias_name(self) -> str:
        """The bias's full name, whether there is one or not."""
        return f"{self.module}.{self.bias}"

    def weight_of(self, model: nn.Module) -> nn.Parameter:
        """The parameter itself: [out_features, in_features], a convolution's with two sizes of 1 behind."""
        return getattr(model.get_submodule(self.module), self.weight)

    def bias_of(self, model: nn.Module) -> nn.Parameter | None:
        """[out_features], or None."""
        # From the registered ones: an adapted layer's own `bias` may read as what the adapter makes of it.
        return model.get_submodule(self.module)._parameters.get(self.bias)

    def matrix_of(self, model: nn.Module) -> Tensor:
        """The weight as [out_features, in_features], sharing its memory."""
        weight = self.weight_of(model)
        return weight.view(weight.shape[:2])

    def in_features(self, model: nn.Module) -> int:
        """Size of the axis that the map acts on."""
        return self.weight_of(model).shape[1]

    def out_features(self, model: nn.Module) -> int:
        """Size of that axis in the result."""
        return self.weight_of(model).shape[0]
