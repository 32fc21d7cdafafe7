"""Defaults, parameter groups and the learning rate's course."""

import math

import pytest
from torch import nn

from alore_ext.training.errors import InputError
from alore_ext.training.recipe import (
    METHODS,
    Recipe,
    default_recipe,
    demo_recipe,
    learning_rate_factor,
    make_optimizer,
)

RECIPE = Recipe(epochs=10, batch_size=4, lr=0.1, weight_decay=0.05, warmup_epochs=2)


def test_the_papers_values():
    alore, mlae = default_recipe("alore"), default_recipe("mlae")
    assert (alore.batch_size, alore.epochs, alore.warmup_epochs) == (32, 100, 10)
    assert alore.lr in (0.05, 0.01, 0.005, 0.001) and alore.weight_decay in (0.05, 0.01, 0.005, 0.001, 0)
    assert (mlae.batch_size, mlae.lr, mlae.weight_decay) == (64, 5e-4, 1e-4)


def test_demo_gives_every_method_the_same_epochs():
    assert len({demo_recipe(method).epochs for method in METHODS}) == 1


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    factors = [learning_rate_factor(step, 5, RECIPE) for step in range(51)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1 and factors[50] == pytest.approx(0, abs=1e-12)
    assert factors[30] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("warmup", [0, 10, 50])
def test_learning_rate_with_odd_warmups(warmup):
    recipe = RECIPE.override(warmup_epochs=warmup)
    factors = [learning_rate_factor(step, 5, recipe) for step in range(50)]
    assert all(0 < factor <= 1 for factor in factors)
    if warmup >= 10:
        assert factors == sorted(factors)  # never reaches the cosine


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    optimizer = make_optimizer(model, RECIPE)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.pop(id(model[2].weight)) == 0.05
    assert set(decay.values()) == {0.0} and len(decay) == 4
    assert id(model[0].weight) not in decay


def test_nothing_to_train_is_an_error():
    with pytest.raises(InputError, match="nothing to train"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), RECIPE)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be a finite"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite"),
        ({"label_smoothing": 1.0}, "label_smoothing must be below 1"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(InputError, match=message):
        RECIPE.override(**values)


def test_dict_round_trip():
    assert Recipe.from_dict(RECIPE.to_dict()) == RECIPE
    assert RECIPE.override(lr=None, epochs=3) == Recipe(3, 4, 0.1, 0.05, 2)
