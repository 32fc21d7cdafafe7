"""Runs every operator forward and backward, and the grouped ones, over odd shapes and every dtype pair, for
compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 benchmarks/exercise_ops.py

Without the caching allocator each tensor is an allocation of its own, so a read one element past it is seen. The
results are compared with the reference in float64, loosely: exactness is the test suite's matter.
"""

import argparse
import itertools
import sys

import torch

from alore_ext import ops, reference

DTYPES = [
    (torch.float64, torch.float64, 1e-10),
    (torch.float32, torch.float32, 1e-3),
    (torch.bfloat16, torch.float32, 1e-1),
    (torch.float16, torch.float16, 5e-2),
]
# num_experts, block width, rank: odd, large and degenerate, (8, 16, 4) and (4, 24, 16) of the fused kernels for any
# shape; then the widths of the pipelined ones.
FACTORS = [(1, 24, 4), (4, 24, 4), (3, 7, 5), (32, 3, 1), (2, 9, 64), (8, 16, 4), (4, 24, 16)]
FACTORS += [(4, width, 4) for width in (32, 64, 96, 128, 192, 256)]
TOKENS = (0, 1, 19, 197)
# Feature maps of the axial shifts: pixels in whole vectors and not, planes smaller than one, groups of one channel.
IMAGES = [(0, 8, 3, 3), (1, 1, 1, 1), (2, 7, 3, 5), (3, 40, 7, 7), (2, 24, 14, 9), (1, 128, 5, 2)]


def leaf(generator, dtype, *shape, spread=1.0):
    value = torch.randn(*shape, dtype=torch.float64, device=generator.device, generator=generator) * spread
    return value.to(dtype).requires_grad_()


def cases(generator, tokens, n, p, r, dtype, factor):
    # 96 features by 64 and up to 16 ranks suit the low-rank linears' fused kernels, 128 and more those of a norm
    # before one; 11 outputs do not.
    d, out, ranks = n * p, 64 if n == 4 else 11, 2 * r
    x = leaf(generator, dtype, tokens, d)
    kron = (
        leaf(generator, factor, n, n, n, spread=n**-0.5),
        leaf(generator, factor, n, p, r, spread=p**-0.5),
        leaf(generator, factor, n, r, p, spread=(n * r) ** -0.5),
    )
    affine = leaf(generator, factor, d), leaf(generator, factor, d)
    coeff = leaf(generator, factor, ranks)
    with torch.no_grad():
        coeff[0] = 0
    lora = (
        leaf(generator, dtype, out, d, spread=d**-0.5),
        leaf(generator, dtype, out),
        leaf(generator, factor, ranks, d, spread=d**-0.5),
        leaf(generator, factor, out, ranks),
        coeff,
    )
    yield "kron_linear", (x, *kron), {}
    yield "alore", (x, *kron), {}
    yield "alore", (x, *kron), {"dropout_p": 0.3}
    yield "layer_norm_alore", (x, *affine, 1e-6, *kron), {}
    yield "layer_norm_alore", (x, *affine, 1e-6, *kron), {"dropout_p": 0.3}
    yield "layer_norm_alore", (x, *affine, 1e-6, *kron), {"residual": x.detach().clone().requires_grad_()}
    yield "masked_lora_linear", (x, *lora), {}
    yield "mlae_linear", (x, *lora[:4], coeff[:2]), {"mask_p": 0.5}
    yield "layer_norm_mlae_linear", (x, *affine, 1e-6, *lora[:4], coeff[:2]), {"mask_p": 0.5}
    if dtype in (torch.bfloat16, torch.float16):  # folds
        yield "mlae_linear", (x, lora[0].detach().float().requires_grad_(), *lora[1:4], coeff[:2]), {"mask_p": 0.5}


def merges(generator, shape, dtype, factor):
    """Weights in every layout with the adapters of both methods, as arguments of the grouped merges."""
    (n, p, r), d = shape, shape[0] * shape[1]
    kron = [
        leaf(generator, factor, n, n, n, spread=n**-0.5),
        leaf(generator, factor, n, p, r, spread=p**-0.5),
        leaf(generator, factor, n, r, p, spread=(n * r) ** -0.5),
    ]
    sides = ["before", "after"] * 3
    weights = [leaf(generator, dtype, *((67, d) if side == "before" else (d, 67))) for side in sides]
    weights[2:4] = [weight.detach().t().contiguous().t() for weight in weights[2:4]]
    weights[4:] = [torch.nn.functional.pad(weight.detach(), (0, 3))[:, :-3] for weight in weights[4:]]
    biases = [leaf(generator, dtype, weight.shape[0]) for weight in weights]
    yield "merge_kron_", weights, [biases, *([f] * 6 for f in kron), sides]
    lora = [[leaf(generator, factor, 2 * r, w.shape[1]) for w in weights]]
    lora += [[leaf(generator, factor, w.shape[0], 2 * r) for w in weights]]
    lora += [[leaf(generator, factor, 2 * r) for _ in weights]]
    yield "merge_lora_", weights, lora


@torch.no_grad()
def wrong_merges(generator, shape, dtype, factor, tolerance) -> int:
    """Grouped merges of one kind of factors; how many weights came out wrong."""
    wrong = 0
    for name, weights, rest in merges(generator, shape, dtype, factor):
        expected = [weight.double().clone() for weight in weights]
        for i, weight in enumerate(expected):
            getattr(reference, name)(weight, *(v.double() if torch.is_tensor(v) else v for v in (x[i] for x in rest)))
        got = [weight.detach() for weight in weights]
        sources = [weight.clone() for weight in got]
        getattr(ops, name.removesuffix("_") + "_grouped_")(got, *rest)
        for weight, exact in zip(got, expected, strict=True):
            if not (weight.double() - exact).norm() <= tolerance * exact.norm():
                wrong += 1
                print(f"{name} {shape} {dtype}: wrong", file=sys.stderr)
        swapped = [torch.full_like(weight, torch.nan) for weight in got]
        getattr(ops, name.removesuffix("_") + "_grouped_")(swapped, *rest, source=sources)
        if not all(torch.equal(a, b) for a, b in zip(swapped, got, strict=True)):
            wrong += 1
            print(f"{name} {shape} {dtype}: from a source, wrong", file=sys.stderr)
    return wrong


@torch.no_grad()
def wrong_grouped(generator, shape, dtype, factor, tolerance) -> int:
    """The ops with one adapter a sample, of unequal rank, one sample without; how many came out wrong."""
    wrong = 0
    index = torch.tensor([1, -1, 0, 1], device=generator.device)
    x = leaf(generator, dtype, 4, 19, shape[0] * shape[1])
    pairs = [dict.fromkeys(("kron", "lora")) for _ in range(2)]
    for pair, rank in zip(pairs, (shape[2], shape[2] + 1), strict=True):
        made = {name: args for name, args, _ in cases(generator, 0, shape[0], shape[1], rank, dtype, factor)}
        pair["kron"], pair["lora"] = made["kron_linear"][1:], made["masked_lora_linear"][1:]
    kron, lora = ([list(values) for values in zip(*(pair[k] for pair in pairs), strict=True)] for k in pairs[0])
    weight, bias = (values[0] for values in lora[:2])
    calls = {
        "kron_linear_grouped": [x, *kron, index],
        "alore_grouped": [x, *kron, index],
        "layer_norm_alore_grouped": [x, None, None, 1e-6, *kron, index],
        "masked_lora_linear_grouped": [x, weight, bias, *lora[2:], index],
    }

    def wide(value):
        if isinstance(value, list):
            return [wide(v) for v in value]
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    for name, args in calls.items():
        exact = getattr(reference, name)(*map(wide, args))
        if not (getattr(ops, name)(*args).double() - exact).norm() <= tolerance * exact.norm():
            wrong += 1
            print(f"{name} {shape} {dtype}: wrong", file=sys.stderr)
    return wrong


def wrong_shifts(generator, shape, dtype, tolerance) -> int:
    """The axial shifts of one feature map, in both layouts and from a misaligned start; how many came out wrong."""
    wrong = 0
    plain = leaf(generator, dtype, *shape).detach()
    misaligned = torch.cat([plain.new_zeros(1), plain.flatten()])[1:].view(shape)
    layouts = plain, plain.to(memory_format=torch.channels_last), misaligned
    for x, shift_size in itertools.product(layouts, (1, 3, 4, 5, 40)):
        for name, dims in (("axial_shift", (2,)), ("axial_shift", (3,)), ("axial_shift_pair", ())):
            results = []
            for module in (ops, reference):
                inputs = x.detach().requires_grad_()
                y = getattr(module, name)(inputs, shift_size, *dims)
                y = y if isinstance(y, tuple) else (y,)
                sum(t.square().sum() for t in y).backward()
                results.append([*y, inputs.grad])
            for got, exact in zip(*results, strict=True):
                if not (got.double() - exact.double()).norm() <= tolerance * exact.double().norm():
                    wrong += 1
                    print(f"{name} {shape} {dtype} shift size {shift_size}: wrong", file=sys.stderr)
    return wrong


def exercise_one(op: str) -> int:
    """Tokens for three rounds and more of every block, in which each stage of shared memory is filled again."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    calls = 0
    for (n, p, r), (dtype, factor, _) in itertools.product(FACTORS, DTYPES[2:3]):
        if n * p % 128 or n != 4:
            continue
        for name, args, options in cases(generator, 4_000_000 // (n * p), n, p, r, dtype, factor):
            if name == op:
                y = getattr(ops, name)(*args, **options)
                sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()
                calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls of {op}")
    return 0 if calls else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="16-bit activations and 197 tokens: for racecheck")
    parser.add_argument("--only", help="an operator's name: it alone, in bfloat16, over three rounds of tiles")
    options = parser.parse_args()
    if options.only is not None:
        return exercise_one(options.only)
    dtypes, token_counts = (DTYPES[2:], TOKENS[-1:]) if options.short else (DTYPES, TOKENS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    calls = wrong = 0
    for (dtype, factor, tolerance), tokens, shape in itertools.product(dtypes, token_counts, FACTORS):
        for name, args, options in cases(generator, tokens, *shape, dtype, factor):
            y = getattr(ops, name)(*args, **options)
            sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()
            calls += 1
            if options:  # a dropout mask of its own; the test suite recovers it
                continue
            wide = [a.detach().double() if torch.is_tensor(a) else a for a in args]
            expected = getattr(reference, name)(*wide)
            error = (y.double() - expected).norm() / expected.norm().clamp_min(1e-30)
            if tokens and not error <= tolerance:
                wrong += 1
                print(f"{name} {tokens} tokens {shape} {dtype}: error {error.item():.2e}", file=sys.stderr)
    for (dtype, factor, tolerance), shape in itertools.product(dtypes, FACTORS):
        wrong += wrong_merges(generator, shape, dtype, factor, tolerance)
        wrong += wrong_grouped(generator, shape, dtype, factor, tolerance)
        calls += 8
    for (dtype, _, tolerance), shape in itertools.product(dtypes, IMAGES):
        wrong += wrong_shifts(generator, shape, dtype, tolerance)
        calls += 45
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls on {device}, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
