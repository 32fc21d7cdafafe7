"""Patching in several threads, and beside threads that run or compile other models."""

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FunctionType

import pytest
import torch
from backbones import assert_unchanged, build, images, snapshot
from torch import nn
from torch.fx import _symbolic_trace

import alore_ext as ae
from alore_ext.patching.dataflow import TRACING, BlockFlow, DataflowError

CONFIGS = (ae.AloreConfig(), ae.MlaeConfig())


def _state_of_fx():
    flag = _symbolic_trace.is_fx_symbolic_tracing() or getattr(_symbolic_trace, "_is_fx_tracing_flag", False)
    return nn.Module.__call__, nn.Module.__getattr__, math.sqrt, bool(flag), _symbolic_trace.CURRENT_PATCHER


@pytest.fixture(autouse=True)
def fx_state():
    """Threads take turns often, and what fx changes of the process is as before in the end."""
    before, interval = _state_of_fx(), sys.getswitchinterval()
    assert before[3:] == (False, None)
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
    after = _state_of_fx()
    for name, value in zip(("__call__", "__getattr__"), before, strict=False):
        setattr(nn.Module, name, value)  # for the tests after this one
    _symbolic_trace.CURRENT_PATCHER = None
    assert after == before


@pytest.fixture
def flag_of_process(monkeypatch):
    """fx's flag as torch 2.11 has it: one for all threads."""
    if hasattr(_symbolic_trace, "_is_fx_tracing_flag"):
        return

    def put(value):
        _symbolic_trace._is_fx_tracing_flag = value

    monkeypatch.setattr(_symbolic_trace, "_is_fx_tracing_flag", False, raising=False)
    monkeypatch.setattr(_symbolic_trace, "_set_is_fx_tracing", put)
    monkeypatch.setattr(_symbolic_trace, "_get_is_fx_tracing", lambda: _symbolic_trace._is_fx_tracing_flag)


def _patch_and_unpatch(model, turns=4):
    before = snapshot(model)
    for turn in range(turns):
        ae.patch(model, CONFIGS[turn % len(CONFIGS)])
        ae.unpatch(model)
    assert_unchanged(model, before)


@contextmanager
def _meanwhile(work):
    """`work` again and again in two threads, at least once in each; raises what it raised."""
    done, once = threading.Event(), threading.Barrier(3)

    def loop():
        once.wait()
        while True:
            work()
            if done.is_set():
                return

    with ThreadPoolExecutor(2) as threads:
        loops = [threads.submit(loop) for _ in range(2)]
        once.wait()
        try:
            yield
        finally:
            done.set()
        for one in loops:
            one.result()


def test_each_thread_its_own_model():
    models = [build("vit") for _ in range(4)]
    start = threading.Barrier(len(models))

    def run(model):
        start.wait()
        _patch_and_unpatch(model)

    with ThreadPoolExecutor(len(models)) as threads:
        for done in [threads.submit(run, model) for model in models]:
            done.result()


@pytest.mark.parametrize("name", ["vit", "eva02_tiny"])
@torch.no_grad()
def test_forwards_of_others(name):
    other, x = build(name).eval(), images("cpu")
    expected = other(x)

    def predict():
        with torch.no_grad():
            assert torch.equal(other(x), expected)

    with _meanwhile(predict):
        _patch_and_unpatch(build(name))


class _Between(nn.Module):
    """A block whose forward waits, when traced, for what another thread does."""

    def __init__(self, work):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.work = work

    def forward(self, x):
        thread = threading.Thread(target=self.work, daemon=True)
        thread.start()
        thread.join(60)
        return self.linear(x)


def test_a_compilation_that_outlasts_a_trace():
    """Dynamo takes fx's replacements away while it compiles, and puts them back."""
    compiling, traced = threading.Event(), threading.Event()

    def backend(graph, inputs):
        compiling.set()
        traced.wait(20)
        return graph

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    with ThreadPoolExecutor(1) as threads:
        runs = []

        def start():
            runs.append(threads.submit(compiled, torch.zeros(2)))
            compiling.wait(0.5)

        flow = BlockFlow(_Between(start))
        traced.set()
        assert torch.equal(runs[0].result(), torch.ones(2))
    assert flow.called("linear") and compiling.is_set()


class _Root(nn.Module):
    """Takes the root of a number, by a function that fx replaces."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * math.sqrt(x.shape[-1])


def test_in_the_middle_of_a_trace(flag_of_process):
    """Another thread's forward, eager and compiled, is its own."""
    other, x, results = _Root(), torch.randn(2, 4), []
    compiled = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.GELU()), backend="eager")
    expected = [other(x), compiled(x)]
    flow = BlockFlow(_Between(lambda: results.extend([other(x), compiled(x)])))
    assert all(map(torch.equal, results, expected)) and len(results) == 2
    assert flow.called("linear")


def test_the_globals_of_others_are_left_alone():
    """fx wraps what the file of a module that it sees imported from math."""
    root, seen = math.sqrt, []
    file = {"sqrt": root}
    other = type("Other", (nn.Module,), {"forward": FunctionType((lambda self, x: x * sqrt(4)).__code__, file)})()  # noqa: F821
    BlockFlow(_Between(lambda: seen.extend([other(3), file["sqrt"]])))
    assert seen == [6, root]


def test_a_compiled_function_within_a_block_is_refused(flag_of_process):
    """The flag is up where the trace is."""
    block = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"))
    with pytest.raises(DataflowError, match="symbolically trace a dynamo-optimized function"):
        BlockFlow(block)


def test_an_export_takes_its_turn(monkeypatch, tmp_path):
    """torch.export traces by fx inside."""
    real, owned = torch.export.export, []

    def export(*args, **options):
        thread = threading.Thread(target=lambda: owned.append(TRACING.acquire(blocking=False)))
        thread.start()
        thread.join()
        return real(*args, **options)

    monkeypatch.setattr(torch.export, "export", export)
    ae.export(build("vit").eval(), tmp_path / "a.pt2", check=False)
    assert owned == [False]
