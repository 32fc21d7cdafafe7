"""The table of supported models is true, and the pages made from it are those in docs/."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from zoo import ZOO

import alore_ext as ae
from alore_ext.models import as_mlp
from alore_ext.patching import registry
from alore_ext.patching.registry import find_structure
from alore_ext.patching.support import page

DOCS = Path(__file__).parents[2] / "docs"


def test_every_row_is_claimed_once():
    tested = [name for model in ae.supported_models() for name in model.tested]
    assert len(tested) == len(set(tested)) and set(ZOO) <= set(tested)


@pytest.mark.parametrize("name", ZOO)
def test_claims_are_what_the_model_offers(name):
    (claim,) = (model for model in ae.supported_models() if name in model.tested)
    structure = find_structure(ZOO[name].build())
    assert (claim.family, claim.library) == (structure.family, ZOO[name].library)
    for block in structure.blocks:
        assert (set(block.alore), set(block.mlae)) == (set(claim.locations), set(claim.targets)), block.name


def published(library: str, name: str) -> torch.nn.Module:
    """The model of this name in its full size, without values."""
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name)
        if library == "torchvision":
            return getattr(torchvision.models, name)()
        if library == "transformers":
            kind = getattr(transformers, name)
            return kind(kind.config_class())
        return getattr(as_mlp, name)()


@pytest.mark.parametrize(
    ("claim", "name"),
    [pytest.param(claim, name, id=name) for claim in ae.supported_models() for name in claim.examples],
)
def test_the_examples_are_real_models(claim, name):
    """Each name is built in its full size and takes every location and role that is claimed."""
    model = published(claim.library, name)
    for config in (ae.AloreConfig(locations=claim.locations), ae.LoraConfig(targets=claim.targets)):
        ae.patch(model, config)
        assert set(ae.trainable_summary(model).by_role) >= set(getattr(config, "locations", None) or config.targets)
        ae.unpatch(model)


def test_the_page_is_the_one_in_docs():
    assert (DOCS / "backbones.md").read_text() == page()


def test_the_example_of_a_new_family(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    text = (DOCS / "adding_a_family.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {"__name__": "example"})
    assert "residual_mlp" in registry._FAMILIES
