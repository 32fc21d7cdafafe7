"""merge_kron_grouped_ and merge_lora_grouped_: many layers at once, each as the single op merges it."""

import itertools

import pytest
import torch
from op_cases import draw, kron_args, lora_args
from test_merge_ops import WEIGHT_DTYPES, assert_one_rounding, merged_exactly, product_dtype

from alore_ext import ops

DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPE_PAIRS = list(itertools.product(WEIGHT_DTYPES, WEIGHT_DTYPES))
# num_experts, s_in, s_out, p_in, p_out, rank: several chunks of a block with a rest; codes of one step and of many, up
# to what no shared memory holds; blocks of unequal number; multiples of 8 elements, for the vectors, and odd ones.
DIMS = [
    (4, 4, 4, 40, 40, 4),
    (2, 2, 2, 70, 70, 3),
    (1, 1, 1, 13, 13, 1),
    (8, 8, 8, 16, 16, 8),
    (16, 16, 16, 3, 3, 16),
    (2, 4, 6, 9, 6, 3),
    (32, 32, 32, 2, 2, 2),
    (32, 32, 32, 2, 2, 64),
]


class Kron:
    """Lists of a grouped call, entry by entry, and what each entry must become."""

    def __init__(self):
        self.lists = [[] for _ in range(6)]
        self.exact = []

    def add(self, dims, side, others, dtype, factor_dtype, device, bias=True, layout="rows"):
        width = dims[1] * dims[3]
        shape = (others, width) if side == "before" else (width, others)
        weight = laid_out(draw(*shape, dtype=dtype, device=device, gain=shape[1] ** -0.5), layout)
        offset = draw(shape[0], dtype=dtype, device=device)
        adapter = [*kron_args(dims, (), dtype=factor_dtype, device=device).values()][1:]
        self.exact.append((*merged_exactly(side, weight, offset, adapter), product_dtype(dtype, factor_dtype)))
        for values, value in zip(self.lists, (weight, offset if bias else None, *adapter, side), strict=True):
            values.append(value)
        return self

    def run(self):
        assert ops.merge_kron_grouped_(*self.lists) is None
        return self

    def check(self):
        weights, biases, _, _, _, sides = self.lists
        for weight, bias, side, (exact, exact_bias, magnitude, bias_magnitude, products) in zip(
            weights, biases, sides, self.exact, strict=True
        ):
            assert_one_rounding(weight, exact, magnitude, products)
            if bias is not None and side == "after":
                assert_one_rounding(bias, exact_bias, bias_magnitude, products)
            elif bias is not None:
                assert torch.equal(bias.double(), exact_bias)


def laid_out(weight, layout):
    """The same values behind other strides."""
    if layout == "columns":
        return weight.t().contiguous().t()
    if layout == "slice":  # a part of a wider matrix
        wide = torch.full((weight.shape[0], weight.shape[1] + 3), torch.nan, dtype=weight.dtype, device=weight.device)
        wide[:, 1:-2] = weight
        return wide[:, 1:-2]
    if layout == "sparse":  # every second element, along both axes
        wide = weight.repeat_interleave(2, 0).repeat_interleave(2, 1)
        return wide[::2, ::2]
    return weight


LAYOUTS = ["rows", "columns", "slice", "sparse"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kron_of_every_dtype_shape_and_side_in_one_call(layout, device):
    group = Kron()
    for index, (dims, side) in enumerate(itertools.product(DIMS, ["before", "after"])):
        for dtype, factor_dtype in DTYPE_PAIRS[index % 3 :: 3]:
            others = (1, 19, 64, 100)[index % 4]
            group.add(dims, side, others, dtype, factor_dtype, device, bias=index % 3 > 0, layout=layout)
    group.run().check()


@pytest.mark.parametrize("others", [1, 7, 8, 63, 64, 65, 257])
@pytest.mark.parametrize("side", ["before", "after"])
def test_kron_around_the_size_of_a_tile(side, others, device):
    group = Kron()
    for dims in DIMS[:4]:
        for dtype in WEIGHT_DTYPES:
            group.add(dims, side, others, dtype, dtype, device)
    group.run().check()


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 64, 300])
def test_lora_of_every_dtype_and_shape_in_one_call(rank, device):
    lists, exact = [[] for _ in range(4)], []
    for index, (out_features, in_features) in enumerate([(1, 1), (40, 96), (257, 31), (64, 300), (19, 520)]):
        for (dtype, factor_dtype), layout in zip(DTYPE_PAIRS[index % 2 :: 2], LAYOUTS * 2, strict=True):
            low_rank = lora_args((in_features, out_features, rank), (), dtype=factor_dtype, device=device)
            a, b, coeff = (low_rank[name] for name in ("lora_a", "lora_b", "coeff"))
            weight = laid_out(draw(out_features, in_features, dtype=dtype, device=device), layout)
            scaled = b.double() * coeff.double()
            magnitude = weight.double().abs() + scaled.abs() @ a.double().abs()
            exact.append((weight.double() + scaled @ a.double(), magnitude, product_dtype(dtype, factor_dtype)))
            for values, value in zip(lists, (weight, a, b, coeff), strict=True):
                values.append(value)
    assert ops.merge_lora_grouped_(*lists) is None
    for weight, (value, magnitude, products) in zip(lists[0], exact, strict=True):
        assert_one_rounding(weight, value, magnitude, products)


def test_a_whole_model_of_layers(device):
    """More entries than one launch takes; one set of scale matrices for all of them."""
    group = Kron()
    for index in range(60):
        group.add((4, 4, 4, 24, 24, 4), "before", 50 + index, torch.bfloat16, torch.float32, device)
    group.lists[2] = [group.lists[2][0]] * 60
    group.exact = [
        (*merged_exactly("before", w, b, (s, d, u)), torch.float32)
        for w, b, s, d, u, _ in zip(*group.lists, strict=True)
    ]
    group.run().check()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_bits_do_not_depend_on_layout_or_company(dtype, device):
    """A merge in a group, alone, and on every layout: the same bits. (A model's merge can be repeated elsewhere.)"""
    for dims, side in itertools.product(DIMS[:6], ["before", "after"]):
        group = Kron().add(dims, side, 67, dtype, dtype, device)
        weight, bias, *adapter = (values[0] for values in group.lists)
        alone, alone_bias = weight.clone(), bias.clone()
        ops.merge_kron_(alone, alone_bias, *adapter)
        layouts = [laid_out(weight.clone(), layout) for layout in LAYOUTS]
        biases = [bias.clone() for _ in LAYOUTS]
        ops.merge_kron_grouped_(layouts, biases, *([value] * len(LAYOUTS) for value in adapter))
        for merged, merged_bias in zip(layouts, biases, strict=True):
            assert torch.equal(merged, alone) and torch.equal(merged_bias, alone_bias)


def test_slices_of_a_fused_weight(device):
    """Query, key and value as parts of one tensor, and what stands between them left alone."""
    whole = draw(3 * 48 + 2, 32, dtype=torch.float32, device=device)
    before = whole.clone()
    parts = [whole[1 + 48 * i : 1 + 48 * (i + 1)] for i in range(3)]
    group = Kron()
    for _ in parts:
        group.add((4, 4, 4, 8, 8, 2), "before", 48, torch.float32, torch.float32, device)
    for i, part in enumerate(parts):
        part.copy_(group.lists[0][i])
    group.lists[0] = parts
    group.run().check()
    assert torch.equal(whole[0], before[0]) and torch.equal(whole[-1], before[-1])


def test_rows_of_zero(device):
    group = Kron().add(DIMS[0], "before", 5, torch.float32, torch.float32, device)
    adapter = [values[0] for values in group.lists[2:5]]
    empty, bias = torch.empty(0, 160, device=device), torch.empty(0, device=device)
    for values, value in zip(group.lists, (empty, bias, *adapter, "before"), strict=True):
        values.insert(0, value)
    group.run()
    group.lists = [values[1:] for values in group.lists]
    group.check()


def test_empty_lists_do_nothing():
    ops.merge_kron_grouped_([], [], [], [], [], [])
    ops.merge_lora_grouped_([], [], [], [])
    ops.merge_kron_grouped_([], [], [], [], [], [], [])
    ops.merge_lora_grouped_([], [], [], [], source=[])


# ---- Refusals ----------------------------------------------------------------------------------------------


def kron_lists(device, count=3, dtype=torch.float32):
    group = [[*kron_args((2, 3, 3, 4, 4, 2), (), dtype=dtype, device=device).values()][1:] for _ in range(count)]
    weights = [draw(12, 12, dtype=dtype, device=device) for _ in group]
    biases = [draw(12, dtype=dtype, device=device) for _ in group]
    return [weights, biases, *(list(values) for values in zip(*group, strict=True)), ["after"] * count]


def lora_lists(device, count=3, dtype=torch.float32):
    group = [lora_args(dtype=dtype, device=device) for _ in range(count)]
    return [[args[name] for args in group] for name in ("weight", "lora_a", "lora_b", "coeff")]


GROUPED = {"merge_kron_grouped_": kron_lists, "merge_lora_grouped_": lora_lists}
ARGUMENTS = {
    "merge_kron_grouped_": ("weight", "bias", "scale", "down", "up", "side"),
    "merge_lora_grouped_": ("weight", "lora_a", "lora_b", "coeff"),
}
grouped = pytest.mark.parametrize("op", GROUPED)
on_every_device = pytest.mark.parametrize("device", DEVICES)


def refused(op, lists, *says, source=None):
    """The call raises, its message starts with the op and holds `says`, and no tensor changes."""
    flat = [t for values in lists for t in values if isinstance(t, torch.Tensor) and not t.is_meta]
    before = [t.detach().clone() for t in flat]
    with pytest.raises(RuntimeError) as caught:
        getattr(ops, op)(*lists, source=source)
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"{op}: ")
    for part in says:
        assert part in message, message
    assert all(torch.equal(a, b) for a, b in zip(flat, before, strict=True))


BAD_ENTRIES = {
    "merge_kron_grouped_": [
        (0, lambda t: t.to(torch.int64), "weight must be float64, float32, bfloat16 or float16, got Long"),
        (0, lambda t: t.flatten(), "weight must be [out_features, in_features], got [144]"),
        (0, lambda t: t[:1].expand_as(t), "weight must not overlap itself in memory"),
        (1, lambda t: t[:-1], "bias must be [12], got [11]"),
        (2, lambda t: t[:1], "must agree in num_experts"),
        (3, lambda t: t.double(), "down must have scale's dtype Float, got Double"),
        (4, lambda t: t[:, :, :-1], "must be square on weight's out_features=12, got 12 -> 9"),
        (5, lambda _: "left", 'side must be "before" or "after", got "left"'),
    ],
    "merge_lora_grouped_": [
        (0, lambda t: t.to(torch.int64), "weight must be float64, float32, bfloat16 or float16, got Long"),
        (1, lambda t: t[:, :-1], "lora_a must be [R, in_features]=[R, 12] with R > 0, got [3, 11]"),
        (2, lambda t: t[:-1], "lora_b must be [out_features, R]=[9, 3], got [8, 3]"),
        (3, lambda t: t.half(), "coeff must have lora_a's dtype Float, got Half"),
    ],
}


@pytest.mark.parametrize("entry", [0, 2])
@pytest.mark.parametrize(("op", "bad"), [(op, bad) for op, cases in BAD_ENTRIES.items() for bad in cases])
@on_every_device
def test_a_bad_entry_is_named_and_nothing_is_written(op, bad, entry, device):
    lists, (argument, change, says) = GROUPED[op](device), bad
    lists[argument][entry] = change(lists[argument][entry])
    refused(op, lists, f"{op}: entry {entry}: ", says)


@grouped
@on_every_device
def test_lists_of_unequal_length(op, device):
    for argument, name in list(enumerate(ARGUMENTS[op]))[1:]:
        lists = GROUPED[op](device)
        lists[argument].pop()
        refused(op, lists, f"{name} must have as many entries as weight, 3, got 2")
    lists = GROUPED[op](device)
    refused(op, [[], *lists[1:]], "weight has no entries")


@pytest.mark.parametrize("bias_of", [[0], [0, 3], [-1, 0], [1, 0], [1, 1]])
@on_every_device
def test_entries_that_biases_belong_to(bias_of, device):
    """What the Python wrapper never sends."""
    weight, bias, *rest = kron_lists(device)
    with pytest.raises(RuntimeError, match="merge_kron_grouped_: bias_of must "):
        torch.ops.alore_ext.merge_kron_grouped_(weight, bias[:2], bias_of, *rest)


@grouped
@on_every_device
def test_one_weight_twice(op, device):
    lists = GROUPED[op](device)
    lists[0][2] = lists[0][0]
    refused(op, lists, "weight[0] and weight[2] share memory")
    lists[0][2] = lists[0][0][:]  # another tensor of the same memory
    refused(op, lists, "weight[0] and weight[2] share memory")


@on_every_device
def test_weights_that_overlap_in_part(device):
    for op, (rows, columns) in (("merge_kron_grouped_", (12, 12)), ("merge_lora_grouped_", (9, 12))):
        whole = torch.zeros(2 * rows, columns, device=device)
        lists = GROUPED[op](device)
        lists[0][:2] = whole[:rows], whole[rows - 1 : 2 * rows - 1]
        refused(op, lists, "weight[0] and weight[1] share memory")
        lists[0][:2] = whole[rows:], whole[:rows]
        getattr(ops, op)(*lists)  # side by side is fine


@on_every_device
def test_biases_that_overlap(device):
    lists = kron_lists(device)
    lists[1][2] = lists[1][1]
    refused("merge_kron_grouped_", lists, "bias[1] and bias[2] share memory")
    lists = kron_lists(device)
    lists[1][2] = lists[0][1][0]
    refused("merge_kron_grouped_", lists, "bias[2] and weight[1] share memory")
    lists[5][2] = "before"  # a bias that is not written may be shared
    ops.merge_kron_grouped_(*lists)


@grouped
def test_a_weight_on_another_device(op, device):
    lists, other = GROUPED[op](device), GROUPED[op]("meta")
    for values, others in zip(lists, other, strict=True):
        values[2] = others[2]
    refused(op, lists, f"entry 2: weight must be on {lists[0][0].device} as entry 0's is, got meta")


@grouped
def test_recording_is_refused(op, device):
    lists = GROUPED[op](device)
    for values in lists:
        if isinstance(values[-1], str):
            continue
        values[-1].requires_grad_()
        refused(op, lists, "merging is not differentiable")
        with torch.no_grad():
            getattr(ops, op)(*lists)
        values[-1].requires_grad_(False)
    sources = [t.clone().requires_grad_() for t in lists[0]]
    refused(op, lists, "merging is not differentiable", source=sources)
    with torch.no_grad():
        getattr(ops, op)(*lists, source=sources)


@grouped
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_version_counters_move(op, mode, device):
    lists = GROUPED[op](device)
    written = lists[0] + (lists[1] if op == "merge_kron_grouped_" else [])
    versions = [t._version for t in written]
    with mode():
        getattr(ops, op)(*lists)
    assert all(t._version > v for t, v in zip(written, versions, strict=True))
    sources = [t.clone() for t in lists[0]]
    versions = [t._version for t in written]
    untouched = [t._version for t in sources]
    with mode():
        getattr(ops, op)(*lists, source=sources)
    assert all(t._version > v for t, v in zip(written, versions, strict=True))
    assert [t._version for t in sources] == untouched


@grouped
def test_inference_tensors_outside_inference_mode(op, device):
    lists = GROUPED[op](device)
    with torch.inference_mode():
        lists[0][1] = lists[0][1].clone()
    refused(op, lists, "weight[1] was made in inference mode and can only be changed there")
    with torch.inference_mode():
        getattr(ops, op)(*lists)


@grouped
def test_autocast_and_tf32_do_not_lower_a_merge(op, device, monkeypatch):
    if device.type == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    lists = GROUPED[op](device, 2)
    wide = [[t.double() if isinstance(t, torch.Tensor) else t for t in values] for values in lists]
    getattr(ops, op)(*wide)
    with torch.autocast(device.type, torch.bfloat16):
        getattr(ops, op)(*lists)
    for got, expected in zip(lists[0], wide[0], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
