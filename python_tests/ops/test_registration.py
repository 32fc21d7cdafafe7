"""opcheck (schema, autograd registration, Meta kernels, AOT dispatch with static and dynamic shapes) and gradcheck."""

import pytest
import torch
from op_calls import (
    backward_calls,
    folding_calls,
    forward_calls,
    grouped_calls,
    merge_calls,
    namespace,
    requiring_grad,
)
from torch.library import opcheck

FORWARD, BACKWARD, MERGES = list(forward_calls()), list(backward_calls()), list(merge_calls())
GROUPED = list(grouped_calls())
LOW = {"dtype": torch.bfloat16, "factor_dtype": torch.float32}


def test_every_op_of_the_library_is_covered():
    calls = forward_calls() | backward_calls() | merge_calls() | grouped_calls()
    covered = {op.default for op, _ in calls.values()}
    registered = {
        getattr(namespace, name.removeprefix("alore_ext::")).default
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("alore_ext::")
    }
    assert covered == registered


@pytest.mark.parametrize("call", FORWARD)
def test_opcheck_forward(call, device):
    op, arguments = forward_calls(device)[call]
    opcheck(op.default, requiring_grad(arguments))


@pytest.mark.parametrize("call", BACKWARD)
def test_opcheck_backward(call, device):
    op, arguments = backward_calls(device)[call]
    opcheck(op.default, arguments)


@pytest.mark.parametrize("call", MERGES)
def test_opcheck_merge(call, device):
    op, arguments = merge_calls(device)[call]
    opcheck(op.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("call", GROUPED)
def test_opcheck_grouped(call, dtype, device):
    op, arguments = grouped_calls(device, dtype)[call]
    opcheck(op.default, arguments)


@pytest.mark.parametrize("call", FORWARD + BACKWARD + MERGES + GROUPED)
def test_meta_kernels_in_sixteen_bit(call, device):
    """Shapes, strides and dtypes on Meta are the real ones where activations and factors differ in dtype too."""
    makers = (forward_calls, backward_calls, merge_calls, grouped_calls)
    op, arguments = {name: made for make in makers for name, made in make(device, **LOW).items()}[call]
    opcheck(op.default, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("call", ["layer_norm_alore", "add_layer_norm_alore"])
def test_meta_kernel_of_the_norm_that_narrows(call, device):
    op, arguments = forward_calls(device, torch.float32)[call]
    assert arguments[-1] == torch.bfloat16
    assert op(*arguments)[0].dtype == torch.bfloat16
    opcheck(op.default, requiring_grad(arguments))


@pytest.mark.parametrize("call", folding_calls())
def test_folding_forward(call, device):
    op, arguments = folding_calls(device)[call]
    assert [t.dtype for t in op(*arguments)[:3]] == [torch.bfloat16] * 3
    opcheck(op.default, requiring_grad(arguments))


@pytest.mark.parametrize("call", FORWARD)
def test_gradcheck(call, device):
    """Every gradient against finite differences; also undefined and batched incoming gradients, and determinism."""
    op, arguments = forward_calls(device)[call]
    # Outputs that have a gradient: y and the sum, or both shifts.
    count = 2 if op in (namespace.add_layer_norm_alore, namespace.axial_shift_pair) else 1

    assert torch.autograd.gradcheck(
        lambda *a: out if isinstance(out := op(*a), torch.Tensor) else out[:count],
        requiring_grad(arguments),
        check_undefined_grad=True,
        check_batched_grad=True,
        nondet_tol=0.0,
    )


def test_merges_return_nothing_and_declare_what_they_write():
    for op, written in (
        (namespace.merge_kron_, ["weight", "bias"]),
        (namespace.merge_lora_, ["weight"]),
        (namespace.merge_kron_grouped_, ["weight", "bias"]),
        (namespace.merge_lora_grouped_, ["weight"]),
    ):
        schema = op.default._schema
        assert list(schema.returns) == []
        assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == written
