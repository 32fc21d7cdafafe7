"""What autograd promises around the ops: the right subset of gradients, little memory, and clear refusals."""

import itertools

import pytest
import torch
from op_calls import forward_calls, requiring_grad
from op_cases import KRON_OPS, OPS, layer_norm_args, leaves, lora_args, output_like, run, small_args
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from alore_ext import ops


def tensor_names(args):
    return [name for name, value in args.items() if isinstance(value, torch.Tensor)]


def absent_variants(op, device):
    """Arguments with every combination of the optional ones left out."""
    args = small_args(op, device)
    optional = {"layer_norm_alore": ("weight", "bias"), "masked_lora_linear": ("bias",)}.get(op, ())
    for keep in itertools.product([True, False], repeat=len(optional)):
        dropped = {name: None for name, kept in zip(optional, keep, strict=True) if not kept}
        yield args | dropped


@pytest.mark.parametrize("op", OPS)
def test_each_gradient_alone_and_all_but_one(op, device):
    """An absent bias or a frozen argument must not shift or drop the gradient of another."""
    for args in absent_variants(op, device):
        grad_out = output_like(op, args)
        _, expected = run(ops, op, args, grad_out)
        names = tensor_names(args)
        subsets = [{name} for name in names] + [set(names) - {name} for name in names]
        for subset in subsets:
            inputs = leaves(args, subset)
            getattr(ops, op)(*inputs.values()).backward(grad_out)
            for name in names:
                if name in subset:
                    torch.testing.assert_close(inputs[name].grad, expected[name], msg=f"{name} of {subset}")
                else:
                    assert inputs[name].grad is None


@pytest.mark.parametrize("op", ["alore", "layer_norm_alore"])
def test_gradient_subsets_with_dropout(op, device):
    args = small_args(op, device)
    function, tail = getattr(torch.ops.alore_ext, op), (torch.tensor([11], device=device), 0.4)
    grad_out = output_like(op, args)

    def gradients(subset):
        inputs = leaves(args, subset)
        out = function(*inputs.values(), *tail)
        (out if op == "alore" else out[0]).backward(grad_out)
        return {name: inputs[name].grad for name in subset}

    everything = gradients(set(tensor_names(args)))
    for name in tensor_names(args):
        torch.testing.assert_close(gradients({name})[name], everything[name])


@pytest.mark.parametrize("op", OPS)
def test_autograd_grad_for_one_of_several_inputs(op, device):
    args = small_args(op, device)
    grad_out = output_like(op, args)
    _, expected = run(ops, op, args, grad_out)
    inputs = leaves(args)
    y = getattr(ops, op)(*inputs.values())
    for name in reversed(tensor_names(args)):
        (grad,) = torch.autograd.grad(y, inputs[name], grad_out, retain_graph=True)
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.parametrize("op", OPS)
def test_no_graph_without_need(op, device):
    args = small_args(op, device)
    assert not getattr(ops, op)(*args.values()).requires_grad
    with torch.no_grad():
        assert not getattr(ops, op)(*leaves(args).values()).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(getattr(ops, op)(*args.values()), run(ops, op, args)[0])


@pytest.mark.parametrize("op", OPS)
def test_saves_inputs_and_statistics_only(op, device):
    """DESIGN section 6: Z, H, W', the norm's output and the mask are recomputed, not kept. The low-rank linear keeps
    its code, R numbers a token."""
    args = small_args(op, device, lead=(197,), dtype=torch.float32)
    inputs = leaves(args)
    tail = () if op in ("kron_linear", "masked_lora_linear") else (0.5,)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        getattr(ops, op)(*inputs.values(), *tail)
    given = {inputs[name].data_ptr() for name in tensor_names(args)}
    extra = sum(t.numel() for pointer, t in saved.items() if pointer not in given)
    kept = {"layer_norm_alore": 2 * 197, "masked_lora_linear": 3 * 197}
    assert extra <= kept.get(op, 0) + len(tail)


@pytest.mark.parametrize("op", OPS)
def test_inputs_changed_in_place_before_backward_are_noticed(op, device):
    args = small_args(op, device)
    names = [name for name in tensor_names(args) if name != "bias" or op == "layer_norm_alore"]
    for name in names:
        inputs = leaves(args)
        y = getattr(ops, op)(*inputs.values())
        with torch.no_grad():
            inputs[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Recorder(TorchDispatchMode):
    """Names of the ops that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", forward_calls())
def test_nothing_is_made_up_for_outputs_without_a_gradient(call, device):
    """Autograd by default fills zeros for the statistics, the code and the packed factors in every backward."""
    op, arguments = forward_calls(device)[call]
    inputs = requiring_grad(arguments)
    out = op(*inputs)
    y = out if isinstance(out, torch.Tensor) else out[0]
    grad_out = torch.ones_like(y)
    wanted = [a for a in inputs if isinstance(a, torch.Tensor) and a.requires_grad]
    with Recorder() as recorder:
        torch.autograd.grad(y, wanted, grad_out)
    assert [name for name in recorder.names if "zeros" in name or "fill" in name] == []
    assert sum(name.startswith("alore_ext.") for name in recorder.names) == 1


class TestRefusals:
    """Second derivatives and functorch transforms raise: their answers would be wrong."""

    @pytest.mark.parametrize("op", OPS)
    def test_double_backward(self, op, device):
        args = small_args(op, device)
        for name in tensor_names(args):
            inputs = leaves(args)
            y = getattr(ops, op)(*inputs.values())
            (first,) = torch.autograd.grad(y.square().sum(), inputs[name], create_graph=True)
            assert torch.equal(first, run(ops, op, args, 2 * y.detach())[1][name])
            with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
                first.sum().backward()

    @pytest.mark.parametrize("op", OPS)
    def test_gradient_penalty(self, op, device):
        """Asking for the gradients of some inputs must not route around the refusal and lose the penalty's term."""
        inputs = leaves(small_args(op, device))
        names = tensor_names(inputs)
        y = getattr(ops, op)(*inputs.values())
        (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
        for name in names:
            with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
                torch.autograd.grad(y.sum() + dx.square().sum(), inputs[name], retain_graph=True)

    @pytest.mark.parametrize("op", OPS)
    def test_derivative_with_respect_to_the_output_gradient(self, op, device):
        args = small_args(op, device)
        inputs = leaves(args, {"x"})
        grad_out = output_like(op, args).requires_grad_()
        y = getattr(ops, op)(*inputs.values())
        (dx,) = torch.autograd.grad(y, inputs["x"], grad_out, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
            torch.autograd.grad(dx.sum(), grad_out)

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("transform", ["grad", "jvp", "jacrev", "jacfwd", "hessian"])
    def test_torch_func(self, op, transform, device):
        x, *rest = small_args(op, device).values()

        def total(x):
            return getattr(ops, op)(x, *rest).sum()

        apply = getattr(torch.func, transform)
        with pytest.raises(RuntimeError, match=r"functorch|jvp|forward"):
            apply(total, (x,), (x,)) if transform == "jvp" else apply(total)(x)

    @pytest.mark.parametrize("op", OPS)
    def test_forward_mode(self, op, device):
        x, *rest = small_args(op, device).values()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="jvp is not implemented"):
                getattr(ops, op)(dual, *rest)


@pytest.mark.parametrize("op", OPS)
def test_vmap_gives_what_a_loop_gives(op, device):
    """vmap has no rule for the ops and loops over them; the answers must be right."""
    args = small_args(op, device, lead=(3, 5))
    x, *rest = args.values()
    mapped = torch.func.vmap(lambda x: getattr(ops, op)(x, *rest))(x)
    torch.testing.assert_close(mapped, run(ops, op, args)[0])


class TestCheckpointing:
    """Recomputing the forward draws the same dropout mask, because checkpoint restores torch's generator."""

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("op", ["alore", "layer_norm_alore"])
    def test_dropout(self, op, use_reentrant, device):
        args = small_args(op, device, lead=(19,))
        names = tensor_names(args)

        def gradients(checkpointed):
            inputs = leaves(args)

            def forward(*tensors):
                y = getattr(ops, op)(*(args | dict(zip(names, tensors, strict=True))).values(), 0.4)
                return getattr(ops, op)(y, *list((inputs | {"x": None}).values())[1:], 0.4)

            tensors = [inputs[name] for name in names]
            torch.manual_seed(3)
            y = checkpoint(forward, *tensors, use_reentrant=use_reentrant) if checkpointed else forward(*tensors)
            torch.manual_seed(99)  # what happens between forward and backward must not matter
            y.square().sum().backward()
            return [tensor.grad for tensor in tensors]

        for a, b in zip(gradients(False), gradients(True), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("op", ["kron_linear", "masked_lora_linear"])
    def test_without_dropout(self, op, use_reentrant, device):
        args = small_args(op, device)
        grad_out = output_like(op, args)
        _, expected = run(ops, op, args, grad_out)
        inputs = leaves(args)
        checkpoint(getattr(ops, op), *inputs.values(), use_reentrant=use_reentrant).backward(grad_out)
        for name in tensor_names(args):
            assert torch.equal(inputs[name].grad, expected[name]), name


@pytest.mark.parametrize("op", KRON_OPS)
def test_a_shared_factor_accumulates(op, device):
    """One scale for the whole model: its gradient is the sum over its uses."""
    args = small_args(op, device)
    inputs, grad_out = leaves(args), output_like(op, args)
    y = getattr(ops, op)(*inputs.values()) + getattr(ops, op)(*(inputs | {"x": 2 * args["x"]}).values())
    y.backward(grad_out)
    expected = sum(run(ops, op, args | {"x": factor * args["x"]}, grad_out)[1]["scale"] for factor in (1, 2))
    torch.testing.assert_close(inputs["scale"].grad, expected)


def test_frozen_affine_and_weight_get_no_gradient_work(device):
    """What does not require grad is not returned, even when asked for nothing else but x."""
    for op, args in (
        ("layer_norm_alore", layer_norm_args(device=device)),
        ("masked_lora_linear", lora_args(device=device)),
    ):
        inputs = leaves(args, {"x"})
        getattr(ops, op)(*inputs.values()).sum().backward()
        assert all(inputs[name].grad is None for name in ("weight", "bias"))
        assert inputs["x"].grad is not None
