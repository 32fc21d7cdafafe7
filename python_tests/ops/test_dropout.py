"""Dropout on the branch of alore and layer_norm_alore: Philox4x32-10, counter = element index / 4, key = the seed."""

import math

import pytest
import torch
from marks import needs_cuda
from op_cases import assert_matches_oracle, draw, leaves, output_like, run, small_args, to_double

from alore_ext import ops, reference

DROPOUT_OPS = ["alore", "layer_norm_alore"]
WIDE = (2, 2, 2, 32, 32, 4)


def call(op, args, seed, p):
    """The op with a seed of one's own; first output only."""
    seed = torch.tensor([seed], device=args["x"].device)
    out = getattr(torch.ops.alore_ext, op)(*args.values(), seed, p)
    return out if op == "alore" else out[0]


def branch_only(device, num_tokens=64, embed_dim=64):
    """alore of these arguments is 1 + the dropped branch, whose every element is 1 before dropout."""
    options = {"dtype": torch.float64, "device": device}
    return {
        "x": torch.ones(num_tokens, embed_dim, **options),
        "scale": torch.ones(1, 1, 1, **options),
        "down": torch.full((1, embed_dim, 1), 1 / embed_dim, **options),
        "up": torch.ones(1, 1, embed_dim, **options),
    }


def without_branch(args):
    return args | {"up": torch.zeros_like(args["up"])}


def kept(op, args, seed, p):
    """The mask, seen from outside: where the branch reaches the output."""
    return call(op, args, seed, p) != call(op, without_branch(args), seed, 0.0)


def philox4x32_10(counter, key):
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); four and two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def expected_mask(seed, p, elements):
    """True where kept: 32 random bits, as a fraction of 2^32, are not below p."""
    key = (seed % 2**32, seed // 2**32 % 2**32)
    bits = [w for i in range((elements + 3) // 4) for w in philox4x32_10((i % 2**32, i >> 32, 0, 0), key)]
    return torch.tensor([w >= math.floor(p * 2**32) for w in bits[:elements]])


def test_philox_of_this_file_gives_the_published_vectors():
    """Known answers of the Random123 distribution (kat_vectors)."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert philox4x32_10((0,) * 4, (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32_10((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox4x32_10(pi[:4], pi[4:]) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("seed", [0, 1, 2**32, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize(("num_tokens", "embed_dim"), [(1, 1), (5, 13), (19, 24)])
def test_mask_is_philox_of_seed_and_element(seed, num_tokens, embed_dim, device):
    """The same on every device; the number of elements need not be a multiple of 4."""
    mask = call("alore", branch_only(device, num_tokens, embed_dim), seed, 0.37) != 1
    assert torch.equal(mask.flatten().cpu(), expected_mask(seed, 0.37, num_tokens * embed_dim))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mask_does_not_depend_on_dtype_or_op(dtype, device):
    x = {"x": draw(40, 64, dtype=dtype, device=device)}
    factors = {name: value.to(dtype) for name, value in branch_only(device).items() if name != "x"}
    factors["up"] *= 64  # the branch stands clear of the sum's rounding
    factors["down"].fill_(1)
    mask = call("alore", {"x": x["x"].abs() + 1, **factors}, 21, 0.5) > 10
    assert torch.equal(mask.flatten().cpu(), expected_mask(21, 0.5, 40 * 64))
    norm = {**x, "weight": torch.zeros_like(x["x"][0]), "bias": torch.ones_like(x["x"][0]), "eps": 1e-6}
    mask = call("layer_norm_alore", norm | factors, 21, 0.5) > 10
    assert torch.equal(mask.flatten().cpu(), expected_mask(21, 0.5, 40 * 64))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate_is_binomial_overall_and_in_every_column(p, device):
    rows, columns = 2000, 100
    mask = call("alore", branch_only(device, rows, columns), 1234, p) != 1
    for counts, trials in ((mask.sum(), rows * columns), (mask.sum(0), rows), (mask.sum(1), columns)):
        deviation = (counts.double() - trials * (1 - p)).abs().max()
        assert deviation <= 6 * math.sqrt(trials * p * (1 - p)) + 1


def test_seeds_draw_unrelated_masks(device):
    """Neighbouring seeds agree on half of the elements at p = 0.5, as independent draws do."""
    args = branch_only(device, 500, 100)
    masks = [call("alore", args, seed, 0.5) != 1 for seed in (0, 1, 2, 2**32, -1)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean().item() - 0.5) < 6 * 0.5 / math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_kept_elements_are_divided_by_the_keep_probability(p, device):
    y = call("alore", branch_only(device), 5, p)
    values = set((y - 1).unique().tolist())
    assert len(values) == 2 and 0.0 in values
    assert max(values) == pytest.approx(1 / (1 - p), rel=1e-15)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("op", DROPOUT_OPS)
def test_forward_and_gradients_against_the_oracle_with_the_same_mask(op, p, device):
    args = small_args(op, device, dims=WIDE, lead=(3, 7))
    seed = 77
    mask = kept(op, args, seed, p)
    assert 0.3 < mask.double().mean() < 0.99
    inputs, grad_out = leaves(args), output_like(op, args)
    y = call(op, inputs, seed, p)
    y.backward(grad_out)
    exact = leaves(args)
    base = getattr(reference, op)(*without_branch(exact).values())
    expected = base + (getattr(reference, op)(*exact.values()) - base) * mask / (1 - p)
    expected.backward(grad_out)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                value.grad, exact[name].grad, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", DROPOUT_OPS)
def test_precision(op, dtype, device):
    """Dropped elements are the base itself; kept ones are within two roundings of it plus the scaled branch."""
    args = small_args(op, device, dims=WIDE, lead=(197,), dtype=dtype, factor_dtype=torch.float32)
    y, exact = call(op, args, 9, 0.25).double(), to_double(args)
    torch.testing.assert_close(y, call(op, exact, 9, 0.25), rtol=4 * torch.finfo(dtype).eps, atol=0.03)
    dropped = ~expected_mask(9, 0.25, y.numel()).view(y.shape).to(device)
    assert torch.equal(y[dropped], call(op, without_branch(args), 9, 0.25).double()[dropped])


class TestWrapper:
    """Where alore_ext.ops draws the seed from, and when it does."""

    @pytest.mark.parametrize("op", DROPOUT_OPS)
    def test_manual_seed_reproduces(self, op, device):
        args = small_args(op, device, dims=WIDE)
        results = []
        for _ in range(2):
            torch.manual_seed(17)
            results.append([getattr(ops, op)(*args.values(), 0.5) for _ in range(2)])
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert not torch.equal(results[0][0], results[0][1])

    @pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (0.0, False)])
    @pytest.mark.parametrize("op", DROPOUT_OPS)
    def test_nothing_to_drop_is_the_plain_op_and_draws_no_seed(self, op, p, training, device):
        args = small_args(op, device)
        grad_out = output_like(op, args)
        expected, expected_grads = run(ops, op, args, grad_out)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        inputs = leaves(args)
        y = getattr(ops, op)(*inputs.values(), dropout_p=p, training=training)
        assert torch.equal(torch.get_rng_state(), state)
        y.backward(grad_out)
        assert torch.equal(y, expected)
        for name, grad in expected_grads.items():
            assert torch.equal(inputs[name].grad, grad), name

    @pytest.mark.parametrize("op", DROPOUT_OPS)
    def test_backward_draws_nothing(self, op, device):
        inputs = leaves(small_args(op, device))
        y = getattr(ops, op)(*inputs.values(), 0.5)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
    @pytest.mark.parametrize("op", DROPOUT_OPS)
    def test_probability_is_checked_in_eval_too(self, op, p, training, device):
        with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got"):
            getattr(ops, op)(*small_args(op, device).values(), dropout_p=p, training=training)

    @pytest.mark.parametrize("op", DROPOUT_OPS)
    def test_empty_input(self, op, device):
        inputs = leaves(small_args(op, device, lead=(0, 3)))
        getattr(ops, op)(*inputs.values(), 0.5).sum().backward()
        assert inputs["scale"].grad.count_nonzero() == 0


def test_low_probability_in_sixteen_bit_stays_within_the_budget(device):
    """p so small that (almost surely) nothing is dropped takes the dropout path; it must be as exact as the other."""
    args = small_args("alore", device, dims=WIDE, lead=(19,), dtype=torch.bfloat16)
    assert_matches_oracle("alore", args)
    dropped, plain = call("alore", args, 3, 1e-9), call("alore", args, 3, 0.0)
    torch.testing.assert_close(dropped, plain, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("op", [pytest.param(op, marks=needs_cuda) for op in DROPOUT_OPS])
def test_cuda_graph_draws_a_new_mask_at_each_replay(op):
    """The seed stays on the device: nothing is baked into a captured graph, and backward sees forward's mask."""
    args = small_args(op, "cuda", dims=WIDE, lead=(64,), dtype=torch.float32)
    inputs = leaves(args)

    def step():
        y = getattr(ops, op)(*inputs.values(), 0.5)
        return y, torch.autograd.grad(y.sum(), inputs["up"])[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # warm-up: cuBLAS allocates its workspace outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grad = step()
    results = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        results.append((y.clone(), grad.clone()))
    assert not torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])
