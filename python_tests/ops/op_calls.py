"""Calls of every op in the `torch.ops.alore_ext` namespace, backward and in-place ones included, as (op, arguments)."""

import torch
from op_cases import draw, kron_args, layer_norm_args, lora_args, mlae_args, norm_mlae_args, residual_args

namespace = torch.ops.alore_ext


def seed(value, device="cpu"):
    return torch.tensor([value], device=device)


def image(device, dtype, memory_format=torch.contiguous_format):
    """A feature map [B, C, H, W] whose channels divide into no whole groups."""
    return draw(2, 7, 3, 4, dtype=dtype, device=device).to(memory_format=memory_format)


def forward_calls(device="cpu", dtype=torch.float64, factor_dtype=None):
    """The differentiable ops, with the variants of their optional arguments."""
    options = {"device": device, "dtype": dtype, "factor_dtype": factor_dtype}
    kron, norm, lora = kron_args(**options), layer_norm_args(**options), lora_args(**options)
    added = residual_args(**options)
    dropped = (seed(7, device), 0.3)
    low = () if dtype != torch.float32 else (None, 0.0, torch.bfloat16)
    return {
        "kron_linear": (namespace.kron_linear, [*kron.values()]),
        "kron_linear-rectangular": (
            namespace.kron_linear,
            [*kron_args((2, 3, 5, 4, 2, 3), (2, 3), **options).values()],
        ),
        "alore": (namespace.alore, [*kron.values()]),
        "alore-dropout": (namespace.alore, [*kron.values(), *dropped]),
        "layer_norm_alore": (namespace.layer_norm_alore, [*norm.values(), *low]),
        "layer_norm_alore-dropout": (namespace.layer_norm_alore, [*norm.values(), *dropped]),
        "layer_norm_alore-no-affine": (
            namespace.layer_norm_alore,
            [*(norm | {"weight": None, "bias": None}).values()],
        ),
        "layer_norm_alore-weight-only": (namespace.layer_norm_alore, [*(norm | {"bias": None}).values()]),
        "add_layer_norm_alore": (namespace.add_layer_norm_alore, [*added.values(), *low]),
        "add_layer_norm_alore-dropout": (namespace.add_layer_norm_alore, [*added.values(), *dropped]),
        "add_layer_norm_alore-no-affine": (
            namespace.add_layer_norm_alore,
            [*(added | {"weight": None, "bias": None}).values()],
        ),
        "masked_lora_linear": (namespace.masked_lora_linear, [*lora.values()]),
        "masked_lora_linear-no-bias": (namespace.masked_lora_linear, [*(lora | {"bias": None}).values()]),
        "mlae_linear": (namespace.mlae_linear, [*mlae_args(**options).values(), 0.0, True]),
        "mlae_linear-eval": (namespace.mlae_linear, [*mlae_args(expert_rank=1, **options).values(), 0.5, False]),
        "layer_norm_mlae_linear": (
            namespace.layer_norm_mlae_linear,
            [*norm_mlae_args(**options).values(), 0.0, True],
        ),
        "layer_norm_mlae_linear-plain": (
            namespace.layer_norm_mlae_linear,
            [
                *(norm_mlae_args(**options) | {"norm_weight": None, "norm_bias": None, "bias": None}).values(),
                0.5,
                False,
            ],
        ),
        "axial_shift-width": (namespace.axial_shift, [image(device, dtype), 5, 3]),
        "axial_shift-height": (namespace.axial_shift, [image(device, dtype, torch.channels_last), 4, -2]),
        "axial_shift_pair": (namespace.axial_shift_pair, [image(device, dtype), 3]),
        "axial_shift_pair-channels-last": (
            namespace.axial_shift_pair,
            [image(device, dtype, torch.channels_last), 5],
        ),
    }


def folding_calls(device="cpu", low=torch.bfloat16):
    """The low-rank linears on a float32 weight under 16-bit activations, as autocast makes them."""
    options = {"device": device, "dtype": low, "factor_dtype": torch.float32}
    lora, mlae = lora_args(**options), mlae_args(**options)
    for args in (lora, mlae):
        args["weight"] = args["weight"].float()
    return {
        "masked_lora_linear": (namespace.masked_lora_linear, [*lora.values()]),
        "mlae_linear": (namespace.mlae_linear, [*mlae.values(), 0.0, True]),
    }


def backward_calls(device="cpu", dtype=torch.float64, factor_dtype=None):
    """The backward ops, asked for all gradients and for some."""
    options = {"device": device, "dtype": dtype, "factor_dtype": factor_dtype}
    kron, norm, lora = kron_args(**options), layer_norm_args(**options), lora_args(**options)
    grad, grad_sum = (draw(*kron["x"].shape, dtype=dtype, device=device) for _ in range(2))
    lora_grad = draw(5, lora["weight"].shape[0], dtype=dtype, device=device)
    _, mean, rstd = namespace.layer_norm_alore(*norm.values())
    x, weight, bias, _, *factors = norm.values()
    dropped, plain = (seed(7, device), 0.3), (None, 0.0)
    low_rank = lora_backward_args(lora)
    masked = lora_backward_args(mlae_args(**options), torch.tensor([0.0, 2.0, 2.0], device=device))
    return {
        "kron_linear_backward": (namespace.kron_linear_backward, [grad, *kron.values(), [True] * 4]),
        "kron_linear_backward-x-only": (
            namespace.kron_linear_backward,
            [grad, *kron.values(), [True, False, False, False]],
        ),
        "alore_backward": (namespace.alore_backward, [grad, *kron.values(), *plain, [True] * 4]),
        "alore_backward-dropout": (namespace.alore_backward, [grad, *kron.values(), *dropped, [True] * 4]),
        "alore_backward-factors-only": (
            namespace.alore_backward,
            [grad, *kron.values(), *plain, [False, True, True, True]],
        ),
        "layer_norm_alore_backward": (
            namespace.layer_norm_alore_backward,
            [grad, x, weight, bias, mean, rstd, *factors, *plain, [True] * 6],
        ),
        "layer_norm_alore_backward-dropout": (
            namespace.layer_norm_alore_backward,
            [grad, x, weight, bias, mean, rstd, *factors, *dropped, [True] * 6],
        ),
        "layer_norm_alore_backward-no-affine": (
            namespace.layer_norm_alore_backward,
            [grad, x, None, None, mean, rstd, *factors, *plain, [True, False, False, True, True, True]],
        ),
        "layer_norm_alore_backward-sum": (
            namespace.layer_norm_alore_backward,
            [grad, x, weight, bias, mean, rstd, *factors, *plain, [True] * 6, grad_sum],
        ),
        "layer_norm_alore_backward-sum-dropout": (
            namespace.layer_norm_alore_backward,
            [grad, x, None, None, mean, rstd, *factors, *dropped, [True, False, False, True, True, True], grad_sum],
        ),
        "layer_norm_alore_backward-sum-factors-only": (
            namespace.layer_norm_alore_backward,
            [grad, x, weight, bias, mean, rstd, *factors, *plain, [False] * 3 + [True] * 3, grad_sum],
        ),
        "masked_lora_linear_backward": (
            namespace.masked_lora_linear_backward,
            [lora_grad, *low_rank, [True] * 6],
        ),
        "masked_lora_linear_backward-mask": (
            namespace.masked_lora_linear_backward,
            [lora_grad, *masked, [True] * 6],
        ),
        "masked_lora_linear_backward-frozen-weight": (
            namespace.masked_lora_linear_backward,
            [lora_grad, *low_rank, [True, False, False, True, True, True]],
        ),
        "layer_norm_mlae_linear_backward": (
            namespace.layer_norm_mlae_linear_backward,
            [*norm_mlae_backward_args(norm_mlae_args(**options)), [True] * 8],
        ),
        "layer_norm_mlae_linear_backward-frozen": (
            namespace.layer_norm_mlae_linear_backward,
            [
                *norm_mlae_backward_args(norm_mlae_args(**options), through_norm=False),
                [True, False, False, False, False, True, True, True],
            ],
        ),
        "axial_shift_backward": (namespace.axial_shift_backward, [image(device, dtype), 5, 2]),
        "axial_shift_pair_backward": (
            namespace.axial_shift_pair_backward,
            [image(device, dtype, torch.channels_last), image(device, dtype), 4],
        ),
    }


def lora_backward_args(args, mask=None):
    """Arguments of masked_lora_linear_backward behind grad_out, for a forward's arguments."""
    if mask is None:
        _, code, operand = namespace.masked_lora_linear(*args.values())
    else:
        wide = torch.promote_types(args["x"].dtype, torch.float32)
        mask = mask.to(args["x"].device, wide)
        _, code, operand, _ = namespace.mlae_linear(*args.values(), 0.0, False)
    inputs = [value for name, value in args.items() if name != "bias"]
    return [*inputs, mask, code, operand]


def norm_mlae_backward_args(args, through_norm=True):
    """Arguments of layer_norm_mlae_linear_backward, for a forward's; with a gradient of the norm's output too."""
    out, normalised, code, operand, mask, mean, rstd = namespace.layer_norm_mlae_linear(*args.values(), 0.0, False)
    grads = [draw(*t.shape).to(t) for t in (out, normalised)]
    inputs = {
        name: value for name, value in args.items() if name not in ("x", "norm_weight", "norm_bias", "eps", "bias")
    }
    x, norm = args["x"], [args["norm_weight"], args["norm_bias"], args["eps"]]
    return [grads[0], grads[1] if through_norm else None, x, *norm, mean, rstd, *inputs.values(), mask, code, operand]


def merge_calls(device="cpu", dtype=torch.float64, factor_dtype=None):
    """The in-place merges; the weight is square, so that one adapter fits both sides."""
    options = {"device": device, "dtype": dtype, "factor_dtype": factor_dtype}
    _, *factors = kron_args(**options).values()
    lora = lora_args((12, 12, 3), **options)
    weight, bias = lora["weight"], lora["bias"]
    low_rank = [lora["lora_a"], lora["lora_b"], lora["coeff"]]
    return {
        "merge_kron_-before": (namespace.merge_kron_, [weight, bias, *factors, "before"]),
        "merge_kron_-after": (namespace.merge_kron_, [weight.clone(), bias.clone(), *factors, "after"]),
        "merge_kron_-no-bias": (namespace.merge_kron_, [weight.clone(), None, *factors, "after"]),
        "merge_lora_": (namespace.merge_lora_, [weight.clone(), *low_rank]),
        "merge_kron_grouped_": (
            namespace.merge_kron_grouped_,
            [
                [weight.clone() for _ in range(3)],
                [bias.clone(), bias.clone()],
                [0, 2],
                *([factor] * 3 for factor in factors),
                ["before", "after", "after"],
            ],
        ),
        "merge_lora_grouped_": (
            namespace.merge_lora_grouped_,
            [[weight.clone(), weight.clone()], *([factor] * 2 for factor in low_rank)],
        ),
        "merge_kron_grouped_-source": (
            namespace.merge_kron_grouped_,
            [
                [torch.full_like(weight, torch.nan) for _ in range(2)],
                [bias.clone()],
                [1],
                *([factor] * 2 for factor in factors),
                ["before", "after"],
                [weight.clone(), weight.clone()],
            ],
        ),
        "merge_lora_grouped_-source": (
            namespace.merge_lora_grouped_,
            [[torch.full_like(weight, torch.nan)], *([factor] for factor in low_rank), [weight.clone()]],
        ),
    }


def grouped_calls(device="cpu", dtype=torch.float64, factor_dtype=None):
    """The ops that take one adapter a sample: adapters of unequal rank, one sample of three without any."""
    options = {"device": device, "dtype": dtype, "factor_dtype": factor_dtype}
    kron, norm, lora = (make(lead=(3, 5), **options) for make in (kron_args, layer_norm_args, lora_args))
    index = torch.tensor([1, -1, 0], device=device)
    more = [*kron_args((1, 3, 3, 4, 4, 5), (), **options).values()][1:]
    adapters = [[*pair] for pair in zip([*kron.values()][1:], more, strict=True)]
    larger = [*lora_args((12, 9, 4), (), **options).values()][3:]
    low_rank = [[*pair] for pair in zip([*lora.values()][3:], larger, strict=True)]
    # Of a shape that CUDA's fused kernels take in 16 bits.
    even = lora_args((40, 24, 3), (3, 5), **options)
    wider = [*lora_args((40, 24, 17), (), **options).values()][3:]
    even_rank = [[*pair] for pair in zip([*even.values()][3:], wider, strict=True)]
    low = () if dtype != torch.float32 else (torch.bfloat16,)
    return {
        "kron_linear_grouped": (namespace.kron_linear_grouped, [kron["x"], *adapters, index]),
        "alore_grouped": (namespace.alore_grouped, [kron["x"], *adapters, index]),
        "layer_norm_alore_grouped": (
            namespace.layer_norm_alore_grouped,
            [*[*norm.values()][:4], *adapters, index, *low],
        ),
        "masked_lora_linear_grouped": (
            namespace.masked_lora_linear_grouped,
            [*[*lora.values()][:3], *low_rank, index],
        ),
        "masked_lora_linear_grouped-even": (
            namespace.masked_lora_linear_grouped,
            [*[*even.values()][:3], *even_rank, index],
        ),
    }


def requiring_grad(arguments):
    return [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    ]
