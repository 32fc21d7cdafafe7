"""The Ray Serve deployment: its arguments, and a real one on this machine where ray is installed."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("httpx")
pytest.importorskip("timm")
pytest.importorskip("PIL")

import httpx
from real_adapters import CONFIGS, write_all
from serving_fakes import form

from alore_ext.serving.ray import build_app, parse_arguments
from alore_ext.training.errors import InputError

NEEDED = {"backbone": "tiny_vit", "adapters": "folder"}


def test_arguments_are_converted_to_what_the_options_are():
    options, replicas, num_gpus = parse_arguments(
        NEEDED
        | {
            "replicas": "3",
            "num_gpus": "0.5",
            "max_batch": "16",
            "max_delay_ms": "2.5",
            "centre_crop": "True",
            "img_size": "32",
        }
    )
    assert (replicas, num_gpus) == (3, 0.5)
    assert (options.max_batch, options.max_delay_ms, options.img_size) == (16, 2.5, 32)
    assert options.centre_crop is True and options.adapters == "folder" and options.watch_s == 5
    assert parse_arguments(NEEDED | {"watch_s": 1})[0].watch_s == 1 and parse_arguments(NEEDED)[2] is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"backbone": "tiny_vit"}, "adapters=... is needed"),
        ({"adapters": "folder"}, "backbone=... is needed"),
        (NEEDED | {"max_batches": "3"}, "unknown argument max_batches; known: replicas, num_gpus, max_batch,"),
        (NEEDED | {"max_batch": "many"}, "max_batch must be of type int, got 'many'"),
        (NEEDED | {"pretrained": "yes"}, "pretrained must be of type bool, got 'yes'"),
        (NEEDED | {"max_queue": "0"}, "--max-queue must be at least 1"),
        (NEEDED | {"replicas": "0"}, "replicas must be at least 1, got 0"),
        (NEEDED | {"num_gpus": "-1"}, "num_gpus must be a number from 0 on, got -1"),
        (NEEDED | {"num_gpus": "one"}, "num_gpus must be of type float, got 'one'"),
        (NEEDED | {"reload_token": "x"}, "one replica of many"),
    ],
)
def test_what_bad_arguments_get(arguments, words):
    with pytest.raises(InputError) as caught:
        parse_arguments(arguments)
    assert words in str(caught.value)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs ray: pip install 'alore_ext\[ray\]'"):
        build_app(NEEDED)


@pytest.mark.slow  # 30 s, of which Ray takes 25
def test_a_real_deployment(tmp_path, monkeypatch):
    for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    serve = pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
    write_all(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app({"backbone": "tiny_vit", "adapters": str(tmp_path), "device": "cpu", "max_batch": "4"}))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            assert client.get("/health").json()["adapters"] == len(CONFIGS)
            with ThreadPoolExecutor(8) as threads:
                names = list(CONFIGS) * 8
                answers = list(threads.map(lambda name: client.post("/predict", **form(3, name)), names))
            for name, answer in zip(names, answers, strict=True):
                assert answer.json()["adapter"] == name
                assert all(p["label"].startswith(f"{name} ") for p in answer.json()["predictions"])
            assert client.post("/predict", **form(3, "nobody")).status_code == 404
    finally:
        serve.shutdown()
        ray.shutdown()
