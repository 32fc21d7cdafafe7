"""One adapter a sample: against each sample through the single op's oracle, on the path that the device takes and on
the composition that CUDA falls back to (which the dispatcher runs on any device, under its own key)."""

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from marks import needs_cuda
from op_calls import namespace
from op_cases import DTYPES, EAGER, assert_within_budget, draw, kron_args, lora_args, to_double

from alore_ext import ops, reference

KRON = ("kron_linear_grouped", "alore_grouped", "layer_norm_alore_grouped")
LORA = "masked_lora_linear_grouped"
OPS = (*KRON, LORA)
FOLDERS = [str(folder) for folder in Path(__file__).parents[:2]]  # of this file's imports, for another process
ADAPTERS = {**dict.fromkeys(KRON, ("scale", "down", "up")), LORA: ("lora_a", "lora_b", "coeff")}

# Adapters of (num_experts, s, rank) by embed_dim; of R for the low-rank linear. The first two sets are fused on CUDA in
# 16-bit (columns that are whole groups of 32, and some that are not), the others are not.
SETS = {
    "one": (96, [(4, 4, 2)], [3]),
    "mixed": (192, [(4, 4, 4), (1, 2, 5), (3, 3, 3), (2, 1, 1), (4, 8, 16), (6, 6, 3)], [8, 1, 5, 3, 16, 2]),
    "odd": (60, [(3, 4, 2), (1, 4, 7), (2, 4, 1)], [2, 9, 4]),
    "wide": (24, [(6, 12, 5), (1, 2, 3), (2, 12, 70)], [70, 3, 1]),
}
# Unsorted, repeated, some without an adapter, some adapters unused. Taken modulo the number of adapters.
INDEX = [2, -1, 0, 5, 2, -1, 2]


@pytest.fixture(params=["device", "composed"])
def library(request):
    """The ops as called, and their composition."""
    if request.param == "device":
        return ops
    key = torch._C.DispatchKey.CompositeExplicitAutograd

    def composed(op):
        def call(*args):
            with torch.no_grad():
                return getattr(namespace, op).default._op_dk(key, *args)

        return call

    return SimpleNamespace(**{op: composed(op) for op in OPS})


def grouped_args(op, which="mixed", index=INDEX, lead=(19,), dtype=torch.float64, factor_dtype=None, device="cpu"):
    """Arguments of a grouped op: adapters as lists."""
    dim, krons, ranks = SETS[which]
    options = {"dtype": dtype, "factor_dtype": factor_dtype, "device": device}
    if op == LORA:
        entries = [lora_args((dim, 40, rank), (), **options) for rank in ranks]
    else:
        entries = [kron_args((e, s, s, dim // s, dim // s, r), (), **options) for e, s, r in krons]
    args = {"x": draw(len(index), *lead, dim, dtype=dtype, device=device)}
    if op == LORA:
        args |= {"weight": entries[0]["weight"], "bias": entries[0]["bias"]}
    elif op == "layer_norm_alore_grouped":
        args["weight"] = draw(dim, gain=0.3, dtype=dtype, device=device) + 1
        args |= {"bias": draw(dim, gain=0.3, dtype=dtype, device=device), "eps": 1e-6}
    args |= {name: [entry[name] for entry in entries] for name in ADAPTERS[op]}
    numbers = [i if i < 0 else i % len(entries) for i in index]
    return args | {"index": torch.tensor(numbers, dtype=torch.int64, device=device)}


def exact(op, args):
    """The oracle in float64."""
    adapters = {name: [t.double() for t in args[name]] for name in ADAPTERS[op]}
    return getattr(reference, op)(*(to_double(args) | adapters | {"index": args["index"]}).values())


def eager(op, args):
    """What a user would write: a loop over samples, in the call's dtype."""
    single, adapters = op.removesuffix("_grouped"), ADAPTERS[op]
    x, rest = args["x"], {k: v for k, v in args.items() if k not in ("x", "index", *adapters)}

    def sample(row, i):
        if i >= 0:
            return getattr(EAGER, single)(row, *rest.values(), *(args[name][i].to(row.dtype) for name in adapters))
        if op == LORA:
            return F.linear(row, *rest.values())
        if op == "layer_norm_alore_grouped":
            return F.layer_norm(row, row.shape[-1:], *rest.values())
        return row if op == "alore_grouped" else torch.zeros_like(row)

    return torch.stack([sample(row, i) for row, i in zip(x, args["index"].tolist(), strict=True)])


def assert_matches(library, op, args):
    got = getattr(library, op)(*args.values())
    assert got.dtype == args["x"].dtype and got.is_contiguous()
    assert_within_budget(got, exact(op, args), eager(op, args), op)
    return got


@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("op", OPS)
def test_every_sample_is_its_single_ops(op, which, dtype, factor_dtype, library, device):
    args = grouped_args(op, which, dtype=dtype, factor_dtype=factor_dtype, device=device)
    assert_matches(library, op, args)


@pytest.mark.parametrize("index", [[0], [-1], [3] * 5, [-1] * 4, [5, 4, 3, 2, 1, 0], list(range(6)) * 60])
@pytest.mark.parametrize("op", OPS)
def test_indices(op, index, library, device):
    for lead, dtype in (((), torch.bfloat16), ((3, 11), torch.bfloat16), ((17,), torch.float64)):
        assert_matches(library, op, grouped_args(op, index=index, lead=lead, dtype=dtype, device=device))


@pytest.mark.parametrize("op", OPS)
def test_nothing_added_is_exact(op, library, device):
    """Without adapters there is no rounding besides the base's: 0, x, the norm, the linear."""
    args = grouped_args(op, index=[-1] * 3, dtype=torch.float32, device=device)
    got, expected = getattr(library, op)(*args.values()), eager(op, args)
    if op in ("kron_linear_grouped", "alore_grouped"):
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", OPS)
def test_more_tokens_than_a_block_takes_at_once(op, library, device):
    index = [0, 3, -1]
    assert_matches(library, op, grouped_args(op, index=index, lead=(577,), dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_more_adapters_than_a_launch_takes(op, dtype, library, device):
    args = grouped_args(op, dtype=dtype, device=device)
    for name in ADAPTERS[op]:
        args[name] = [t * (1 + k / 16) for k in range(23) for t in args[name]]
    args["index"] = torch.tensor([137, 127, 128, -1, 95, 96, 0], device=device)
    assert_matches(library, op, args)


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
@pytest.mark.parametrize("op", OPS)
def test_zero_tokens_and_zero_samples(op, lead, library, device):
    for dtype in (torch.float64, torch.bfloat16):
        for index, axes in ((INDEX, lead), ([], (5,)), ([], lead)):
            args = grouped_args(op, index=index, lead=axes, dtype=dtype, device=device)
            got = getattr(library, op)(*args.values())
            assert got.shape == (len(index), *axes, 40 if op == LORA else 192) and got.dtype == dtype


@pytest.mark.parametrize("op", OPS)
def test_stacked_adapters(op, device):
    for dtype in (torch.float32, torch.bfloat16):
        args = grouped_args(op, "one", index=[1, -1, 0, 2], dtype=dtype, device=device)
        lists = {name: [args[name][0] * k for k in (1, 2, 3)] for name in ADAPTERS[op]}
        args["index"] = torch.tensor([1, -1, 0, 2], device=device)
        stacked = {name: torch.stack(values) for name, values in lists.items()}
        assert torch.equal(getattr(ops, op)(*(args | stacked).values()), getattr(ops, op)(*(args | lists).values()))
        # Factors of another layout: the same values.
        strided = {name: [t.mT.contiguous().mT if t.dim() > 1 else t for t in lists[name]] for name in lists}
        assert torch.equal(getattr(ops, op)(*(args | strided).values()), getattr(ops, op)(*(args | lists).values()))


@pytest.mark.parametrize("op", OPS)
def test_layouts_of_the_inputs(op, library, device):
    args = grouped_args(op, dtype=torch.bfloat16, device=device)
    expected = getattr(library, op)(*args.values())
    wide = torch.full((*args["x"].shape[:-1], args["x"].shape[-1] + 1), torch.nan, dtype=torch.bfloat16, device=device)
    wide[..., 1:] = args["x"]
    index = torch.stack([args["index"], args["index"] * 0 - 7], 1)
    got = getattr(library, op)(*(args | {"x": wide[..., 1:], "index": index[:, 0]}).values())
    assert torch.equal(got, expected)
    # Contiguous, but not at a multiple of 16 bytes.
    room = torch.empty(args["x"].numel() + 1, dtype=torch.bfloat16, device=device)
    shifted = room[1:].view(args["x"].shape).copy_(args["x"])
    assert torch.equal(getattr(library, op)(*(args | {"x": shifted}).values()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite_stays_in_its_sample(op, dtype, library, device):
    args = grouped_args(op, dtype=dtype, device=device)
    clean = getattr(library, op)(*args.values())
    args["x"][1, 3, 7] = torch.nan  # without an adapter
    args["x"][2] = torch.inf
    for name in ADAPTERS[op]:
        args[name][3] = torch.full_like(args[name][3], torch.nan)  # an adapter that no sample takes
    got = getattr(library, op)(*args.values())
    touched = [2] if op == "kron_linear_grouped" else [1, 2]
    others = [b for b in range(len(INDEX)) if b not in touched]
    assert torch.equal(got[others], clean[others])
    assert not got[2].isfinite().any() or op == "layer_norm_alore_grouped" and got[2].isnan().all()


@pytest.mark.parametrize("op", OPS)
def test_the_result_is_a_tensor_of_its_own(op, library, device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        args = grouped_args(op, index=[-1, -1], dtype=dtype, device=device)
        assert getattr(library, op)(*args.values()).data_ptr() != args["x"].data_ptr()


def test_norm_without_an_affine(library, device):
    for dtype in (torch.float64, torch.bfloat16):
        for absent in (["weight"], ["bias"], ["weight", "bias"]):
            args = grouped_args(KRON[2], dtype=dtype, device=device) | dict.fromkeys(absent)
            assert_matches(library, KRON[2], args)


def test_linear_without_a_bias(library, device):
    assert_matches(library, LORA, grouped_args(LORA, dtype=torch.bfloat16, device=device) | {"bias": None})


def test_linear_of_a_wider_weight(library, device):
    """A float32 weight under 16-bit activations is rounded to them."""
    args = grouped_args(LORA, dtype=torch.bfloat16, factor_dtype=torch.float32, device=device)
    wide = args | {"weight": args["weight"].float()}
    assert torch.equal(getattr(library, LORA)(*wide.values()), getattr(library, LORA)(*args.values()))


# ---- Autocast, compilation, gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_autocast(op, dtype, low, device):
    args = grouped_args(op, dtype=dtype, device=device)
    with torch.autocast(device.type, low):
        got = getattr(ops, op)(*args.values())
    assert got.dtype == low
    lowered = {n: [t.to(low) for t in v] if isinstance(v, list) else v for n, v in args.items()}
    lowered |= {n: v.to(low) for n, v in args.items() if isinstance(v, torch.Tensor) and n != "index"}
    assert_within_budget(got, exact(op, args), eager(op, lowered), op)


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_float64_alone(op, device):
    args = grouped_args(op, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(getattr(ops, op)(*args.values()), getattr(ops, op)(*args.values()))
        assert getattr(ops, op)(*args.values()).dtype == torch.float64


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_compiled(op, low, device):
    torch._dynamo.reset()
    args = grouped_args(op, "one", index=[1, -1, 0], dtype=torch.float32, device=device)
    for name in ADAPTERS[op]:
        args[name] = torch.stack([args[name][0], args[name][0] * 2])
    args["index"] = torch.tensor([1, -1, 0], device=device)

    def forward(*inputs):
        with torch.autocast(device.type, low, enabled=low is not None):
            return getattr(ops, op)(*inputs) * 2

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for index in ([1, -1, 0], [0, 0, -1]):  # values of the index are no part of the graph
        args["index"] = torch.tensor(index, device=device)
        torch.testing.assert_close(compiled(*args.values()), forward(*args.values()))
    torch._dynamo.reset()


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_refused(op, device):
    args = grouped_args(op, device=device)
    for name in ("x", "weight", *ADAPTERS[op]):
        if name not in args:
            continue
        tensor = args[name][4] if isinstance(args[name], list) else args[name]
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match=f"{op}: is for inference and has no gradient"):
            getattr(ops, op)(*args.values())
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                getattr(ops, op)(*args.values())
        tensor.requires_grad_(False)


# ---- Refusals ----------------------------------------------------------------------------------------------

BAD_KRON = [
    ("x", lambda t: t[0, 0], "x must be [batch, ..., features], got [192]"),
    ("x", lambda t: t.long(), "adapter 0: x must be float64, float32, bfloat16 or float16"),
    ("index", lambda t: t.int(), "index must be int64, got Int"),
    ("index", lambda t: t[:-1], "index must be [batch]=[7], one adapter a sample, got [6]"),
    ("index", lambda t: t[:, None], "index must be [batch]=[7], one adapter a sample, got [7, 1]"),
    ("index", lambda t: t.to("meta"), "index must be on x's device"),
    ("scale", lambda v: [], "scale must have at least one adapter"),
    ("down", lambda v: v[:-1], "down must have as many adapters as scale, 6, got 5"),
    ("up", lambda v: v[:-1], "up must have as many adapters as scale, 6, got 5"),
    ("scale", lambda v: [*v[:2], v[2][:-1], *v[3:]], "adapter 2: scale, down and up must agree in num_experts"),
    ("down", lambda v: [*v[:5], v[5][0]], "adapter 5: down must be [num_experts, p_in, rank]"),
    ("up", lambda v: [*v[:3], v[3].half(), *v[4:]], "adapter 3: up must have scale's dtype"),
    ("down", lambda v: [v[0][:, :-1], *v[1:]], "adapter 0: the last axis of x must be s_in * p_in"),
    ("scale", lambda v: [*v[:1], v[1][:, :, :1], *v[2:]], "adapter 1: scale must be [num_experts, s, s]"),
    ("up", lambda v: [*v[:1], v[1][:, :, :1], *v[2:]], "adapter 1: down and up must agree in embed_dim / s"),
]
BAD_LORA = [
    *BAD_KRON[:6],
    ("weight", lambda t: t[:, :-1], "adapter 0: lora_a must be [R, in_features]"),
    ("bias", lambda t: t[:-1], "bias must be [40], got [39]"),
    ("lora_a", lambda v: [], "lora_a must have at least one adapter"),
    ("lora_b", lambda v: v[:-1], "lora_b must have as many adapters as lora_a, 6, got 5"),
    ("coeff", lambda v: v[:-1], "coeff must have as many adapters as lora_a, 6, got 5"),
    ("lora_b", lambda v: [*v[:2], v[2][:, 1:], *v[3:]], "adapter 2: lora_b must be [out_features, R]=[40, 5]"),
    ("coeff", lambda v: [*v[:5], v[5][1:]], "adapter 5: coeff must be [R]=[2]"),
]
BAD = [
    (where, op, bad)
    for op in OPS
    for bad in (BAD_LORA if op == LORA else BAD_KRON)
    for where in (["device"] if "x's device" in bad[2] else ["device", "meta"])
]


@pytest.mark.parametrize(("where", "op", "bad"), BAD)
def test_bad_arguments_are_named(where, op, bad, device):
    name, change, says = bad
    args = grouped_args(op, device=device if where == "device" else "meta")
    args[name] = change(args[name])
    with pytest.raises(RuntimeError) as caught:
        getattr(ops, op)(*args.values())
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"{op}: ") and says in message, message


def test_bad_affine_and_eps(device):
    args = grouped_args(KRON[2], device=device)
    for change, says in (
        ({"weight": args["weight"][1:]}, r"weight must be \[192\], got \[191\]"),
        ({"eps": -1.0}, "eps must not be negative"),
    ):
        with pytest.raises(RuntimeError, match=f"{KRON[2]}: {says}"):
            ops.layer_norm_alore_grouped(*(args | change).values())


@pytest.mark.parametrize("value", [-2, 6, 2**40])
@pytest.mark.parametrize("op", OPS)
def test_an_index_out_of_range_on_the_cpu(op, value, library):
    args = grouped_args(op)
    args["index"][4] = value
    with pytest.raises(RuntimeError, match=rf"{op}: index must be in \[-1, 6\)"):
        getattr(library, op)(*args.values())


# ---- CUDA --------------------------------------------------------------------------------------------------

on_cuda = pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=needs_cuda)])


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_no_synchronisation(op, dtype, library, device):
    args = grouped_args(op, dtype=dtype, device=device)
    getattr(library, op)(*args.values())
    torch.cuda.set_sync_debug_mode("error")
    try:
        getattr(library, op)(*args.values())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_a_graph_follows_its_index(op, dtype, library, device):
    args = grouped_args(op, dtype=dtype, device=device)
    getattr(library, op)(*args.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = getattr(library, op)(*args.values())
    for index in (INDEX, [0, 1, 2, 3, 4, 5, -1], [-1] * 7):
        args["index"].copy_(torch.tensor(index))
        args["x"].normal_()
        graph.replay()
        torch.testing.assert_close(y, getattr(library, op)(*args.values()))


@on_cuda
@pytest.mark.parametrize("op", KRON)
def test_which_shapes_are_fused(op, device):
    """Where every adapter is, the whole call is one kernel and says nothing."""
    args = grouped_args(op, dtype=torch.bfloat16, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(ops, op)(*args.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        getattr(ops, op)(*args.values())
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("alore_grouped_kernel" in name for name in kernels) == 1 and len(kernels) == 1, kernels


@on_cuda
@pytest.mark.parametrize(
    ("op", "dtype", "value"),
    [("alore_grouped", "bfloat16", 6), ("alore_grouped", "float32", -2), (LORA, "bfloat16", 6)],
)
def test_an_index_out_of_range_stops_the_kernel(op, dtype, value, device):
    """In a process of its own: the device's context is lost."""
    code = (
        f"import sys, torch; sys.path[:0] = {FOLDERS}; import test_grouped as t\n"
        f"args = t.grouped_args('{op}', dtype=torch.{dtype}, device='cuda'); torch.cuda.synchronize()\n"
        f"args['index'][4] = {value}; print('made')\n"
        f"t.ops.{op}(*args.values()); torch.cuda.synchronize(); print('ran')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "made" in done.stdout and "ran" not in done.stdout and done.returncode != 0, done.stderr[-2000:]
