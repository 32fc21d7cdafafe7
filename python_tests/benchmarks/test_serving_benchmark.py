"""benchmarks/serving.py end to end on a tiny backbone: every part gives its rows, and checks what it times."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from alore_ext.serving import AdapterPool

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--model", "vit_tiny_patch16_224", "--model-kwargs", '{"img_size": 32, "depth": 1}', "--dtype", "fp32"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("serving")
    monkeypatch.setattr(importlib.import_module("steps.timing"), "GROUP_SECONDS", 0.01)
    return module


def test_the_pools_parts(script, tmp_path, capsys, device):
    args = [*TINY, "--batch", "8", "--classes", "5", "--seconds", "0.01", "--device", device.type]
    plot, file = tmp_path / "a.png", tmp_path / "a.json"
    script.main([*args, "--json", str(file), "--plot", str(plot)])
    rows = json.loads(file.read_text())["rows"]
    assert {row["part"] for row in rows} == {"merged", "swap", "mixed", "memory"}
    mixed = [row for row in rows if row["part"] == "mixed" and row.get("check") is not None]
    assert len(mixed) == 18 and all(row["ratio"] > 0 and row["check"] < 1e-3 for row in mixed)
    assert all(row["per_s"] == pytest.approx(8e3 / row["ms"]) for row in mixed)
    assert all(row["mb"] > 0 and row["file_mb"] > 0 for row in rows if row["part"] == "memory")
    swaps = {row["what"] for row in rows if row["part"] == "swap"}
    assert {
        f"{call}, {method}" for call in ("pool.activate", "unmerge_ + merge_") for method in ("alore", "mlae")
    } < swaps
    assert plot.stat().st_size > 5000 and "pool.activate, alore" in (out := capsys.readouterr().out)
    assert out.count(" images/s") == sum("ms" in row for row in rows)


def test_a_wrong_mixed_batch_is_not_timed(script, device):
    from serve.pool_parts import _check
    from serve.subject import build, pool_of

    arguments = script._arguments([*TINY, "--classes", "5"])
    base = build(arguments, device)
    pool = pool_of(base, {"alore": 2})
    images = torch.randn(2, 3, 32, 32, device=device)
    assert _check(pool, images, ["alore0", "alore1"]) < 1e-3
    right = pool.predict
    pool.predict = lambda images, adapters=None: right(images, adapters=adapters and adapters[::-1])
    with pytest.raises(RuntimeError, match="from the merged models"):
        _check(pool, images, ["alore0", "alore1"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["alore", "mlae", "lora"])
def test_another_adapters_factors_under_the_right_classifier_are_seen(script, device, method, dtype):
    from serve.pool_parts import _check
    from serve.subject import adapter, build

    torch.manual_seed(0)
    base = build(script._arguments([*TINY[:-1], dtype, "--classes", "5"]), device)
    first, second = (adapter(base, method, seed) for seed in (0, 1))
    second.update((name, value) for name, value in first.items() if name.startswith("head."))
    pool = AdapterPool(base)
    pool.add("first", first)
    pool.add("second", second)
    images = torch.randn(4, 3, 32, 32, device=device, dtype=pool.dtype)
    names = ["first", "second", "first", "second"]
    right = pool.predict
    assert _check(pool, images, names) < 0.05
    for wrong in range(4):  # a single image's is enough
        swapped = [*names]
        swapped[wrong] = names[wrong - 1]
        pool.predict = lambda images, adapters=None, n=swapped: right(images, adapters=adapters and n)
        with pytest.raises(RuntimeError, match="from the merged models"):
            _check(pool, images, names)


def test_a_loop_answers_what_the_mixed_batch_does(script, device):
    from serve.pool_parts import _by_adapter
    from serve.subject import build, pool_of

    pool = pool_of(build(script._arguments([*TINY, "--classes", "5"]), device), {"alore": 2, "lora": 1})
    images, names = torch.randn(4, 3, 32, 32, device=device), ["lora0", "alore1", "lora0", "alore0"]
    answers = torch.stack(pool.predict(images, adapters=names))
    for name, chosen in _by_adapter(images, names):
        own = answers[[n == name for n in names]]
        torch.testing.assert_close(pool.predict(chosen, adapter=name), own, rtol=1e-3, atol=1e-3)


def test_a_part_that_fails_leaves_the_rows_before_it(script, tmp_path, monkeypatch, device):
    def fail(*_):
        raise RuntimeError("no such part")

    monkeypatch.setitem(script.PARTS, "mixed", fail)
    file = tmp_path / "a.json"
    args = [*TINY, "--batch", "4", "--classes", "5", "--device", device.type, "--json", str(file)]
    with pytest.raises(RuntimeError, match="no such part"):
        script.main([*args, "--parts", "memory,mixed"])
    assert [row["part"] for row in json.loads(file.read_text())["rows"]] == ["memory", "memory"]


def test_an_unknown_part_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script._arguments(["--parts", "merged,mised"])
    assert "'mised' is none of merged" in capsys.readouterr().err


def test_the_server_is_skipped_without_its_packages(script, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("serve.server_part"), "NEEDED", ("no_such_package",))
    (row,) = script.main(["--parts", "server", "--device", "cpu"])
    assert row["what"] == "skipped: no_such_package not installed" and row["what"] in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["lost", "wrong", "stuck", "exit"])
def test_a_server_at_fault_is_a_failure_after_its_row_is_kept(script, monkeypatch, tmp_path, capsys, fault):
    row = {"part": "server", "what": "tiny_vit", "text": "9 images/s", "lost": 0, "wrong": 0, "stuck": 0, "exit": 0}
    monkeypatch.setattr(importlib.import_module("serve.server_part"), "server", lambda args: [row | {fault: 1}])
    file = tmp_path / "a.json"
    with pytest.raises(SystemExit, match=f"server failed: {fault} 1"):  # a message: status 1
        script.main(["--parts", "server", "--json", str(file)])
    assert json.loads(file.read_text())["rows"][0][fault] == 1 and "9 images/s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_servers_part(script, capsys):
    for package in ("fastapi", "uvicorn", "httpx", "multipart", "prometheus_client"):
        pytest.importorskip(package)
    (row,) = script.main(["--parts", "server", "--seconds", "2", "--clients", "8", "--device", "cpu"])
    assert row["lost"] == row["wrong"] == row["stuck"] == row["exit"] == 0
    assert row["statuses"][200] > 0 and row["per_s"] > 0
