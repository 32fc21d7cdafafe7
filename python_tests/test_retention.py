"""Expert retention: what runs is what zeroed experts leave, what merges is what runs, and nothing is lost."""

import copy
import pickle

import pytest
import torch
from backbones import assert_unchanged, build, images, relative_error, snapshot, train_adapters_

import alore_ext as ae

ALL = ("before_attn", "after_attn", "before_ffn", "after_ffn")
CONFIGS = {
    "alore": ae.AloreConfig(locations=ALL),
    "own_scale": ae.AloreConfig(locations=("before_ffn",), share_scale=False),
    "stacked_linear": ae.AloreConfig(locations=ALL, structure="stacked_linear"),
    "stacked_nonlinear": ae.AloreConfig(structure="stacked_nonlinear"),
    "mlae": ae.MlaeConfig(4, 2, targets=("qkv", "proj", "fc1")),
    "both": [ae.AloreConfig(locations=("before_ffn",)), ae.MlaeConfig(num_experts=4)],
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Table 22: Increment-2, Single-3, Sliced-2, and all.
KEEPS = [range(2), [2], [3, 0, 2], range(4)]


def patched(config, device="cpu", name="vit"):
    model = train_adapters_(ae.patch(build(name, device, torch.float64), config))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("down_bias", "up_bias")):
                parameter.normal_()
    return model


@torch.no_grad()
def zeroed(model, keep):
    """A copy whose other experts are zeros, by hand."""
    model = copy.deepcopy(model)
    for key in ae.adapter_state_dict(model, include_head=False):
        if key.endswith((".up", ".up_bias", ".coeff")):
            for expert in set(range(4)) - set(keep):
                model.get_parameter(key)[expert] = 0
    return model


@configs
@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_retained_is_merged_is_zeroed(config, keep, device):
    model, x = patched(config, device), images(device, torch.float64)
    before = snapshot(model)
    with torch.no_grad():
        whole = model(x)
        expected = zeroed(model, keep)(x)
        with ae.retain_experts(model, keep=keep) as retained:
            assert retained is model
            assert relative_error(model(x), expected) < 1e-12
            if config is not CONFIGS["stacked_nonlinear"]:
                ae.merge_(model)
                assert relative_error(model(x), expected) < 1e-12
                ae.unmerge_(model)
                assert relative_error(model(x), expected) < 1e-12
        assert_unchanged(model, before)
        assert torch.equal(model(x), whole)
        if config is not CONFIGS["stacked_nonlinear"]:
            ae.merge_(model, keep_experts=keep)
            assert relative_error(model(x), expected) < 1e-12
            ae.unmerge_(model)
            assert torch.equal(model(x), whole)
            assert relative_error(ae.merge_and_unload(model, keep_experts=keep)(x), expected) < 1e-12


def test_as_a_function_nested_and_after_an_error(device):
    model, x = patched(CONFIGS["alore"], device), images(device, torch.float64)
    expected = {keep: zeroed(model, keep)(x) for keep in ((0,), (1, 2), (0, 1, 2, 3))}
    ae.retain_experts(model, keep=[0])
    with pytest.raises(KeyError), ae.retain_experts(model, keep=[1, 2]):
        assert relative_error(model(x), expected[1, 2]) < 1e-12
        raise KeyError
    assert relative_error(model(x), expected[0,]) < 1e-12
    ae.retain_experts(model, keep=None)
    assert relative_error(model(x), expected[0, 1, 2, 3]) < 1e-12


def test_files_and_copies_keep_all_experts(device, tmp_path):
    model, x = patched(CONFIGS["alore"], device), images(device, torch.float64)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    ae.retain_experts(model, keep=[0, 2])
    y = model(x)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        ae.retain_experts(twin, keep=None)
        assert not torch.equal(twin(x), y)
        assert torch.equal(model(x), y)
    path = ae.save_adapter(model, tmp_path / "adapter.safetensors")
    ae.retain_experts(model, keep=None)
    fresh = ae.unpatch(copy.deepcopy(model))
    assert torch.equal(ae.load_adapter(fresh, path)(x), model(x))


def test_training_waits_for_all_experts():
    model = patched(CONFIGS["both"]).train()
    model.blocks[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    with ae.retain_experts(model, keep=[1]):
        assert not any(module.training for module in model.modules())
        with pytest.raises(ValueError, match=r"retains experts \[1\].*keep=None"):
            model.train()
        ae.merge_(model)
        ae.unmerge_(model)
        with pytest.raises(ValueError, match="retains experts"):
            model.train()
    assert {name: module.training for name, module in model.named_modules()} == flags
    model.train()


def test_taken_off_or_merged_within_the_block():
    plain = build("vit").train()
    before = snapshot(plain)
    with ae.retain_experts(ae.patch(plain, ae.AloreConfig()), keep=[0]) as model:
        ae.unpatch(model)
    assert_unchanged(model, before)
    with ae.retain_experts(ae.patch(model, ae.AloreConfig()), keep=[0]):
        ae.merge_(model)
    with pytest.raises(ValueError, match="merged"):
        model.train()
    ae.unmerge_(model)
    assert model.training and model.train() is model
    ae.retain_experts(model, keep=[0])
    ae.merge_and_unload(model)
    assert model.training and "train" not in model.__dict__


@pytest.mark.parametrize(
    ("keep", "error", "text"),
    [
        ([], ValueError, "got none"),
        ([0, 0], ValueError, "each once"),
        ([-1], ValueError, "got -1"),
        ([1, 4], ValueError, r"has expert 4, but blocks.0.norm1 has 4 \(0 to 3\)"),
        ([True], TypeError, "True"),
        ([0.0], TypeError, "0.0"),
        (1, TypeError, "got 1"),
        ("01", TypeError, "'01'"),
    ],
)
def test_bad_indices_change_nothing(keep, error, text):
    model = patched(CONFIGS["alore"])
    before = snapshot(model)
    for call, name in ((ae.retain_experts, "keep"), (ae.merge_, "keep_experts"), (ae.merge_and_unload, "keep_experts")):
        with pytest.raises(error, match=f"{name}.*{text}"):
            call(model, **{name: keep})
        assert_unchanged(model, before)


def test_a_layer_with_fewer_experts_is_named():
    model = patched(ae.MlaeConfig(masking="fixed", pattern=[4, 2, 3]))
    with pytest.raises(ValueError, match=r"has expert 2, but blocks.1.attn.qkv has 2 \(0 to 1\)"):
        ae.retain_experts(model, keep=[0, 2])
    ae.retain_experts(model, keep=[0, 1])


def test_states_that_refuse():
    with pytest.raises(ValueError, match="not patched"):
        ae.retain_experts(build("vit"), keep=[0])
    with pytest.raises(ValueError, match="no adapter of the model has experts"):
        ae.retain_experts(ae.patch(build("vit"), ae.RepAdapterConfig()), keep=[0])
    model = ae.merge_(patched(CONFIGS["alore"]))
    with pytest.raises(ValueError, match="is merged"):
        ae.retain_experts(model, keep=[0])
    with pytest.raises(ValueError, match="already merged; give keep_experts to merge_"):
        ae.merge_and_unload(model, keep_experts=[0])
