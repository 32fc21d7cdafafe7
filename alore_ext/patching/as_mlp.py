"""AS-MLP of `alore_ext.models.as_mlp`: axial shifts between 1x1 convolutions, NCHW throughout.

    location      layer                  folds into
    before_attn   norm1                  axial_shift.conv1
    after_attn    axial_shift.conv3      itself
    before_ffn    norm2                  mlp.fc1
    after_ffn     mlp.fc2                itself

The roles of MLAE follow: "qkv" is conv1, "proj" is conv3.
"""

from __future__ import annotations

from torch import nn

from .known_blocks import CONV, Branch, KnownBlock, find_known_structure
from .registry import Structure, register_family

_MODELS = "alore_ext.models.as_mlp"
_KNOWN = (
    KnownBlock(
        runs=f"{_MODELS}.AsMlpBlock",
        parts={
            "axial_shift": (f"{_MODELS}.AxialShift",),
            "axial_shift.conv1": (CONV,),
            "axial_shift.conv3": (CONV,),
            "mlp": (f"{_MODELS}.ChannelMlp",),
            "mlp.fc1": (CONV,),
            "mlp.fc2": (CONV,),
        },
        attn=Branch(norm="norm1", takes=("axial_shift.conv1",), gives="axial_shift.conv3"),
        ffn=Branch(norm="norm2", takes=("mlp.fc1",), gives="mlp.fc2"),
        channel_axis=1,
    ),
)


class AsMlpFamily:
    """See the module's text."""

    name = "as_mlp"
    default_locations = ("before_attn", "before_ffn")
    default_targets = ("qkv",)

    def find(self, model: nn.Module) -> Structure:
        """The blocks of all stages and their sites. Raises NotThisFamily."""
        return find_known_structure(model, self.name, _KNOWN)


register_family(AsMlpFamily())
