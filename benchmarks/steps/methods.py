"""The methods: each takes a plain timm model and its places and makes it the model that is trained, in place."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import alore_ext as ae

from .places import Places

NUM_EXPERTS, RANK = 4, 4  # ALoRE
MLAE_EXPERTS, MASK_P = 8, 0.5


class PlainAlore(nn.Module):
    """A layer with ALoRE behind it, in plain PyTorch. The scale matrices are the whole model's."""

    def __init__(self, layer: nn.Module, scale: nn.Parameter, width: int, channel_axis: int):
        super().__init__()
        n = scale.shape[0]
        self.layer, self.scale, self.channel_axis = layer, scale, channel_axis
        self.down = nn.Parameter(torch.randn(n, width // n, RANK, device=scale.device, dtype=scale.dtype) * 0.05)
        self.up = nn.Parameter(torch.zeros(n, RANK, width // n, device=scale.device, dtype=scale.dtype))

    def forward(self, x):
        return self.alore(self.layer(x).movedim(self.channel_axis, -1)).movedim(-1, self.channel_axis)


class EinsumAlore(PlainAlore):
    """By the factors, one after another: the form that one would write."""

    def alore(self, x):
        code = torch.einsum("...ak,ikr->...air", x.unflatten(-1, (self.scale.shape[0], -1)), self.down)
        mixed = torch.einsum("...air,iab->...bir", code, self.scale)
        return x + torch.einsum("...bir,irp->...bp", mixed, self.up).flatten(-2)


class BuiltAlore(PlainAlore):
    """By a dense W' [width, width], built once a step."""

    def alore(self, x):
        built = torch.einsum("iab,ikr,irp->akbp", self.scale, self.down, self.up)
        return x + x @ built.reshape(x.shape[-1], x.shape[-1])


class PlainMlae(nn.Module):
    """A linear or 1x1 convolution with MLAE's masked experts, in plain PyTorch."""

    def __init__(self, linear: nn.Module, channel_axis: int):
        super().__init__()
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        out_features, in_features = linear.weight.shape[:2]
        self.linear, self.channel_axis = linear, channel_axis
        self.lora_a = nn.Parameter(torch.randn(MLAE_EXPERTS, in_features, **like) * in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(out_features, MLAE_EXPERTS, **like))
        self.coeff = nn.Parameter(torch.ones(MLAE_EXPERTS, **like))

    def forward(self, x):
        coeff = F.dropout(self.coeff, MASK_P, self.training)
        rows = x.movedim(self.channel_axis, -1)
        update = F.linear(F.linear(rows, self.lora_a) * coeff, self.lora_b)
        return self.linear(x) + update.movedim(-1, self.channel_axis)


def freeze(model):
    """Nothing but the classifier trains."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    return model


def floor(model, places: Places):
    """The frozen backbone, with a backward pass through every block down to the first one's input."""
    leaf = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)

    def ask_for_gradient(_, args):
        if torch.compiler.is_compiling():
            # dynamo breaks the graph at requires_grad_; adding a scalar that trains costs nothing once it is fused.
            return (args[0] + leaf,)
        return (args[0].detach().requires_grad_(),)

    model.get_submodule(places.first_block).register_forward_pre_hook(ask_for_gradient)
    return freeze(model)


def plain_alore(kind: type[PlainAlore]):
    """ALoRE in plain PyTorch."""

    def build(model, places: Places):
        freeze(model)
        weight = model.get_classifier().weight
        scale = torch.randn(NUM_EXPERTS, NUM_EXPERTS, NUM_EXPERTS, device=weight.device, dtype=weight.dtype)
        model.alore_scale = nn.Parameter(scale / NUM_EXPERTS**0.5)
        for name, width in places.alore:
            model.set_submodule(name, kind(model.get_submodule(name), model.alore_scale, width, places.channel_axis))
        return model

    return build


def plain_mlae(model, places: Places):
    """MLAE in plain PyTorch."""
    freeze(model)
    for name in places.mlae:
        model.set_submodule(name, PlainMlae(model.get_submodule(name), places.channel_axis))
    return model


def peft(config_name: str, targets: str, **options):
    """PEFT with its adapters in the model's own dtype: upcast ones, its default, are slower."""

    def build(model, places: Places):
        import peft as library

        names = rf".*\.({'|'.join(getattr(places, targets))})"
        config = getattr(library, config_name)(target_modules=names, modules_to_save=[places.head], **options)
        return library.get_peft_model(model, config, autocast_adapter_dtype=False)

    return build


@dataclass(frozen=True)
class Method:
    """`kind` groups the methods in the plot. `build(model, places)` returns the model to train."""

    kind: str
    build: Callable


OURS = "this library"
METHODS = {
    "floor": Method("floor", floor),
    "full": Method("full fine-tuning", lambda model, places: model.requires_grad_(True)),
    "alore": Method(OURS, lambda model, places: ae.patch(model, ae.AloreConfig(num_experts=NUM_EXPERTS, rank=RANK))),
    "alore_einsum": Method("plain PyTorch", plain_alore(EinsumAlore)),
    "alore_built": Method("plain PyTorch", plain_alore(BuiltAlore)),
    "mlae": Method(
        OURS, lambda model, places: ae.patch(model, ae.MlaeConfig(num_experts=MLAE_EXPERTS, dropout=MASK_P))
    ),
    "mlae_torch": Method("plain PyTorch", plain_mlae),
    "peft_lora": Method("PEFT", peft("LoraConfig", "lora", r=8)),
    "peft_lokr": Method("PEFT", peft("LoKrConfig", "lokr", r=4)),
}
