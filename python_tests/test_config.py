"""Configs refuse at once what no model could use, naming the field; JSON gives them back."""

import dataclasses

import pytest

from alore_ext.config import (
    AloreConfig,
    BitFitConfig,
    LoraConfig,
    MlaeConfig,
    RepAdapterConfig,
    SsfConfig,
    config_from_json,
)

GOOD = [
    AloreConfig(),
    AloreConfig(8, 2, 0.1, ("after_ffn", "before_ffn"), range(3), share_scale=False),
    MlaeConfig(),
    MlaeConfig(4, 2, 0.3, 0.25, ("qkv", "fc1"), [0, 5], "mixed", "random"),
    MlaeConfig(masking="fixed", pattern="hourglass"),
    MlaeConfig(masking="stochastic", pattern="incremental"),
    MlaeConfig(masking="none"),
    MlaeConfig(num_experts=6, masking="fixed", pattern=(8, 8, 4)),
    MlaeConfig(masking="mixed", pattern=[1, 2]),
    MlaeConfig(masking="stochastic", pattern=(0.5, 0, 0.25)),
    AloreConfig(structure="stacked_nonlinear"),
    RepAdapterConfig(),
    RepAdapterConfig(6, 3, 0.1, 0.1, ("before_attn",), (1,)),
    LoraConfig(),
    LoraConfig(4, 8, ["fc1", "qkv"], range(2)),
    LoraConfig(2, -0.5, modules=["b.q_proj", "a.q_proj", "b.q_proj"]),
    SsfConfig(),
    SsfConfig(("proj",), norms=False, layers=[1]),
    BitFitConfig(),
    BitFitConfig([2], norms=False),
]


@pytest.mark.parametrize("config", GOOD, ids=repr)
def test_json_round_trip(config):
    assert config_from_json(config.to_json()) == config
    assert type(config).from_json(config.to_json()) == config
    assert f'"method": "{config.method}"' in config.to_json()


def test_frozen_and_normalised():
    config = AloreConfig(locations=["after_ffn", "before_attn"], layers=iter([2, 0, 2]))
    assert config.locations == ("before_attn", "after_ffn")
    assert config.layers == (0, 2)
    assert hash(config) == hash(AloreConfig(locations=("before_attn", "after_ffn"), layers={0, 2}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3


def test_scaling_of_lora():
    assert (LoraConfig(4).scaling, LoraConfig(4, 8).scaling, LoraConfig(4, 1).scaling) == (1.0, 2.0, 0.25)


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    config = AloreConfig(num_experts=numpy.int64(2), layers=numpy.arange(2))
    assert type(config.num_experts) is int and config.layers == (0, 1)
    assert config_from_json(config.to_json()) == config


BAD = [
    (AloreConfig, dict(num_experts=0), ValueError, "num_experts must be an int >= 1, got 0"),
    (AloreConfig, dict(num_experts=2.0), TypeError, "num_experts"),
    (AloreConfig, dict(num_experts=True), TypeError, "num_experts"),
    (AloreConfig, dict(rank=-1), ValueError, "rank must be an int >= 1, got -1"),
    (AloreConfig, dict(rank="4"), TypeError, "rank"),
    (AloreConfig, dict(dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    (AloreConfig, dict(dropout=-0.1), ValueError, "dropout"),
    (AloreConfig, dict(dropout=float("nan")), ValueError, "dropout"),
    (AloreConfig, dict(dropout="0.1"), TypeError, "dropout"),
    (AloreConfig, dict(locations=("middle",)), ValueError, "locations must be .* got 'middle'"),
    (AloreConfig, dict(locations="before_attn"), TypeError, "locations"),
    (AloreConfig, dict(locations=()), ValueError, "locations"),
    (AloreConfig, dict(locations=(1,)), TypeError, "locations"),
    (AloreConfig, dict(layers=(-1,)), ValueError, "layers must be .* got -1"),
    (AloreConfig, dict(layers=()), ValueError, "layers"),
    (AloreConfig, dict(layers=3), TypeError, "layers"),
    (AloreConfig, dict(layers=(1.5,)), TypeError, "layers"),
    (AloreConfig, dict(layers="01"), TypeError, "layers"),
    (AloreConfig, dict(share_scale=1), TypeError, "share_scale"),
    (AloreConfig, dict(structure="stacked"), ValueError, "structure must be one of .* got 'stacked'"),
    (AloreConfig, dict(structure=None), TypeError, "structure"),
    (RepAdapterConfig, dict(rank=8, groups=3), ValueError, "groups must be a divisor of rank, 8, got 3"),
    (RepAdapterConfig, dict(scale=0), ValueError, "scale"),
    (RepAdapterConfig, dict(scale=float("inf")), ValueError, "scale"),
    (MlaeConfig, dict(masking="fixed", pattern=(8, 0)), ValueError, "pattern must be .* an int >= 1 for each block"),
    (MlaeConfig, dict(masking="fixed", pattern=(8, 2.0)), TypeError, "pattern"),
    (MlaeConfig, dict(masking="mixed", pattern=(True,)), TypeError, "pattern"),
    (MlaeConfig, dict(masking="fixed", pattern=()), ValueError, "pattern"),
    (MlaeConfig, dict(pattern=(0.5, 1.0)), ValueError, r"pattern must be .* a probability in \[0, 1\)"),
    (MlaeConfig, dict(pattern=(float("nan"),)), ValueError, "pattern"),
    (MlaeConfig, dict(pattern=("0.5",)), TypeError, "pattern"),
    (MlaeConfig, dict(pattern=3), TypeError, "pattern"),
    (MlaeConfig, dict(masking="none", pattern=(1, 2)), TypeError, "pattern"),
    (MlaeConfig, dict(num_experts=0), ValueError, "num_experts"),
    (MlaeConfig, dict(expert_rank=0), ValueError, "expert_rank"),
    (MlaeConfig, dict(dropout=1), ValueError, "dropout"),
    (MlaeConfig, dict(coeff_init=0.0), ValueError, "coeff_init"),
    (MlaeConfig, dict(coeff_init=float("nan")), ValueError, "coeff_init"),
    (MlaeConfig, dict(coeff_init=None), TypeError, "coeff_init"),
    (MlaeConfig, dict(targets=("query",)), ValueError, "targets"),
    (MlaeConfig, dict(masking="random"), ValueError, "masking"),
    (MlaeConfig, dict(masking=None), TypeError, "masking"),
    (MlaeConfig, dict(pattern="random"), ValueError, "pattern"),
    (MlaeConfig, dict(masking="fixed"), ValueError, "pattern must be one of .* got 'uniform'"),
    (MlaeConfig, dict(masking="none", pattern="hourglass"), ValueError, "pattern"),
    (MlaeConfig, dict(masking="fixed", pattern="random", num_experts=6), ValueError, "num_experts"),
    (LoraConfig, dict(rank=0), ValueError, "rank must be an int >= 1, got 0"),
    (LoraConfig, dict(alpha=0), ValueError, "alpha must be None or a finite number other than 0"),
    (LoraConfig, dict(alpha=float("inf")), ValueError, "alpha"),
    (LoraConfig, dict(alpha="8"), TypeError, "alpha"),
    (LoraConfig, dict(targets=("query",)), ValueError, "targets"),
    (LoraConfig, dict(modules="a"), TypeError, "modules"),
    (LoraConfig, dict(modules=[1]), TypeError, "modules"),
    (LoraConfig, dict(modules=[]), ValueError, "modules"),
    (LoraConfig, dict(modules=["a"], layers=[0]), ValueError, "layers must be None where modules names"),
    (LoraConfig, dict(modules=["a"], targets=["qkv"]), ValueError, "targets must be None where modules names"),
    (SsfConfig, dict(norms=1), TypeError, "norms must be True or False, got 1"),
    (SsfConfig, dict(targets=()), ValueError, "targets"),
    (SsfConfig, dict(layers=[-1]), ValueError, "layers"),
    (BitFitConfig, dict(norms=None), TypeError, "norms"),
    (BitFitConfig, dict(layers=[]), ValueError, "layers"),
]


@pytest.mark.parametrize(("cls", "fields", "error", "text"), BAD, ids=[f"{c.__name__}-{f}" for c, f, *_ in BAD])
def test_bad_fields_are_named(cls, fields, error, text):
    with pytest.raises(error, match=f"^{cls.__name__}: {text}"):
        cls(**fields)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"method": "adalora"}',
        '{"method": "alore", "num_expert": 4}',
        '{"method": "alore", "rank": 0}',
        '{"method": "mlae", "share_scale": true}',
    ],
)
def test_bad_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        config_from_json(text)


def test_from_json_of_the_other_class():
    with pytest.raises(ValueError, match="method must be 'mlae', got 'alore'"):
        MlaeConfig.from_json(AloreConfig().to_json())
