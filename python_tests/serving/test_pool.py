"""What an AdapterPool promises besides right answers: refusals, stable memory, threads, reports."""

import copy
import threading

import pytest
import torch
from backbones import assert_unchanged, relative_error, snapshot
from pools import CONFIGS, adapter_file, own_model, resized_head
from torch import nn
from zoo import ZOO

import alore_ext as ae
from alore_ext.serving import AdapterPool, MergeError

ROW = ZOO["vit"]


def test_names_and_membership(pool):
    assert pool.names == list(CONFIGS) and len(pool) == len(CONFIGS) and "lora" in pool and "x" not in pool
    pool.remove("lora")
    assert "lora" not in pool.names
    with pytest.raises(ValueError, match=r"unknown adapter 'lora'; the pool has 'alore', .*'both'"):
        pool.predict(ROW.images(pool.device), adapter="lora")


def test_state_dicts_in_place_of_files(base, device):
    """With metadata, and as plain dicts whose names and shapes say what the config was."""
    x = ROW.images(device)
    for name, config in CONFIGS.items():
        model = ae.patch(copy.deepcopy(base), config(ROW))
        torch.manual_seed(1)
        with torch.no_grad():
            for value in ae.adapter_state_dict(model).values():
                value.copy_(torch.randn_like(value) * 0.1)
        pool = AdapterPool(copy.deepcopy(base))
        pool.add("with metadata", ae.adapter_state_dict(model))
        plain = {key: value.clone() for key, value in ae.adapter_state_dict(model).items()}
        if name == "lora":
            with pytest.raises(ValueError, match="low-rank factors and no coeff: give config=LoraConfig"):
                pool.add("plain", plain)
            pool.add("plain", plain, config=config(ROW))
        else:
            pool.add("plain", plain)
        with torch.no_grad():
            expected = model.eval()(x)
        for adapter in pool.names:
            assert relative_error(pool.predict(x, adapter=adapter), expected) < 1e-5, (name, adapter)


def test_a_state_dict_keeps_its_metadata_through_torch_save(base, tmp_path):
    model = ae.patch(copy.deepcopy(base), ae.LoraConfig(alpha=4))
    torch.save(ae.adapter_state_dict(model), tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    AdapterPool(base).add("a", loaded)


def test_a_merged_models_state_dict(base, device):
    """Its fingerprint is that of the base, which the merge kept."""
    model = ae.merge_(ae.patch(copy.deepcopy(base), ae.AloreConfig()))
    AdapterPool(copy.deepcopy(base)).add("a", ae.adapter_state_dict(model))


def test_labels(base, tmp_path):
    classes = ROW.build().head.out_features
    names = [f"class {i}" for i in range(classes)]
    path = adapter_file(base, ae.AloreConfig(), tmp_path / "a.safetensors", labels=names)
    pool = AdapterPool(base)
    pool.add("a", path)
    assert pool.labels("a") == names
    with pytest.raises(ValueError, match=f"must name the head's {classes} classes, got 2 names"):
        ae.save_adapter(ae.patch(ROW.build(), ae.AloreConfig()), tmp_path / "b.safetensors", labels=["a", "b"])
    with pytest.raises(TypeError, match="labels must be a sequence of strings"):
        ae.save_adapter(ae.patch(ROW.build(), ae.AloreConfig()), tmp_path / "b.safetensors", labels="abc")


def other_base(tmp_path, device):
    torch.manual_seed(77)
    return adapter_file(ROW.build(device), ae.AloreConfig(), tmp_path / "other.safetensors")


def not_finite(base):
    tensors = ae.adapter_state_dict(ae.patch(copy.deepcopy(base), ae.AloreConfig()))
    tensors["blocks.1.norm1.up"] = torch.full_like(tensors["blocks.1.norm1.up"], float("nan"))
    return tensors


def neighbour(base):
    return ae.adapter_state_dict(ae.patch(copy.deepcopy(base), ae.SsfConfig()))


def odd_head(base):
    tensors = ae.adapter_state_dict(ae.patch(copy.deepcopy(base), ae.AloreConfig()))
    tensors["head.weight"] = torch.zeros(5, 3)
    return tensors


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (lambda base, path: path / "none.safetensors", FileNotFoundError, "AdapterPool.add: no file at"),
        (lambda base, path: other_base(path, "cpu"), ValueError, "was trained on another base"),
        (lambda base, path: not_finite(base), ValueError, "blocks.1.norm1.up holds NaN or infinity"),
        (lambda base, path: neighbour(base), ValueError, "an adapter of SsfConfig; a pool serves AloreConfig"),
        (lambda base, path: odd_head(base), ValueError, "expected the classifier 'head' to be a linear"),
        (lambda base, path: {"a": 1}, TypeError, "must be a path or a dict of tensors"),
        (lambda base, path: {"a.weight": torch.zeros(2)}, ValueError, "holds no adapter's tensors"),
        (lambda base, path: {"blocks.9.norm1.down": torch.zeros(4, 8, 4)}, ValueError, "no place for an adapter"),
    ],
)
def test_refused_adapters_leave_the_pool_as_it_was(base, files, adapter, error, message, tmp_path, device):
    pool = AdapterPool(copy.deepcopy(base))
    pool.add("good", files["alore"])
    pool.activate("good")
    before, x = snapshot(pool.model), ROW.images(device)
    expected = pool.predict(x), pool.predict(x, adapters=["good", None])
    with pytest.raises(error, match=message):
        pool.add("bad", adapter(base, tmp_path))
    assert pool.names == ["good"]
    assert_unchanged(pool.model, before)
    after = pool.predict(x), pool.predict(x, adapters=["good", None])
    assert torch.equal(after[0], expected[0]) and all(map(torch.equal, after[1], expected[1]))


def test_bad_calls(pool, files, base, device):
    x = ROW.images(device)
    with pytest.raises(ValueError, match="'alore' is taken; remove it first, or give replace=True"):
        pool.add("alore", files["mlae"])
    with pytest.raises(TypeError, match="name must be a non-empty string"):
        pool.add("", files["mlae"])
    with pytest.raises(ValueError, match="a file holds its own config"):
        pool.add("x", files["mlae"], config=ae.MlaeConfig())
    with pytest.raises(ValueError, match=r"a name for each of 2 images, got 1"):
        pool.predict(x, adapters=["alore"])
    with pytest.raises(ValueError, match="must name one adapter an image"):
        pool.predict(x, adapters="ab")
    with pytest.raises(ValueError, match="got both"):
        pool.predict(x, adapter="alore", adapters=["alore", "alore"])
    with pytest.raises(ValueError, match=r"must be \[batch, 3, height, width\]"):
        pool.predict(x[0])
    with pytest.raises(TypeError, match="floating-point tensor, got torch.uint8"):
        pool.predict(x.to(torch.uint8))
    for call in (pool.activate, pool.remove, pool.labels, pool.num_classes):
        with pytest.raises(ValueError, match="unknown adapter 'nobody'"):
            call("nobody")
    pool.activate("mlae")
    with pytest.raises(ValueError, match="'mlae' is active; deactivate it first"):
        pool.remove("mlae")
    with pytest.raises(ValueError, match="is active and cannot be replaced"):
        pool.add("mlae", files["mlae"], replace=True)
    with pytest.raises(ValueError, match="expected a plain backbone"):
        AdapterPool(ae.patch(base, ae.AloreConfig()))
    with pytest.raises(TypeError, match="expected an nn.Module"):
        AdapterPool("vit")
    with pytest.raises(TypeError, match="dtype must be a floating"):
        AdapterPool(ROW.build(), dtype=torch.int8)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
            pool.capture([1])
    with pytest.raises(ValueError, match="batch_sizes must be integers of at least 1"):
        pool.capture([0])


def test_empty_batches(pool, device):
    x = ROW.images(device)[:0]
    assert pool.predict(x, adapters=[]) == []
    assert pool.predict(x, adapter="alore").shape == (0, pool.num_classes("alore"))
    assert pool.predict(x).shape[0] == 0


def test_replace_is_one_step(pool, base, tmp_path, device):
    path = adapter_file(base, ae.MlaeConfig(targets=("fc1",)), tmp_path / "new.safetensors", classes=3)
    x = ROW.images(device)
    pool.add("alore", path, replace=True)
    with torch.no_grad():
        assert relative_error(pool.predict(x, adapter="alore"), own_model(base, path)(x)) < 1e-5
    assert len(pool) == len(CONFIGS)


def test_an_adapter_without_classifier_uses_the_bases(base, device):
    model = ae.patch(copy.deepcopy(base), ae.AloreConfig())
    pool = AdapterPool(copy.deepcopy(base))
    pool.add("a", ae.adapter_state_dict(model, include_head=False))
    x = ROW.images(device)
    assert pool.num_classes("a") == base.head.out_features
    with torch.no_grad():
        assert relative_error(pool.predict(x, adapters=["a", None])[0], base(x)[0]) < 1e-5


def test_a_base_without_classifier(files, device, base):
    """Adapters bring theirs; asking for the base beside them is refused."""
    plain = copy.deepcopy(base)
    plain.reset_classifier(0)
    pool = AdapterPool(plain)
    pool.add("alore", files["alore"])
    pool.add("mlae", files["mlae"])
    x = ROW.images(device)
    with torch.no_grad():
        features = plain(x)
        for name, y in zip(("mlae", "alore"), pool.predict(x, adapters=["mlae", "alore"]), strict=True):
            i = ("mlae", "alore").index(name)
            assert relative_error(y, own_model(base, files[name])(x)[i]) < 1e-5
        pool.activate("alore")
        assert pool.model.num_classes == base.num_classes
        assert relative_error(pool.predict(x), own_model(base, files["alore"])(x)) < 1e-5
    with pytest.raises(ValueError, match="the base has no classifier 'head'"):
        pool.predict(x, adapters=["mlae", None])
    pool.deactivate()
    assert torch.equal(pool.predict(x), features) and isinstance(pool.model.head, nn.Identity)


def test_a_failed_activate_leaves_the_former_active(base, files, device):
    """Finite factors whose merge float16 cannot hold."""
    pool = AdapterPool(copy.deepcopy(base), dtype=torch.float16)
    pool.add("alore", files["alore"])
    model = ae.patch(copy.deepcopy(base), ae.MlaeConfig(targets=("fc1", "qkv")))
    with torch.no_grad():
        model.blocks[2].mlp.fc1.lora_b.fill_(6e4)
        model.blocks[2].mlp.fc1.lora_a.fill_(6e4)
    pool.add("huge", ae.adapter_state_dict(model))
    for former in (None, "alore"):
        if former:
            pool.activate(former)
        before = snapshot(pool.model)
        with pytest.raises(ValueError, match=r"'huge': the merged blocks.2.mlp.fc1.weight holds NaN or infinity in"):
            pool.activate("huge")
        assert pool.active == former
        assert_unchanged(pool.model, before)


def test_no_drift_over_many_swaps(pool, device):
    pool.activate("alore")
    first = snapshot(pool.model)
    for _ in range(10):
        for name in CONFIGS:
            pool.activate(name)
    pool.activate("alore")
    assert_unchanged(pool.model, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(base, files, dtype, device):
    """No further from the exact answer than twice what the adapter's own model in that dtype is."""
    pool = AdapterPool(copy.deepcopy(base), dtype=dtype)
    assert pool.dtype == dtype and pool.model.head.weight.dtype == dtype
    for name, path in files.items():
        pool.add(name, path)
    x = ROW.images(device, batch=len(files))
    answers = torch.stack(pool.predict(x, adapters=list(files)))
    with torch.no_grad():
        exact = torch.stack(
            [own_model(base, path).double()(x[i : i + 1].double())[0] for i, path in enumerate(files.values())]
        )
        eager = torch.stack(
            [own_model(base, path).to(dtype)(x[i : i + 1].to(dtype))[0] for i, path in enumerate(files.values())]
        )
    assert answers.dtype == dtype
    assert relative_error(answers, exact) <= 2 * relative_error(eager, exact) + 1e-3


def test_threads(pool, base, files, device):
    """Predictions of six threads while a seventh swaps: every answer is that of the adapter asked for."""
    names = list(files)
    x = ROW.images(device, batch=len(names))
    with torch.no_grad():
        expected = {name: own_model(base, path)(x) for name, path in files.items()}
    stop, failures = threading.Event(), []

    def swap():
        while not stop.is_set():
            for name in names:
                pool.activate(name)
            pool.deactivate()

    def ask(offset):
        try:
            for turn in range(8):
                order = [names[(i + offset + turn) % len(names)] for i in range(len(names))]
                for i, y in enumerate(pool.predict(x, adapters=order)):
                    assert relative_error(y, expected[order[i]][i]) < 1e-4
                assert relative_error(pool.predict(x, adapter=order[0]), expected[order[0]]) < 1e-4
        except BaseException as error:
            failures.append(error)

    swapper = threading.Thread(target=swap)
    askers = [threading.Thread(target=ask, args=(offset,)) for offset in range(6)]
    for thread in (swapper, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    swapper.join()
    assert not failures, failures[0]


def test_merge_report(base, files, device):
    x = ROW.images(device, batch=4)
    pool = AdapterPool(copy.deepcopy(base))
    pool.add("alore", files["alore"])
    pool.add("mlae", files["mlae"])
    pool.activate("mlae")
    before = snapshot(pool.model)
    report = pool.merge_report("alore", x, max_lost=1e-4, max_logit_difference=1e-4)
    assert pool.active == "mlae"
    assert_unchanged(pool.model, before)
    assert {layer.name for layer in report.layers} == {
        f"blocks.{i}.{name}.weight" for i in range(3) for name in ("attn.qkv", "mlp.fc1")
    }
    assert report.num_images == 4 and 0 < report.worst().lost < 1e-4 and "blocks.2.mlp.fc1.weight" in str(report)
    with pytest.raises(MergeError, match="at most 1.0e-12 was allowed") as raised:
        pool.merge_report("alore", x, max_lost=1e-12)
    assert raised.value.report.layers
    with pytest.raises(MergeError, match="logits in torch.float32 differ by"):
        pool.merge_report("alore", x, max_logit_difference=0.0)
    with pytest.raises(ValueError, match="at least one image"):
        pool.merge_report("alore", x[:0])


def test_merge_report_shows_updates_that_sixteen_bits_swallow(base, device):
    """Half an ulp of bfloat16 is 2^-9 of a weight: an update of a thousandth of that is lost whole."""
    model = ae.patch(copy.deepcopy(base), ae.MlaeConfig())
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.lora_b.normal_(std=1e-6)
    pool = AdapterPool(copy.deepcopy(base), dtype=torch.bfloat16)
    pool.add("faint", ae.adapter_state_dict(model))
    with pytest.raises(MergeError, match="loses 1.0e"):
        pool.merge_report("faint", ROW.images(device), max_lost=0.1)


def test_the_pool_shares_the_backbone(base, files):
    """One copy of what adapters write; everything else is there once."""
    model = copy.deepcopy(base)
    pool = AdapterPool(model)
    pool.add("alore", files["alore"])
    parameters, mixed = dict(model.named_parameters()), dict(pool._mixed.model.named_parameters())
    shared = {name for name, value in mixed.items() if value.data_ptr() == parameters[name].data_ptr()}
    written = {f"blocks.{i}.{layer}.weight" for i in range(3) for layer in ("attn.qkv", "mlp.fc1")}
    assert parameters.keys() - shared == written | {"head.weight", "head.bias"}


def test_heads_of_unequal_size_in_one_batch(base, tmp_path, device):
    sizes = {"two": 2, "forty": 40, "five": 5}
    pool = AdapterPool(copy.deepcopy(base))
    models = {}
    for name, classes in sizes.items():
        path = adapter_file(base, ae.AloreConfig(), tmp_path / f"{name}.safetensors", classes)
        pool.add(name, path)
        models[name] = own_model(base, path)
    order = ["forty", "two", "five", "two", None, "forty"]
    x = ROW.images(device, batch=len(order))
    with torch.no_grad():
        for i, y in enumerate(pool.predict(x, adapters=order)):
            expected = (base if order[i] is None else models[order[i]])(x)[i]
            assert y.shape == expected.shape and relative_error(y, expected) < 1e-5
        for name in ("forty", "two"):
            pool.activate(name)
            assert pool.model.num_classes == sizes[name] and pool.model.get_classifier().out_features == sizes[name]
        pool.deactivate()
        assert pool.model.num_classes == base.num_classes


def test_resized_head_keeps_the_adapter(base):
    """The tests' own helper does what its name says."""
    tensors = ae.adapter_state_dict(ae.patch(copy.deepcopy(base), ae.AloreConfig()))
    resized = resized_head(tensors, 7)
    assert resized["head.weight"].shape[0] == resized["head.bias"].shape[0] == 7
    assert all(torch.equal(resized[name], tensors[name]) for name in tensors if not name.startswith("head."))
