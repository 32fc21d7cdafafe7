"""The methods: for each kind of config, how it becomes records of adapters on a model.

A method is a config (see `alore_ext.config`), layer classes (`alore_ext.modules`), and one file here with its record
and a function that places it. Everything after that, from validation to merging and files, is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from alore_ext.config import (
    AloreConfig,
    BitFitConfig,
    Config,
    LoraConfig,
    MlaeConfig,
    RepAdapterConfig,
    SsfConfig,
)

from ..records import AdapterRecord
from ..registry import Structure
from .affine import rep_adapter_records
from .alore import alore_records
from .bitfit import bitfit_records
from .lora import lora_records
from .mlae import mlae_records
from .ssf import ssf_records

MakeRecords = Callable[[nn.Module, Structure, Config, int], list[AdapterRecord]]

METHODS: dict[type[Config], MakeRecords] = {
    AloreConfig: alore_records,
    MlaeConfig: mlae_records,
    RepAdapterConfig: rep_adapter_records,
    LoraConfig: lora_records,
    SsfConfig: ssf_records,
    BitFitConfig: bitfit_records,
}
