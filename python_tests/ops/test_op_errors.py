"""Bad input (DESIGN section 7) raises a RuntimeError that names the op and says what was expected and what came, and
raises the same one on CPU, CUDA and Meta."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from op_calls import lora_backward_args, namespace
from op_cases import kron_args, layer_norm_args, lora_args, mlae_args, residual_args

DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]


def base_calls(device):
    """A good call of each op, by argument name, at p = 0 and float32."""
    options = {"dtype": torch.float32, "device": device}
    kron, norm, lora = kron_args(**options), layer_norm_args(**options), lora_args(**options)
    plain = {"seed": None, "dropout_p": 0.0}
    grad, lora_grad = torch.ones(5, 12, device=device), torch.ones(5, 9, device=device)
    statistics = {"mean": torch.zeros(5, device=device), "rstd": torch.ones(5, device=device)}
    x, weight, bias, eps, *_ = norm.values()
    factors = {name: kron[name] for name in ("scale", "down", "up")}
    norm_backward = {
        **{"grad_out": grad, "x": x, "weight": weight, "bias": bias, **statistics},
        **{**factors, **plain, "output_mask": [True] * 6},
    }
    backward = ("x", "weight", "lora_a", "lora_b", "coeff", "mask", "code", "operand")
    mlae = mlae_args(**options)
    masked = lora_backward_args(mlae, torch.ones(3, device=device))
    square = {"weight": torch.ones(12, 12, device=device), "bias": torch.ones(12, device=device)}
    low_rank = {name: lora[name] for name in ("lora_a", "lora_b", "coeff")}
    return {
        "kron_linear": kron,
        "kron_linear_backward": {"grad_out": grad, **kron, "output_mask": [True] * 4},
        "alore": {**kron, **plain},
        "alore_backward": {"grad_out": grad, **kron, **plain, "output_mask": [True] * 4},
        "layer_norm_alore": {**norm, **plain, "out_dtype": None},
        "add_layer_norm_alore": {**residual_args(**options), **plain, "out_dtype": None},
        "layer_norm_alore_backward": norm_backward,
        "layer_norm_alore_backward (sum)": {**norm_backward, "grad_sum": grad},
        "masked_lora_linear": lora,
        "mlae_linear": {**mlae, "mask_p": 0.5, "training": True},
        "masked_lora_linear_backward": {
            "grad_out": lora_grad,
            **dict(zip(backward, lora_backward_args(lora), strict=True)),
            "output_mask": [True] * 6,
        },
        "masked_lora_linear_backward (mask)": {
            "grad_out": lora_grad,
            **dict(zip(backward, masked, strict=True)),
            "output_mask": [True] * 6,
        },
        "merge_kron_": {**square, **factors, "side": "before"},
        "merge_lora_": {"weight": lora["weight"], **low_rank},
    }


@dataclass(frozen=True)
class Bad:
    """One argument replaced; the message must contain every one of `says`."""

    argument: str
    value: Any  # callable: from the good value; otherwise the value itself
    says: tuple[str, ...]
    also: dict[str, Any] = field(default_factory=dict)  # other arguments that this case needs

    def apply(self, call, device):
        def made(name, value):
            return value(call[name]) if callable(value) else value

        changed = {self.argument: made(self.argument, self.value)}
        changed |= {name: made(name, value) for name, value in self.also.items()}
        return call | {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in changed.items()
        }


def to(dtype):
    return lambda t: t.to(dtype)


def wider(axis):
    return lambda t: torch.cat([t, t.narrow(axis, 0, 1)], axis)


def flat(t):
    return t.flatten()


def empty(t):
    return t[:0]


def overlapping(t):
    return t[:1].expand_as(t)


KRON = [
    Bad("x", to(torch.int64), ("x must be float64, float32, bfloat16 or float16", "Long")),
    Bad("x", to(torch.complex64), ("x must be float64, float32, bfloat16 or float16", "ComplexFloat")),
    Bad("x", lambda t: t[0, 0], ("x must have at least one axis",)),
    Bad("x", wider(1), ("last axis of x must be s_in * p_in = 3 * 4 = 12", "[5, 13]")),
    Bad("scale", flat, ("scale must be [num_experts, s_in, s_out]", "[18]")),
    Bad("down", flat, ("down must be [num_experts, p_in, rank]", "[16]")),
    Bad("up", flat, ("up must be [num_experts, rank, p_out]", "[16]")),
    Bad("scale", wider(0), ("must agree in num_experts", "got 3, 2 and 2")),
    Bad("down", wider(0), ("must agree in num_experts", "got 2, 3 and 2")),
    Bad("up", wider(0), ("must agree in num_experts", "got 2, 2 and 3")),
    Bad("down", wider(2), ("must agree in rank", "[2, 4, 3]", "[2, 2, 4]")),
    Bad("scale", wider(1), ("last axis of x must be s_in * p_in = 4 * 4 = 16", "[5, 12]")),
    Bad("down", wider(1), ("last axis of x must be s_in * p_in = 3 * 5 = 15", "[5, 12]")),
    Bad("scale", empty, ("scale must have no empty axis", "[0, 3, 3]")),
    Bad("up", lambda t: t[:, :, :0], ("up must have no empty axis", "[2, 2, 0]")),
    Bad("scale", to(torch.float64), ("down must have scale's dtype Double", "Float")),
    Bad("down", to(torch.bfloat16), ("down must have scale's dtype Float", "BFloat16")),
    Bad("up", to(torch.float16), ("up must have scale's dtype Float", "Half")),
    Bad("x", to(torch.float64), ("scale must be Double (x's dtype)", "got Float")),
    Bad(
        "x",
        to(torch.bfloat16),
        ("scale must be BFloat16 (x's dtype) or Float", "got Half"),
        {name: to(torch.float16) for name in ("scale", "down", "up")},
    ),
]
RESIDUAL = [Bad("up", wider(2), ("s_out * p_out must be 12", "3 * 5 = 15"))]
SEED = torch.zeros(1, dtype=torch.int64)
DROPOUT = [
    Bad("dropout_p", 1.0, ("dropout_p must be in [0, 1)", "got 1"), {"seed": SEED}),
    Bad("dropout_p", -0.5, ("dropout_p must be in [0, 1)", "got -0.5"), {"seed": SEED}),
    Bad("dropout_p", float("nan"), ("dropout_p must be in [0, 1)", "nan"), {"seed": SEED}),
    Bad("dropout_p", 0.5, ("needs a seed tensor", "got none")),
    Bad("seed", SEED.float(), ("seed must be one int64", "Float"), {"dropout_p": 0.5}),
    Bad("seed", SEED.int(), ("seed must be one int64", "Int"), {"dropout_p": 0.5}),
    Bad("seed", torch.zeros(2, dtype=torch.int64), ("seed must be one int64", "[2]"), {"dropout_p": 0.5}),
    Bad("seed", SEED[:0], ("seed must be one int64", "[0]"), {"dropout_p": 0.5}),
]
NORM = [
    Bad("weight", wider(0), ("weight must be [12]", "[13]")),
    Bad("bias", wider(0), ("bias must be [12]", "[13]")),
    Bad("weight", lambda t: t[None], ("weight must be [12]", "[1, 12]")),
    Bad("weight", to(torch.float64), ("weight must be Float (x's dtype)", "Double"), {"bias": None}),
    Bad("bias", to(torch.bfloat16), ("bias must be Float (x's dtype)", "BFloat16"), {"weight": None}),
    Bad(
        "bias",
        to(torch.float32),
        ("bias must have weight's dtype BFloat16", "got Float"),
        {name: to(torch.bfloat16) for name in ("x", "weight")},
    ),
]
NORM_FORWARD = [
    Bad("eps", -1e-6, ("eps must not be negative", "-1e-06")),
    Bad("eps", float("nan"), ("eps must not be negative", "nan")),
    Bad("out_dtype", torch.float64, ("out_dtype must be x's dtype, or 16-bit for a Float x", "Double for Float")),
]
ADDED = [
    Bad("residual", lambda t: t[:4], ("residual must have x's shape [5, 12]", "got [4, 12]")),
    Bad("residual", lambda t: t[0], ("residual must have x's shape [5, 12]", "got [12]")),
    Bad("residual", to(torch.bfloat16), ("residual must have x's dtype Float", "got BFloat16")),
    Bad("residual", to(torch.float64), ("residual must have x's dtype Float", "got Double")),
]
GRAD = [
    Bad("grad_out", lambda t: t[:4], ("grad_out must be [5, ", "got [4, ")),
    Bad("grad_out", lambda t: t[0], ("grad_out must be [5, ", "got [")),
    Bad("grad_out", to(torch.float64), ("grad_out must be ", "Double")),
]
GRAD_SUM = [
    Bad("grad_sum", lambda t: t[:4], ("grad_sum must be [5, 12]", "got [4, 12]")),
    Bad("grad_sum", to(torch.bfloat16), ("grad_sum must be Float", "got BFloat16")),
]
STATISTICS = [
    Bad("mean", lambda t: t[:4], ("mean must be [5]", "[4]")),
    Bad("rstd", lambda t: t[None], ("rstd must be [5]", "[1, 5]")),
    Bad("mean", to(torch.float64), ("mean must be Float", "Double")),
    Bad("rstd", to(torch.bfloat16), ("rstd must be Float", "BFloat16")),
]
LORA_FACTORS = [
    Bad("weight", flat, ("weight must be [out_features, in_features]", "[108]")),
    Bad("lora_a", wider(1), ("lora_a must be [R, in_features]=[R, 12] with R > 0", ", 13]")),
    Bad("lora_a", empty, ("lora_a must be [R, in_features]=[R, 12] with R > 0", "[0, 12]")),
    Bad("lora_b", wider(0), ("lora_b must be [out_features, R]=[9, ", "[10, ")),
    Bad("lora_b", wider(1), ("lora_b must be [out_features, R]=[9, ", "got [9, ")),
    Bad("lora_b", to(torch.float64), ("lora_b must have lora_a's dtype Float", "Double")),
    Bad("coeff", to(torch.bfloat16), ("coeff must have lora_a's dtype Float", "BFloat16")),
]
COEFF = [
    Bad("coeff", wider(0), ("coeff must be [R]=[3]", "[4]")),
    Bad("coeff", lambda t: t[None], ("coeff must be [R]=[3]", "[1, 3]")),
]
EXPERTS = [
    Bad("coeff", wider(0), ("coeff must be [num_experts] with num_experts dividing R=6", "[4]")),
    Bad("coeff", empty, ("coeff must be [num_experts] with num_experts dividing R=6", "[0]")),
    Bad("coeff", lambda t: t[None], ("coeff must be [num_experts]", "[1, 3]")),
]
MASK_P = [
    Bad("mask_p", 1.0, ("mask_p must be in [0, 1)", "got 1")),
    Bad("mask_p", -0.5, ("mask_p must be in [0, 1)", "got -0.5")),
    Bad("mask_p", float("nan"), ("mask_p must be in [0, 1)", "nan")),
]
LORA = [
    *LORA_FACTORS,
    Bad("x", to(torch.int32), ("x must be float64, float32, bfloat16 or float16", "Int")),
    Bad("x", lambda t: t[0, 0], ("x must have at least one axis",)),
    Bad("x", wider(1), ("last axis of x must be in_features=12", "[5, 13]")),
    Bad("weight", to(torch.float64), ("weight must have x's dtype Float", "Double")),
    Bad(
        "lora_a",
        to(torch.float64),
        ("lora_a must be Float (x's dtype)", "Double"),
        {name: to(torch.float64) for name in ("lora_b", "coeff")},
    ),
]
LORA_BACKWARD = [
    Bad("code", wider(1), ("code must be Float [5, ", "as the forward returned it")),
    Bad("code", to(torch.bfloat16), ("code must be Float", "got BFloat16")),
    Bad("operand", lambda t: t.new_zeros(8), ("operand must be Float [0]", "got Float [8]")),
]
LORA_MASK = [
    Bad("mask", wider(0), ("mask must be Float [3]", "[4]")),
    Bad("mask", to(torch.float64), ("mask must be Float [3]", "Double")),
]
LORA_BIAS = [
    Bad("bias", wider(0), ("bias must be [9]", "[10]")),
    Bad("bias", to(torch.float64), ("bias must have x's dtype Float", "Double")),
]
MERGE_KRON = [
    Bad("side", "left", ('side must be "before" or "after"', '"left"')),
    Bad("weight", to(torch.int64), ("weight must be float64, float32, bfloat16 or float16", "Long")),
    Bad("weight", flat, ("weight must be [out_features, in_features]", "[144]")),
    Bad("weight", wider(1), ("must be square on weight's in_features=13", "12 -> 12")),
    Bad("weight", wider(0), ("must be square on weight's out_features=13", "12 -> 12"), {"side": "after"}),
    Bad("up", wider(2), ("must be square on weight's in_features=12", "12 -> 15")),
    Bad("bias", wider(0), ("bias must be [12]", "[13]")),
    Bad("bias", to(torch.int64), ("bias must be float64, float32, bfloat16 or float16", "Long")),
    Bad("scale", flat, ("scale must be [num_experts, s_in, s_out]", "[18]")),
    Bad("down", to(torch.float64), ("down must have scale's dtype Float", "Double")),
    Bad(
        "scale",
        to(torch.int32),
        ("scale must be float64, float32, bfloat16 or float16", "Int"),
        {name: to(torch.int32) for name in ("down", "up")},
    ),
    Bad("weight", overlapping, ("weight must not overlap itself in memory", "[0, 1]")),
    Bad("bias", overlapping, ("bias must not overlap itself in memory", "[0]"), {"side": "after"}),
]
MERGE_LORA = [
    *LORA_FACTORS,
    Bad("weight", to(torch.int64), ("weight must be float64, float32, bfloat16 or float16", "Long")),
    Bad("weight", overlapping, ("weight must not overlap itself in memory", "[0, 1]")),
]
BAD = {
    "kron_linear": KRON,
    "kron_linear_backward": KRON + GRAD,
    "alore": KRON + RESIDUAL + DROPOUT,
    "alore_backward": KRON + RESIDUAL + DROPOUT + GRAD,
    "layer_norm_alore": KRON + RESIDUAL + DROPOUT + NORM + NORM_FORWARD,
    # NORM's last case has a 16-bit x, which a float32 residual does not go with.
    "add_layer_norm_alore": KRON + RESIDUAL + DROPOUT + NORM[:-1] + NORM_FORWARD + ADDED,
    "layer_norm_alore_backward (sum)": GRAD_SUM,
    "layer_norm_alore_backward": KRON + RESIDUAL + DROPOUT + NORM + GRAD + STATISTICS,
    "masked_lora_linear": LORA + COEFF + LORA_BIAS,
    "mlae_linear": LORA + EXPERTS + LORA_BIAS + MASK_P,
    "masked_lora_linear_backward": LORA + COEFF + GRAD + LORA_BACKWARD,
    "masked_lora_linear_backward (mask)": LORA + EXPERTS + GRAD + LORA_BACKWARD + LORA_MASK,
    "merge_kron_": MERGE_KRON,
    "merge_lora_": MERGE_LORA + COEFF,
}
CASES = [
    pytest.param(op, bad, id=f"{op}-{bad.argument}-{index}")
    for op, list_ in BAD.items()
    for index, bad in enumerate(list_)
]


def op_named(call):
    """A call's name is its op's, with what sets it apart behind it."""
    return call.partition(" ")[0]


def failure(op, arguments):
    with pytest.raises(RuntimeError) as caught:
        getattr(namespace, op_named(op))(*arguments.values())
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", BAD)
def test_the_good_call_is_good(op, device):
    getattr(namespace, op_named(op))(*base_calls(device)[op].values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "bad"), CASES)
def test_message(op, bad, device):
    message = failure(op, bad.apply(base_calls(device)[op], device))
    assert message.startswith(f"{op_named(op)}: ")
    for part in bad.says:
        assert part in message


MIXED = [
    pytest.param(op, name, dropout_p, id=f"{op}-{name}-p{dropout_p}")
    for op, call in base_calls("cpu").items()
    for name, value in call.items()
    if isinstance(value, torch.Tensor) or name == "seed"
    for dropout_p in ((0.0, 0.5) if "seed" in call else (None,))
]


@pytest.mark.parametrize(("op", "argument", "dropout_p"), MIXED)
def test_one_tensor_on_another_device(op, argument, dropout_p, device):
    """A real x with one meta tensor must raise: the Meta kernel it would reach returns memory that nobody wrote."""
    call = base_calls(device)[op]
    if dropout_p is not None:
        call |= {"seed": SEED.to(device), "dropout_p": dropout_p}
    call[argument] = call[argument].to("meta")
    message = failure(op, call)
    assert message.startswith(f"{op_named(op)}: ") and "meta" in message and device.type in message


@pytest.mark.parametrize("op", ["kron_linear", "masked_lora_linear"])
def test_sparse_tensors_are_refused(op, device):
    call = base_calls(device)[op]
    for name in call:
        with pytest.raises((RuntimeError, NotImplementedError)):
            getattr(namespace, op)(*(call | {name: call[name].to_sparse()}).values())


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_an_absent_affine(missing, device):
    """Asked for all gradients, every device returns the same ones: those of what is there."""
    call = base_calls(device)["layer_norm_alore_backward"] | dict.fromkeys(missing)
    grads = dict(
        zip(
            ("x", "weight", "bias", "scale", "down", "up"),
            namespace.layer_norm_alore_backward(*call.values()),
            strict=True,
        )
    )
    for name, grad in grads.items():
        assert (grad is None) == (name in missing), name


def test_a_failed_merge_changes_nothing(device):
    """Every bad merge above leaves weight and bias as they were."""
    for op in ("merge_kron_", "merge_lora_"):
        for bad in BAD[op]:
            call = bad.apply(base_calls(device)[op], device)
            before = {n: call[n].clone() for n in ("weight", "bias") if n in call}
            failure(op, call)
            for name, value in before.items():
                assert torch.equal(call[name], value), f"{op} {bad.argument}: {name} changed"


def test_in_features_of_zero(device):
    """A linear over nothing has no low-rank update: refused alike on every device."""
    for where in {str(device), "meta"}:
        call = base_calls(where)["masked_lora_linear"]
        for name in ("x", "weight", "lora_a"):
            call[name] = call[name][:, :0]
        with pytest.raises(RuntimeError, match="masked_lora_linear: weight must be .* with no empty axis"):
            namespace.masked_lora_linear(*call.values())
