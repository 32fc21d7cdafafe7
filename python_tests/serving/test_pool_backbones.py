"""The pool on every backbone: mixed batches and merged weights give what each adapter's own model gives."""

import copy

import torch
from backbones import assert_unchanged, relative_error, snapshot
from pools import CONFIGS, adapter_file, own_model
from zoo import Row, every_row, logits

from alore_ext.serving import AdapterPool

# Adapters and their classes; None keeps the base's number.
SERVED = {"alore": 9, "alore_everywhere": None, "mlae_everywhere": 2, "lora": None}


@every_row
@torch.no_grad()
def test_every_backbone(row: Row, tmp_path, device):
    """In float64, where what is exact has to be exact."""
    base = row.build(device, torch.float64)
    pool, models = AdapterPool(copy.deepcopy(base)), {None: base}
    for name, classes in SERVED.items():
        path = adapter_file(base, CONFIGS[name](row), tmp_path / f"{name}.safetensors", classes)
        pool.add(name, path)
        models[name] = own_model(base, path)
    names = ["lora", "alore", None, "mlae_everywhere", "alore", None, "alore_everywhere"]
    x = row.images(device, torch.float64, batch=len(names))
    expected = {name: logits(model, x) for name, model in models.items()}

    def assert_mixed_is_right():
        """All adapters and the base in one batch, in an order that no layer's own order is."""
        answers = pool.predict(x, adapters=names)
        assert len(answers) == len(names)
        for i, name in enumerate(names):
            assert answers[i].shape == expected[name][i].shape
            assert relative_error(answers[i], expected[name][i]) < 1e-9, name

    assert_mixed_is_right()
    assert pool.active is None and torch.equal(pool.predict(x), expected[None])

    before = snapshot(pool.model)
    addresses = {name: p.data_ptr() for name, p in pool.model.named_parameters()}
    first = {}
    for name in [*SERVED, *reversed(SERVED)]:
        pool.activate(name)
        y = logits(pool.model, x)
        assert relative_error(y, expected[name]) < 1e-9, name
        assert torch.equal(pool.predict(x, adapter=name), y)
        assert torch.equal(first.setdefault(name, y), y), "a swap left something behind"
        assert pool.num_classes(name) == y.shape[1]
    assert_mixed_is_right()
    assert relative_error(pool.predict(x, adapter="lora"), expected["lora"]) < 1e-9
    pool.deactivate()
    assert pool.active is None
    assert_unchanged(pool.model, before)
    for name, parameter in pool.model.named_parameters():
        assert parameter.data_ptr() == addresses[name], name
