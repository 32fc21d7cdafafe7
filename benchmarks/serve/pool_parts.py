"""The pool in this process: merged speed, swaps, mixed batches, memory. Each part gives rows for the table."""

import copy
import gc
import statistics
import time

import torch
from steps.timing import milliseconds, synchronize

import alore_ext as ae
from alore_ext.serving.clones import logits_of

from .subject import CONFIGS, adapter, file_bytes, peft_model, pool_of

MIXED = ({"alore": 64}, {"mlae": 64}, {"alore": 32, "mlae": 32}, {"lora": 64})
# PEFT is another project's: whatever it raises in a version not seen here, its rows are skipped and say so.
PEFT_ERRORS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, KeyError)
CYCLES_PER_US = 2000  # of a GPU at about 2 GHz


def interleaved(calls, device, seconds):
    """Median milliseconds of each call by name, and their ratios to the first: medians over rounds.

    Calls take turns in groups of about a quarter of a second, one call of a group queued after the other, as a server
    under load would.
    """
    samples = dict(zip(calls, milliseconds(list(calls.values()), device, seconds), strict=True))
    first = next(iter(samples.values()))
    return {
        name: (statistics.median(times), statistics.median(t / f for t, f in zip(times, first, strict=True)))
        for name, times in samples.items()
    }


@torch.no_grad()
def merged(args, base, images, device):
    """A model with an adapter in its weights against the plain backbone: eager, as CUDA graphs, compiled if asked.

    A third model, which never saw this library, has the merged weights loaded: what it takes more or less than the
    backbone is the values' doing (a GPU at its power limit is slower on some), not the merge's.
    """
    pool = pool_of(base, {"alore": 1})
    plain, loaded = copy.deepcopy(base), copy.deepcopy(base)
    pool.activate("alore0")
    loaded.load_state_dict(pool.model.state_dict())
    models = {"base": plain, "merged": pool.model, "plain model of the merged weights": loaded}
    calls = {name: lambda m=model: m(images) for name, model in models.items()}
    rows = _rows("merged", "eager", calls, args, device, images)
    if device.type == "cuda":
        rows[0]["launches"] = [_launches(calls[name]) for name in ("base", "merged")]
        calls = {name: _graph(model, images) for name, model in models.items() if name != "merged"}
        pool.capture([len(images)], images)
        calls["merged"] = lambda: pool.predict(images)
        rows += _rows("merged", "CUDA graph", calls, args, device, images)
    if args.compile:
        codes = {name: torch.compile(model) for name, model in models.items()}
        calls = {name: lambda c=code: c(images) for name, code in codes.items()}
        rows += _rows("merged", "torch.compile", calls, args, device, images)
    return rows


def _graph(model, images):
    from alore_ext.serving.graphs import ForwardGraphs

    graphs = ForwardGraphs(model, (len(images),), images)
    graphs.capture(())
    return lambda: graphs.run(images, ())


@torch.no_grad()
def swap(args, base, images, device):
    """`activate` against a copy of the same weights, and against what PEFT offers."""
    rows = []
    for method in ("alore", "mlae"):
        pool = pool_of(base, {method: 2})
        names, turn = pool.names, iter(range(10**9))

        def activate(pool=pool, names=names, turn=turn):
            pool.activate(names[next(turn) % 2])

        live = [pool.model.get_parameter(n) for n in pool._live._prepared[names[0]].written]
        pristine = [p.clone() for p in live]
        times = _swap_times(activate, device)
        times["copy_us"] = _swap_times(lambda live=live, kept=pristine: torch._foreach_copy_(live, kept), device)[
            "device_us"
        ]
        rows.append({"part": "swap", "what": f"pool.activate, {method}", **times})
        rows.append(
            {"part": "swap", "what": f"unmerge_ + merge_, {method}", **_swap_times(_remerge(base, method), device)}
        )
    try:
        model = peft_model(base, 2, r".*\.(qkv|fc1)")
        turn = iter(range(10**9))

        def peft_swap():
            model.unmerge_adapter()
            model.set_adapter(f"task{next(turn) % 2}")
            model.merge_adapter()

        model.merge_adapter()
        rows.append({"part": "swap", "what": "PEFT unmerge + merge, LoRA qkv+fc1", **_swap_times(peft_swap, device, 8)})
        rows.append(
            {"part": "swap", "what": "PEFT hotswap (unmerged), LoRA qkv+fc1", **_swap_times(_hotswap(base), device, 8)}
        )
    except PEFT_ERRORS as error:
        rows.append({"part": "swap", "what": f"PEFT skipped: {error}"})
    return rows


def _remerge(base, method):
    """Without a pool: one adapter out of a patched model's weights and in again."""
    model = ae.merge_(ae.patch(copy.deepcopy(base), CONFIGS[method]))
    return lambda: ae.merge_(ae.unmerge_(model))


def _hotswap(base):
    """PEFT's in-place replacement of one unmerged adapter's tensors by another's."""
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    model = peft_model(base, 2, r".*\.(qkv|fc1)")
    states = [{k: v.clone() for k, v in model.state_dict().items() if f".{name}." in k} for name in ("task0", "task1")]
    states[1] = {key.replace(".task1.", ".task0."): value for key, value in states[1].items()}
    config, turn = model.peft_config["task0"], iter(range(10**9))
    model.delete_adapter("task1")
    return lambda: hotswap_adapter_from_state_dict(model, states[next(turn) % 2], "task0", config)


@torch.no_grad()
def mixed(args, base, images, device):
    """Batches in which images ask for 1, 8 and 64 adapters, against the base alone."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for counts in MIXED:
        pool = pool_of(base, counts)
        label = "+".join(counts)
        for count in (1, 8, 64):
            # Of two methods half each, so that one adapter is of the first.
            by_turn = [n for pair in zip(*_by_method(pool.names), strict=True) for n in pair][:count]
            names = [by_turn[i] for i in torch.randint(count, (len(images),), generator=generator)]
            error = _check(pool, images, names)
            calls = {"base": lambda: base(images), "mixed": lambda n=names, p=pool: p.predict(images, adapters=n)}
            if counts == MIXED[0]:
                calls["loop, swap and run"] = lambda n=names, p=pool: _loop(p, images, n)
                calls["loop, unmerged"] = lambda n=names, p=pool: _unmerged_loop(p, images, n)
            rows += _rows("mixed", f"{label}, {count} adapters", calls, args, device, images, error)
    try:
        model = peft_model(base, 64)
        for count in (1, 8, 64):
            names = [f"task{i}" for i in torch.randint(count, (len(images),), generator=generator).tolist()]
            calls = {"base": lambda: base(images), "PEFT adapter_names": lambda n=names: model(images, adapter_names=n)}
            rows += _rows("mixed", f"lora r8 qkv, {count} adapters", calls, args, device, images)
    except PEFT_ERRORS as error:
        rows.append({"part": "mixed", "what": f"PEFT skipped: {error}"})
    return rows


@torch.no_grad()
def memory(args, base, images, device):
    """Bytes that one more adapter takes on the device, once the pool has its copy of the weights; those of its file.

    Both with its classifier. Measured after each was activated once, which on CUDA records the swap as a graph: the
    driver's memory for it is counted, and said apart. Other processes must leave the device alone meanwhile.
    """
    rows = []
    for method in ("alore", "mlae"):
        pool = pool_of(base, {method: 1})
        more = [adapter(base, method, seed=100 + i) for i in range(16)]
        pool.activate(pool.names[0])  # what all swaps share is there before
        before = _device_bytes(device)
        for i, tensors_of in enumerate(more):
            pool.add(f"more{i}", tensors_of)
            pool.activate(f"more{i}")
        after = _device_bytes(device)
        row = {"part": "memory", "what": f"one more {method} adapter", "file_mb": file_bytes(base, method) / 1e6}
        if device.type == "cuda":
            tensors, graphs = ((b - a) / 16e6 for a, b in zip(before, after, strict=True))
            row |= {"mb": tensors + graphs, "graph_mb": graphs, "text": f"of which CUDA graph {graphs:.2f} MB"}
        else:
            row["mb"] = sum(value.numel() * value.element_size() for value in more[0].values()) / 1e6
        rows.append(row)
    return rows


def _device_bytes(device):
    """What tensors take, and what is taken outside of torch's allocator: by graphs, for one."""
    if device.type != "cuda":
        return 0, 0
    gc.collect()  # patched copies of the backbone are cycles
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device), total - free - torch.cuda.memory_reserved(device)


def _by_method(names):
    """Names in one list a method; a single method's twice, shifted, so that pairs cover it."""
    methods = sorted({name.rstrip("0123456789") for name in names})
    lists = [[name for name in names if name.startswith(method)] for method in methods]
    return lists if len(lists) > 1 else [lists[0][::2], lists[0][1::2]]


def _check(pool, images, names):
    """Largest difference from each adapter's own merged model for four images, relative to the largest logit."""
    answers, worst = pool.predict(images, adapters=names), 0.0
    for i in range(min(4, len(images))):
        pool.activate(names[i])
        own = pool.predict(images[i : i + 1])[0]
        worst = max(worst, ((answers[i] - own).abs().max() / own.abs().max()).item())
    pool.deactivate()
    if not worst < (0.1 if images.element_size() == 2 else 1e-3):
        raise RuntimeError(f"a mixed batch is {worst:.1e} of the largest logit from the merged models")
    return worst


def _loop(pool, images, names):
    """What a pool without mixed batches does: an adapter at a time."""
    for name, chosen in _by_adapter(images, names):
        pool.activate(name)
        logits_of(pool.model(chosen))
    pool.deactivate()


def _unmerged_loop(pool, images, names):
    """The same without swaps: the adapter runs beside the base weights."""
    for name, chosen in _by_adapter(images, names):
        pool.predict(chosen, adapter=name)


def _by_adapter(images, names):
    """Each adapter with the images that ask for it."""
    for name in dict.fromkeys(names):
        yield name, images[torch.tensor([i for i, n in enumerate(names) if n == name], device=images.device)]


def _rows(part, what, calls, args, device, images, error=None):
    times = interleaved(calls, device, args.seconds)
    base_ms = times["base"][0]
    others = [(name, t) for name, t in times.items() if name != "base"]
    return [
        {"part": part, "what": f"{what}: {name}", "base_ms": base_ms, "ms": ms, "ratio": ratio, "check": error}
        for name, (ms, ratio) in others
    ]


def _swap_times(call, device, repeats=60):
    """Wall microseconds from idle to idle, host microseconds until the call returns, and device microseconds of one
    call in a row of calls that the host queues ahead. Where it cannot, `queued_ahead` is False and the device's figure
    an upper bound: it has waited for the host.
    """
    wall, host = [], []
    for _ in range(6):
        call()
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        host.append((time.perf_counter() - start) * 1e6)
        synchronize(device)
        wall.append((time.perf_counter() - start) * 1e6)
    times = {"wall_us": statistics.median(wall), "host_us": statistics.median(host), "device_us": None}
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device sleeps twice as long as the host should need to queue the calls.
        torch.cuda._sleep(max(20_000_000, int(2 * CYCLES_PER_US * repeats * times["host_us"])))
        begin.record()
        for _ in range(repeats):
            call()
        times["queued_ahead"] = not begin.query()
        end.record()
        end.synchronize()
        times["device_us"] = begin.elapsed_time(end) * 1e3 / repeats
    return times


def _launches(call):
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


PARTS = {"merged": merged, "swap": swap, "mixed": mixed, "memory": memory}
