"""MlaeNorm: a norm that computes the adapted linear behind it ahead. What reads its output sees the norm's."""

import copy
import pickle

import pytest
import torch
from marks import needs_cuda
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import alore_ext as ae
from alore_ext import ops
from alore_ext.modules import AloreLayerNorm, MlaeNorm

CONFIGS = [ae.MlaeConfig(num_experts=8), ae.MlaeConfig(num_experts=4, targets=("qkv", "fc1")), ae.LoraConfig(rank=8)]


def vit(device="cpu", dtype=torch.float32, config=CONFIGS[0], width=128):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=width, depth=3, num_heads=4, num_classes=5)
    ae.patch(model.to(device, dtype), config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def norms(model):
    return {name for name, module in model.named_modules() if isinstance(module, MlaeNorm)}


def test_patch_puts_it_where_a_norm_feeds_one_adapted_linear():
    assert norms(vit(config=CONFIGS[0])) == {f"blocks.{i}.norm1" for i in range(3)}
    assert norms(vit(config=CONFIGS[1])) == {f"blocks.{i}.norm{j}" for i in range(3) for j in (1, 2)}
    assert norms(vit(config=ae.MlaeConfig(targets=("proj", "fc2")))) == set()


def test_unpatch_gives_the_norm_back():
    model = vit()
    ae.unpatch(model)
    assert norms(model) == set()
    assert type(model.blocks[0].norm1) is not MlaeNorm and "_mlae_behind" not in vars(model.blocks[0].norm1)


def test_merging_takes_it_off_and_unmerging_puts_it_on_again():
    model = vit().eval()
    ae.merge_(model)
    assert norms(model) == set()
    ae.unmerge_(model)
    assert norms(model) == {f"blocks.{i}.norm1" for i in range(3)}


def test_a_norm_with_an_adapter_of_its_own_keeps_it():
    config = [ae.MlaeConfig(num_experts=8), ae.AloreConfig(locations=("before_ffn",))]
    model = vit(config=config)
    assert norms(model) == {f"blocks.{i}.norm1" for i in range(3)}
    assert isinstance(model.blocks[0].norm2, AloreLayerNorm)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_its_own_linear(copied):
    twin = copied(vit())
    block = twin.blocks[1]
    assert block.norm1._mlae_behind is block.attn.qkv


def step(model, x):
    """Output and gradients, under the same masks whichever way they are drawn."""
    torch.manual_seed(7)
    model.zero_grad()
    logits = model(x)
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def apart(model):
    """The model with its norms as they were."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, MlaeNorm):
            module.__class__ = module.adapter_bases[1]
    return twin


def distance(a, b):
    """Relative to b; 0 where both are 0."""
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()


def close(a, b):
    return distance(a, b) < 0.02


class TestAhead:
    """Where the fused kernels run."""

    pytestmark = needs_cuda

    @pytest.fixture
    def x(self):
        return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()

    @pytest.fixture
    def counts(self, monkeypatch):
        """How often linears are computed by their norm, and by themselves."""
        counts = {"ahead": 0, "alone": 0}

        def count(name, what):
            function = getattr(ops, name)

            def counted(*args):
                counts[what] += 1
                return function(*args)

            monkeypatch.setattr(ops, name, counted)

        count("layer_norm_mlae_linear", "ahead")
        count("mlae_linear", "alone")
        return counts

    @pytest.mark.parametrize("config", CONFIGS, ids=["qkv", "qkv+fc1", "lora"])
    def test_a_step_is_that_of_the_two_apart(self, config, x, counts):
        """As far from the step in float32, under the same masks, as the two apart are."""
        model = vit("cuda", torch.bfloat16, config)
        logits, grads = step(model, x)
        assert counts["ahead"] > 0 == counts["alone"]
        twin_logits, twin_grads = step(apart(model), x)
        exact_logits, exact_grads = step(apart(model).float(), x.float())
        assert grads.keys() == exact_grads.keys()
        assert distance(logits, exact_logits) <= 2 * distance(twin_logits, exact_logits)
        for name, grad in grads.items():
            few = name.endswith("coeff")  # of few numbers, an error is partly chance
            allowed = 2 * distance(twin_grads[name], exact_grads[name]) + (0.05 if few else 0.01)
            assert distance(grad, exact_grads[name]) <= allowed, name
            if name.endswith("lora_a"):
                assert torch.equal(grad.count_nonzero(1) == 0, exact_grads[name].count_nonzero(1) == 0), name

    def test_nothing_of_the_norms_output_is_kept(self, x):
        model = vit("cuda", torch.bfloat16)
        x = x[:1].expand(4096, -1, -1, -1)  # far beyond the megabyte that the allocator may round up by

        def held(model):
            model(x)  # whatever is allocated once
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = model(x)
            return torch.cuda.memory_allocated() - before, out

        ahead, alone = held(model)[0], held(apart(model))[0]
        activation = 4096 * 17 * 128 * 2
        # Of three blocks the first keeps its input instead: its norm alone, with no gradient to pass on, keeps nothing.
        assert alone - ahead >= 1.8 * activation

    def test_hooks_on_the_norm_see_values_and_gradients(self, x, counts):
        """What Grad-CAM looks at: with a hook on it, the norm computes itself alone."""
        model = vit("cuda", torch.bfloat16).eval()
        seen, grads = [], []

        def hook(module, args, out):
            seen.append((args[0], out))
            out.register_hook(grads.append)

        norm = model.blocks[1].norm1
        norm.register_forward_hook(hook)
        model(x).float().square().mean().backward()
        assert counts == {"ahead": 2, "alone": 1}
        given, out = seen[0]
        torch.testing.assert_close(out, torch.nn.functional.layer_norm(given, (128,), norm.weight, norm.bias, norm.eps))
        assert grads[0].any()

    def parts(self):
        """A norm, the linear behind it, and an input for them."""
        block = vit("cuda", torch.bfloat16).blocks[1].eval()
        x = torch.randn(4, 17, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        return block.norm1, block.attn.qkv, x

    def alone(self, norm, linear, x):
        """The linear of the norm's output, each by itself."""
        plain = torch.nn.functional.layer_norm(x, (128,), norm.weight, norm.bias, norm.eps)
        return linear(plain)

    @pytest.mark.parametrize("change", ["written to", "another tensor", "a view", "hooked", "retained"])
    def test_anything_but_the_norms_very_output_is_computed_anew(self, change, counts):
        norm, linear, x = self.parts()
        h = norm(x)
        if change == "written to":
            h.mul_(2)
        elif change == "another tensor":
            h = h * 2
        elif change == "a view":
            h = h.view(h.shape)
        elif change == "hooked":
            h.register_hook(lambda grad: None)
        else:
            h.retain_grad()
        out = linear(h)
        assert counts == {"ahead": 1, "alone": 1}
        assert close(out, linear(h))

    @pytest.mark.parametrize("change", ["train", "factor", "grad mode", "kept"])
    def test_nor_what_was_computed_in_another_state(self, change, counts):
        norm, linear, x = self.parts()
        with torch.set_grad_enabled(change != "grad mode"):
            h = norm(x)
        if change == "train":
            linear.train()
        elif change == "factor":
            linear.lora_b.data.add_(1.0)
            torch.nn.init.normal_(linear.lora_b)
        elif change == "kept":
            linear._kept_experts = (0, 1)
        out = linear(h)
        assert counts == {"ahead": 1, "alone": 1}
        assert out.requires_grad

    def test_another_reader_adds_its_gradient(self):
        """As close to float32 as the two apart."""
        norm, linear, x = self.parts()

        def grad(norm, linear, x):
            x = x.detach().requires_grad_()
            h = norm(x)
            (linear(h).float().square().mean() + h.float().square().mean()).backward()
            return x.grad

        def plain(x):
            return torch.nn.functional.layer_norm(x, (128,), norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

        got, twin = grad(norm, linear, x), grad(plain, linear, x)
        exact = grad(plain, copy.deepcopy(linear).float(), x.float())
        assert distance(got, exact) <= 2 * distance(twin, exact)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_around_the_linear_alone(self, reentrant):
        """Its mask is drawn inside, so that the second forward draws the same one: the gradients fit the output."""
        norm, linear, x = self.parts()
        linear.train()
        with torch.no_grad():  # each expert has columns of its own
            linear.lora_b.copy_(torch.eye(8, device="cuda").repeat_interleave(48, 0))
            h = torch.nn.functional.layer_norm(x, (128,), norm.weight, norm.bias, norm.eps)
            base = torch.nn.functional.linear(h, linear.weight, linear.bias)
        masks = set()
        for seed in range(6):
            torch.manual_seed(seed)
            linear.zero_grad()
            out = torch.utils.checkpoint.checkpoint(linear, norm(x), use_reentrant=reentrant)
            out.float().square().mean().backward()
            masked = (out - base).detach().float().abs().view(-1, 8, 48).mean((0, 2)) < 0.05
            assert torch.equal(linear.lora_b.grad.count_nonzero(0) == 0, masked)
            masks.add(tuple(masked.tolist()))
        assert len(masks) > 1

    def test_what_nobody_claims_lives_no_longer_than_the_norms_output(self):
        norm, linear, x = self.parts()
        h = norm(x)
        assert linear._mlae_ahead is not None
        assert copy.deepcopy(linear)._mlae_ahead is None
        del h
        assert "_mlae_ahead" not in vars(linear)

    def test_a_norm_whose_results_nobody_claims_stops_making_them(self, counts):
        norm, _, x = self.parts()
        for _ in range(6):
            norm(x)
        assert counts["ahead"] == 3

    def test_a_compiled_attention_is_left_to_itself(self, x, counts):
        model = vit("cuda", torch.bfloat16).eval()
        expected = model(x)
        model.blocks[1].attn.compile()
        counts.update(ahead=0, alone=0)
        assert close(model(x), expected)
        assert counts["ahead"] == 2

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant, x):
        model = vit("cuda", torch.bfloat16)
        twin = copy.deepcopy(model)

        def run(block, x):
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)

        for block in twin.blocks:
            block.forward = lambda x, forward=block.forward: run(forward, x)
        x = x.requires_grad_()
        (logits, grads), (expected, expected_grads) = step(twin, x), step(model, x)
        assert torch.equal(logits, expected)
        assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)

    def test_two_forwards_before_one_backward(self, x):
        model = vit("cuda", torch.bfloat16).eval()
        (model(x).float().square().mean() + model(x * 0.5).float().square().mean()).backward()
        got = model.blocks[0].attn.qkv.lora_a.grad.clone()
        twin = apart(model)
        twin.zero_grad()
        (twin(x).float().square().mean() + twin(x * 0.5).float().square().mean()).backward()
        assert close(got, twin.blocks[0].attn.qkv.lora_a.grad)

    @pytest.mark.parametrize("how", ["pre-hook", "pre-hook of the attention", "forward", "other device"])
    def test_a_linear_that_prepares_itself_is_left_to_it(self, how, x, counts):
        """As sharding and offloading do: its weights are there only when it is called."""
        model = vit("cuda", torch.bfloat16).eval()
        expected = model(x)
        linear, weight = model.blocks[1].attn.qkv, model.blocks[1].attn.qkv.weight.data

        def bring(*args):
            linear.weight.data = weight

        if how == "forward":
            linear.forward = lambda x, forward=linear.forward: (bring(), forward(x))[1]
        else:
            (model.blocks[1].attn if "attention" in how else linear).register_forward_pre_hook(bring)
        linear.weight.data = weight.cpu() if how == "other device" else torch.zeros_like(weight)
        counts.update(ahead=0, alone=0)
        assert close(model(x), expected)
        assert counts == {"ahead": 2, "alone": 1}

    @pytest.mark.parametrize("how", ["autocast", "inference", "trained norm", "float32", "float16"])
    def test_where_the_two_stay_apart(self, how, x, counts):
        dtype = {"float32": torch.float32, "autocast": torch.float32, "float16": torch.float16}.get(how, torch.bfloat16)
        model = vit("cuda", dtype).eval()
        if how == "trained norm":
            for block in model.blocks:
                block.norm1.weight.requires_grad_()
        with (
            torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"),
            torch.inference_mode(how == "inference"),
        ):
            model(x.to(dtype))
        assert counts == {"ahead": 0, "alone": 3}

    def test_compiled(self, x):
        model = vit("cuda", torch.bfloat16).eval()
        compiled = torch.compile(model, fullgraph=True)
        assert close(compiled(x), model(x))

    def test_as_a_graph(self, x):
        model = vit("cuda", torch.bfloat16).eval()
        expected = model(x).detach()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(x).float().square().mean().backward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
            out.float().square().mean().backward()
        graph.replay()
        torch.testing.assert_close(out.detach(), expected)

    def test_retained_experts(self, x, counts):
        model = vit("cuda", torch.bfloat16)
        ae.retain_experts(model, keep=[0, 2, 3])
        logits = model(x)
        assert counts == {"ahead": 3, "alone": 0}
        assert close(logits, apart(model)(x))
