"""The shared scale's gradient: added up at once, and the same as by one addition after another."""

import copy
import pickle
from functools import partial

import pytest
import torch
from backbones import build, images
from torch.utils.checkpoint import checkpoint

import alore_ext as ae
from alore_ext.modules import stop_sharing
from alore_ext.modules.shared_scale import _VIEWS


def patched(device, name="vit"):
    torch.manual_seed(0)
    model = ae.patch(build(name, device), ae.AloreConfig())
    for key, parameter in model.named_parameters():
        if key.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def grads(model, run):
    model.zero_grad()
    run(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(model):
    twin = copy.deepcopy(model)
    stop_sharing(twin)
    assert not twin._forward_hooks and not twin._forward_pre_hooks
    return twin


def additions(loss):
    """Nodes that give the scale's accumulation a gradient."""
    seen, waiting, found = set(), [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            shape = getattr(getattr(following, "variable", None), "shape", ())
            if len(shape) == 3 and len(set(shape)) == 1:  # [n, n, n]
                found.append(node)
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def test_all_gradients_arrive_at_once(device):
    model, x = patched(device), images(device)
    assert len(additions(model(x).sum())) == 1
    assert len(additions(one_by_one(model)(x).sum())) == 6


def ways():
    def checkpointed(reentrant):
        def run(model, x):
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
            return model(x.requires_grad_())

        return run

    yield pytest.param(lambda model, x: model(x), id="forward")
    yield pytest.param(lambda model, x: model.forward_head(model.forward_features(x)), id="forward_features")
    yield pytest.param(lambda model, x: model(x) + model(x * 0.5), id="twice")
    yield pytest.param(checkpointed(False), id="checkpoint")
    yield pytest.param(checkpointed(True), id="reentrant checkpoint")


@pytest.mark.parametrize("run", list(ways()))
def test_gradients_are_those_of_one_addition_after_another(run, device):
    model, x = patched(device), images(device)
    got, expected = (grads(each, lambda m: run(m, x)) for each in (model, one_by_one(model)))
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_nothing_is_left_behind_when_a_forward_fails(device):
    model = patched(device)
    with pytest.raises(Exception, match="."):
        model(torch.zeros(1, 7, device=device))
    assert model not in _VIEWS


def test_without_gradients_nothing_is_expanded(device):
    model = patched(device)
    seen = []
    model.blocks[0].norm1.register_forward_hook(lambda *_: seen.append(model in _VIEWS))
    with torch.no_grad():
        model(images(device))
    model.alore_scale.requires_grad_(False)
    model(images(device))
    assert seen == [False, False]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_their_own_scale(copied, device):
    model, x = patched(device), images(device)
    twin = copied(model)
    twin(x).sum().backward()
    assert model.alore_scale.grad is None and twin.alore_scale.grad.any()
    assert len(additions(twin(x).sum())) == 1


def test_a_copy_made_in_the_midst_of_a_forward(device):
    model, x, twins = patched(device), images(device), []
    model.blocks[1].register_forward_hook(lambda *_: twins.append(copy.deepcopy(model)))
    model(x).sum().backward()
    twins[0].blocks[1]._forward_hooks.clear()
    twins[0](x).sum().backward()
    torch.testing.assert_close(twins[0].alore_scale.grad, model.alore_scale.grad)


def test_unpatch_and_merge_take_the_hooks_off(device):
    model = patched(device)
    ae.merge_(model)
    assert not model._forward_hooks and not model._forward_pre_hooks
    ae.unmerge_(model)
    assert len(additions(model(images(device)).sum())) == 1
    ae.unpatch(model)
    assert not model._forward_hooks and not model._forward_pre_hooks and not model._forward_hooks_always_called


def test_hooks_of_the_users_stay(device):
    model = build("vit", device)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.register_forward_hook(lambda *_: seen.append("post"))
    ae.patch(model, ae.AloreConfig())
    ae.unpatch(model)
    model(images(device))
    assert seen == ["pre", "post"]


def test_a_replaced_parameter_gets_the_gradient(device):
    model, x = patched(device), images(device)
    other = torch.nn.Parameter(model.alore_scale.detach().clone())
    torch.func.functional_call(model, {"alore_scale": other}, x).sum().backward()
    assert other.grad.any() and model.alore_scale.grad is None
