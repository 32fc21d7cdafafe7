"""The grouped merges from a source: weight[i] becomes the merge of source[i], in one pass."""

import itertools

import pytest
import torch
from marks import needs_cuda
from op_cases import draw, lora_args, misaligned
from test_merge_grouped import (
    DIMS,
    DTYPE_PAIRS,
    GROUPED,
    LAYOUTS,
    Kron,
    grouped,
    kron_lists,
    laid_out,
    lora_lists,
    on_every_device,
    refused,
)
from test_merge_ops import WEIGHT_DTYPES

from alore_ext import ops


def kron_group(device, dtypes=DTYPE_PAIRS):
    """Lists of merges of every shape, side and dtype."""
    group = Kron()
    for index, (dims, side) in enumerate(itertools.product(DIMS, ["before", "after"])):
        dtype, factor_dtype = dtypes[index % len(dtypes)]
        group.add(dims, side, (1, 19, 64, 100)[index % 4], dtype, factor_dtype, device, bias=index % 3 > 0)
    return group.lists


def lora_group(device, dtypes=DTYPE_PAIRS):
    lists = [[] for _ in range(4)]
    for index, (out_features, in_features) in enumerate([(1, 1), (40, 96), (257, 31), (64, 300), (19, 520)]):
        dtype, factor_dtype = dtypes[index % len(dtypes)]
        low_rank = lora_args((in_features, out_features, 1 + 5 * index), (), dtype=factor_dtype, device=device)
        weight = draw(out_features, in_features, dtype=dtype, device=device)
        for values, value in zip(lists, (weight, *(low_rank[n] for n in ("lora_a", "lora_b", "coeff"))), strict=True):
            values.append(value)
    return lists


GROUPS = {"merge_kron_grouped_": kron_group, "merge_lora_grouped_": lora_group}


@pytest.mark.parametrize("source_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", GROUPS)
def test_from_a_source_as_from_a_copy_of_it(op, layout, source_layout, device):
    """The bits of copying and merging in place, whatever weight holds; the source stays as it is."""
    sources, *rest = GROUPS[op](device)
    biases = [b for b in rest[0] if b is not None] if op == "merge_kron_grouped_" else []
    expected, offsets = [laid_out(t.clone(), layout) for t in sources], [b.clone() for b in biases]
    getattr(ops, op)(expected, *rest)
    merged_offsets = [b.clone() for b in biases]
    for bias, offset in zip(biases, offsets, strict=True):
        bias.copy_(offset)  # a bias is merged in place, by both calls
    weights = [laid_out(torch.full_like(t, torch.nan), layout) for t in sources]
    sources = [laid_out(t, source_layout) for t in sources]
    before = [t.clone() for t in sources]
    assert getattr(ops, op)(weights, *rest, source=sources) is None
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(biases, merged_offsets, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sources, before, strict=True))


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_source_past_an_aligned_address(dtype, device):
    """Strides that agree, and an address that takes no vectors, of the source or of the weight."""
    for dims, side in itertools.product(DIMS[:6], ["before", "after"]):
        (weight,), _, *rest = Kron().add(dims, side, 40, dtype, dtype, device).lists
        expected = weight.clone()
        ops.merge_kron_grouped_([expected], [None], *rest)
        for target, source in ((weight.clone(), misaligned(weight)), (misaligned(weight), weight)):
            ops.merge_kron_grouped_([target.fill_(torch.nan)], [None], *rest, source=[source])
            assert torch.equal(target, expected)


def test_adapters_take_turns_in_one_storage(device):
    """What serving does: each swap gives what a fresh merge gives, and the pristine weights are left alone."""
    pristine, rest = lora_group(device)[0], [lora_group(device)[1:] for _ in range(2)]
    live = [t.clone() for t in pristine]
    fresh = []
    for adapter in rest:
        fresh.append([t.clone() for t in pristine])
        ops.merge_lora_grouped_(fresh[-1], *adapter)
    storage = [t.data_ptr() for t in live]
    for turn in (0, 1, 0):
        ops.merge_lora_grouped_(live, *rest[turn], source=pristine)
        assert all(torch.equal(a, b) for a, b in zip(live, fresh[turn], strict=True))
    assert [t.data_ptr() for t in live] == storage


def test_sources_may_be_shared(device):
    """Two weights from one source, and from two halves of one tensor that overlap."""
    _, a, b, coeff = (values[0] for values in lora_lists(device, 1))
    whole = draw(12, 12, dtype=torch.float32, device=device)
    sources = [whole[:9], whole[:9], whole[3:]]
    weights = [torch.full_like(source, torch.nan) for source in sources]
    ops.merge_lora_grouped_(weights, [a] * 3, [b] * 3, [coeff] * 3, source=sources)
    for weight, source in zip(weights, sources, strict=True):
        expected = source.clone()
        ops.merge_lora_grouped_([expected], [a], [b], [coeff])
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=needs_cuda)])
@pytest.mark.parametrize("op", GROUPS)
def test_in_a_captured_graph(op, device):
    """A replay merges what the tensors hold then."""
    sources, *rest = GROUPS[op](device, [(torch.bfloat16, torch.float32)])
    rest = [[None] * len(sources), *rest[1:]] if op == "merge_kron_grouped_" else rest
    weights = [torch.full_like(t, torch.nan) for t in sources]
    getattr(ops, op)(weights, *rest, source=sources)  # what is set up once, is
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        getattr(ops, op)(weights, *rest, source=sources)
    for values in rest:
        for value in values:
            if isinstance(value, torch.Tensor):
                value.mul_(-0.5)
    for source in sources:
        source.neg_()
    expected = [t.clone() for t in sources]
    getattr(ops, op)(expected, *rest)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


# ---- Refusals ----------------------------------------------------------------------------------------------


BAD_SOURCES = [
    (lambda t: t[:-1], "source must have weight's shape "),
    (lambda t: t.double(), "source must have weight's dtype Float, got Double"),
    (lambda t: t.to_sparse(), "source must be a dense tensor, got layout Sparse"),
]


@pytest.mark.parametrize(("change", "says"), BAD_SOURCES)
@grouped
def test_a_bad_source_is_named_and_nothing_is_written(op, change, says, device):
    lists = GROUPED[op](device)
    sources = [t.clone() for t in lists[0]]
    sources[2] = change(sources[2])
    refused(op, lists, f"{op}: entry 2: {says}", source=sources)


@grouped
@on_every_device
def test_sources_that_are_too_few_or_on_another_device(op, device):
    lists = GROUPED[op](device)
    sources = [t.clone() for t in lists[0]]
    refused(op, lists, "source must have as many entries as weight, 3, got 2", source=sources[:2])
    refused(op, [[] for _ in lists], "weight has no entries", source=sources)
    other = "cpu" if torch.device(device).type == "meta" else "meta"
    sources[1] = sources[1].new_empty(sources[1].shape, device=other)
    on = lists[0][0].device
    refused(op, lists, f"{op}: entry 1: source must be on weight's device {on}, got {other}", source=sources)


@grouped
@on_every_device
def test_a_source_in_memory_that_is_written(op, device):
    lists = GROUPED[op](device)
    sources = [t.clone() for t in lists[0]]
    for source, says in [
        (lists[0][1], "weight[1]"),  # its own weight
        (lists[0][1].view_as(lists[0][1]), "weight[1]"),
        (lists[0][2], "weight[2]"),
        (lists[0][0], "weight[0]"),
    ]:
        sources[1] = source
        says = f"{op}: entry 1: source must not share memory with {says}, which is written"
        refused(op, lists, says, source=sources)
    rows, columns = lists[0][1].shape
    whole = torch.zeros(2 * rows, columns, device=device)
    lists[0][1], sources[1] = whole[:rows], whole[rows - 1 : -1]
    refused(op, lists, "entry 1: source must not share memory with weight[1]", source=sources)
    lists[0][1], sources[1] = whole[rows:], whole[1 : rows + 1]
    refused(op, lists, "entry 1: source must not share memory with weight[1]", source=sources)
    sources[1] = whole[:rows]
    getattr(ops, op)(*lists, source=sources)  # side by side is fine


@on_every_device
def test_a_source_in_a_bias_that_is_written(device):
    lists = kron_lists(device)
    sources = [t.clone() for t in lists[0]]
    whole = torch.zeros(13, 12, device=device)
    sources[2], lists[1][0] = whole[:12], whole[5]
    refused("merge_kron_grouped_", lists, "entry 2: source must not share memory with bias[0]", source=sources)
    lists[5][0] = "before"  # which leaves the bias as it is
    ops.merge_kron_grouped_(*lists, source=sources)
