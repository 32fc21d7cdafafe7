"""Captured and compiled forwards, classifiers that come and go, and callers on several streams and devices."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from backbones import assert_unchanged, relative_error, snapshot
from pools import adapter_file, own_model
from zoo import ZOO

import alore_ext as ae
from alore_ext.serving import AdapterPool
from alore_ext.serving.graphs import ForwardGraphs

ROW = ZOO["vit"]
cuda_only = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: benchmarks/device_check.sh runs it on one"
)


@pytest.fixture
def wide(base, tmp_path):
    return adapter_file(base, ae.AloreConfig(), tmp_path / "wide.safetensors", classes=31)


@pytest.fixture
def headless(base):
    model = ae.patch(copy.deepcopy(base), ae.MlaeConfig())
    return ae.adapter_state_dict(model, include_head=False)


class _Rerun:
    """In a graph's place where there is no CUDA: its replay does the work again."""

    replays = 0

    def __init__(self, work):
        self.work, self.result = work, work()

    def replay(self):
        _Rerun.replays += 1
        self.result.copy_(self.work())


class _Rerunner:
    def __init__(self, device):
        pass

    def record(self, work, beside, warm_up=0):
        graph = _Rerun(work)
        return graph, graph.result


@pytest.fixture
def capture(monkeypatch):
    """capture(pool): its forward of four images, by CUDA graphs or what stands for them. Counts replays."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("alore_ext.serving.graphs.Recorder", _Rerunner)
    monkeypatch.setattr(_Rerun, "replays", 0)

    def run(pool):
        if pool.device.type == "cuda":
            pool.capture([4])
        else:
            pool._graphs = ForwardGraphs(pool.model, (4,), ROW.images(batch=4))
            for head in pool._heads():
                pool._capture_for(head, pool._graphs)

    return run


@torch.no_grad()
def assert_captured(pool, x, names):
    """Each adapter runs by a graph, and gives what the model gives without one."""
    for name in names:
        pool.deactivate()
        if name is not None:
            pool.activate(name)
        graphs, pool._graphs = pool._graphs, None
        eager = pool.predict(x)
        pool._graphs = graphs
        y = graphs.run(x, pool._live.heads.shapes(pool._head(name)))
        assert y is not None, f"no graph for {name!r}"
        assert relative_error(y, eager) < 1e-5 and relative_error(pool.predict(x), eager) < 1e-5
    pool.deactivate()


@torch.no_grad()
def test_graphs_serve_the_base_and_adapters_without_classifier_after_one_with(base, files, wide, headless, capture):
    """The first classifier that an adapter brings is a part that the graphs before it knew nothing of."""
    pool = AdapterPool(copy.deepcopy(base))
    pool.add("headless", headless)
    capture(pool)
    x = ROW.images(pool.device, batch=4)
    assert_captured(pool, x, [None, "headless"])
    pool.add("wide", wide)
    assert_captured(pool, x, [None, "headless", "wide", None, "headless"])
    pool.add("alore", files["alore"])
    assert_captured(pool, x, ["alore", None, "headless", "wide"])


@torch.no_grad()
def test_a_classifiers_module_and_graphs_go_with_its_last_adapter(base, files, wide, capture):
    pool = AdapterPool(copy.deepcopy(base))
    pool.add("alore", files["alore"])
    pool.add("wide", wide)
    pool.add("wide too", wide)
    capture(pool)
    pool.activate("wide")
    module = weakref.ref(pool.model.head)
    pool.deactivate()
    assert len(pool._graphs._captured) == len(pool._live.heads._modules) == 2
    pool.remove("wide")
    assert module() is not None
    pool.add("wide too", files["mlae"], replace=True)
    gc.collect()
    assert module() is None
    assert len(pool._graphs._captured) == len(pool._live.heads._modules) == 1
    x = ROW.images(pool.device, batch=4)
    pool.add("wide", wide)
    assert_captured(pool, x, [None, "alore", "wide", "wide too"])
    pool.activate("wide")
    assert relative_error(pool.predict(x), own_model(base, wide)(x)) < 1e-5


@torch.no_grad()
def test_a_classifier_whose_adapter_was_refused_leaves_nothing(base, files, wide, capture, monkeypatch):
    pool = AdapterPool(copy.deepcopy(base))
    pool.add("alore", files["alore"])
    capture(pool)

    def refuse(entry):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(pool._mixed, "prepare", refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.add("wide", wide)
    assert len(pool._live.heads._modules) == 1
    assert_captured(pool, ROW.images(pool.device, batch=4), [None, "alore"])


class _Done:
    """In the place of the event behind a pool's last call; remembers what there was when it was waited for."""

    def __init__(self, pool):
        self.pool, self.entries = pool, None

    def synchronize(self):
        self.entries = dict(self.pool._entries)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_tensors_are_not_reused_while_another_stream_reads")
def test_what_is_dropped_waits_for_the_device(pool, files):
    """Another stream may still read it; the allocator knows only of the stream that it was made on."""
    for change in (lambda: pool.add("alore", files["mlae"], replace=True), lambda: pool.remove("alore")):
        before = dict(pool._entries)
        pool._done = _Done(pool)
        change()
        assert pool._done.entries == before


def test_compiled_code_survives_swaps(base, files, device):
    """One compilation for all adapters whose classifiers have one shape."""
    counter = torch._dynamo.testing.CompileCounter()
    model = copy.deepcopy(base)
    pool = AdapterPool(model)
    for name, path in files.items():
        pool.add(name, path)
    model.compile(backend=counter)
    x = ROW.images(device)
    with torch.no_grad():
        for name in ("alore", "mlae", "lora", "both"):
            pool.activate(name)
            assert relative_error(pool.predict(x), own_model(base, files[name])(x)) < 1e-5
        pool.deactivate()
        assert relative_error(pool.predict(x), base(x)) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.cuda
@cuda_only
def test_captured_graphs_follow_swaps(base, files, wide, device):
    """Graphs recorded once run whatever adapter is in the weights, padded batches and other classifiers too."""
    pool = AdapterPool(copy.deepcopy(base))
    pool.add("alore", files["alore"])
    pool.add("mlae", files["mlae"])
    pool.capture([1, 4])
    pool.add("wide", wide)
    paths = {"alore": files["alore"], "mlae": files["mlae"], "wide": wide}
    for name in ("alore", "mlae", "wide", "alore", "wide", "mlae"):
        pool.activate(name)
        own = own_model(base, paths[name])
        for batch in (1, 3, 4, 6):
            x = ROW.images(device, batch=batch)
            with torch.no_grad():
                assert relative_error(pool.predict(x), own(x)) < 1e-5, (name, batch)
    pool.deactivate()
    x = ROW.images(device, batch=2)
    with torch.no_grad():
        assert relative_error(pool.predict(x), base(x)) < 1e-5
    pool.activate("alore")
    first = snapshot(pool.model)
    for _ in range(5):  # by the graph of the swap
        pool.activate("mlae")
        pool.activate("alore")
    assert_unchanged(pool.model, first)


@pytest.mark.cuda
@cuda_only
def test_a_merged_forward_launches_what_the_plain_one_does(base, files, device):
    pool = AdapterPool(copy.deepcopy(base), dtype=torch.bfloat16)
    pool.add("alore", files["alore"])
    pool.add("lora", files["lora"])
    x = ROW.images(device, torch.bfloat16)

    def kernels():
        for _ in range(2):
            with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                pool.model(x)
                torch.cuda.synchronize()
        return sorted(e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)

    plain = kernels()
    assert plain
    for name in ("alore", "lora"):
        pool.activate(name)
        assert kernels() == plain


@pytest.mark.cuda
@cuda_only
def test_callers_on_streams_of_their_own(pool, base, files, device):
    x = ROW.images(device, batch=4)
    names = list(files)
    with torch.no_grad():
        expected = {name: own_model(base, path)(x) for name, path in files.items()}
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    answers = []
    for turn in range(12):
        with torch.cuda.stream(streams[turn % 3]):
            name = names[turn % len(names)]
            pool.activate(name)
            answers.append((name, pool.predict(x)))
    torch.cuda.synchronize()
    for name, y in answers:
        assert relative_error(y, expected[name]) < 1e-4


@pytest.mark.cuda
@cuda_only
def test_tensors_are_not_reused_while_another_stream_reads(base, files, device):
    """An adapter made on one stream, in use on a second, removed on a third."""
    made, used, removed = (torch.cuda.Stream() for _ in range(3))
    pool, x = AdapterPool(copy.deepcopy(base)), ROW.images(device, batch=4)
    torch.cuda.synchronize()
    with torch.cuda.stream(made):
        pool.add("a", files["alore"])
        sizes = [value.shape for value in pool._entries["a"].parameters.values()]
        sizes += [value.shape for part in pool._entries["a"].head.values() for value in part.values()]
    with torch.cuda.stream(used):
        expected = pool.predict(x, adapter="a")
        torch.cuda._sleep(500_000_000)  # a quarter of a second
        late = pool.predict(x, adapter="a")
    with torch.cuda.stream(removed):
        pool.remove("a")
    with torch.cuda.stream(made):
        junk = [torch.full(size, float("nan"), device=device) for size in sizes for _ in range(2)]
    torch.cuda.synchronize()
    assert len(junk) == 2 * len(sizes) and relative_error(late, expected) < 1e-6


@torch.no_grad()
def _swap_and_check(base, paths, device, turns):
    """A pool on a stream of its own: captured forwards and swaps against each adapter's own model."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        base, x = base.to(device), ROW.images(batch=4).to(device)
        pool = AdapterPool(copy.deepcopy(base))
        before = snapshot(pool.model)
        for turn in range(turns):
            for name, path in paths.items():
                pool.add(name, path, replace=True)
            pool.capture([4])
            for name in [*paths, *paths]:  # the second time by the graph of the swap
                pool.activate(name)
                assert pool._graphs.run(x, pool._live.heads.shapes(pool._head(name))) is not None
                assert relative_error(pool.predict(x), own_model(base, paths[name])(x)) < 1e-5, (device, turn, name)
            pool.deactivate()
        assert_unchanged(pool.model, before)


def _in_threads(calls):
    """Run all at once; raises what one of them raised."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
    with ThreadPoolExecutor(len(calls)) as threads:
        for done in [threads.submit(call) for call in calls]:
            done.result()


@pytest.mark.cuda
@cuda_only
def test_pools_in_two_threads_capture_at_once(base, files, wide, device):
    paths = {"alore": files["alore"], "mlae": files["mlae"], "wide": wide}
    bases = [copy.deepcopy(base) for _ in range(2)]
    _in_threads([partial(_swap_and_check, own, paths, device, 4) for own in bases])


@pytest.mark.cuda
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices: benchmarks/device_check.sh runs it on two"
)
def test_pools_on_two_devices(base, files, wide):
    """Whichever captured first, the other's graphs are not empty; at the same time too."""
    paths = {"alore": files["alore"], "mlae": files["mlae"], "wide": wide}
    bases = {torch.device("cuda", index): copy.deepcopy(base) for index in (0, 1)}
    for device, own in bases.items():
        _swap_and_check(own, paths, device, 1)
    _in_threads([partial(_swap_and_check, own, paths, device, 2) for device, own in bases.items()])
