"""`alore-ext serve` with the bundled ViT and real adapters, as a user runs it."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")
pytest.importorskip("timm")

import httpx
import torch
from PIL import Image
from processes import environment
from real_adapters import CONFIGS, write_adapter, write_all
from serving_fakes import as_json, encoded

import alore_ext as ae
from alore_ext.cli import main
from alore_ext.models import tiny_vit
from alore_ext.serving.images import Decoder
from alore_ext.training.backbone import input_spec
from alore_ext.training.images import normalize

COMMAND = [sys.executable, "-c", "import sys; from alore_ext.cli import main; sys.exit(main())", "serve"]
COMMAND += ["--backbone", "tiny_vit", "--port", "0"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return folder, write_all(folder)


class Process:
    """The command in a process of its own, from the moment that it answers."""

    def __init__(self, folder, device, *options):
        self.popen = subprocess.Popen(
            [
                *COMMAND,
                "--backbone",
                "tiny_vit",
                "--adapters",
                str(folder),
                "--port",
                "0",
                "--device",
                str(device),
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment(OMP_NUM_THREADS="1", TOKEN="geheim"),
        )
        self.out = []
        for line in self.popen.stdout:
            self.out.append(line)
            if found := re.search(r"http://\S+", line):
                self.address = found[0]
                return
        raise AssertionError(self.popen.stderr.read())

    def end(self, number=signal.SIGTERM):
        """Send the signal; returns the exit code and what was written to stderr."""
        self.popen.send_signal(number)
        _, err = self.popen.communicate(timeout=60)
        return self.popen.returncode, err


@pytest.fixture
def start(request):
    processes = []

    def start(*arguments):
        processes.append(Process(*arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.popen.kill()
        process.popen.communicate()


def pictures(count):
    rng = numpy.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=numpy.uint8)) for _ in range(count)]


def check(answer, model, image, name, tolerance):
    """The answer's probabilities are those of the patched model itself, which was not merged, pooled or batched."""
    spec = input_spec(tiny_vit(), None)
    pixels = Decoder(spec.size, 10**6)(encoded(image))[None]
    with torch.no_grad():
        probabilities = model(normalize(pixels.float(), spec.mean, spec.std)).softmax(1)[0]
    assert answer["adapter"] == name
    given = answer["predictions"]
    assert [p["label"] for p in given] == [f"{name} {p['index']}" for p in given]
    want = [probabilities[p["index"]].item() for p in given]
    assert [p["probability"] for p in given] == pytest.approx(want, abs=tolerance)
    assert want[0] > probabilities.max() - 2 * tolerance
    assert [p["probability"] for p in given] == sorted((p["probability"] for p in given), reverse=True)


def test_the_command_from_start_to_sigterm_in_flight(start, adapters, tmp_path, device):
    folder, models = adapters
    process = start(folder, device, "--max-delay-ms", "1000", "--max-batch", "12", "--reload-token-env", "TOKEN")
    assert "3 of" in "".join(process.out) and "tiny_vit, 32x32" in "".join(process.out)
    with httpx.Client(base_url=process.address, timeout=30) as client:
        described = {adapter["name"]: adapter for adapter in client.get("/adapters").json()["adapters"]}
        assert {name: a["num_classes"] for name, a in described.items()} == {n: c for n, (_, c) in CONFIGS.items()}
        assert client.get("/health").json()["ready"]

        images = pictures(24)
        names = [list(CONFIGS)[i % 3] for i in range(24)]
        with ThreadPoolExecutor(12) as threads:
            ask = [
                threads.submit(client.post, "/predict", **as_json(encoded(image), name, top_k=3))
                for image, name in zip(images, names, strict=True)
            ]
            answers = [future.result().json() for future in ask]
        for image, name, answer in zip(images, names, answers, strict=True):
            assert len(answer["predictions"]) == 3
            check(answer, models[name], image, name, 1e-4 if device.type == "cpu" else 1e-2)  # there with TF32

        (folder / "lora.safetensors").rename(tmp_path / "lora.safetensors")
        report = client.post("/adapters/reload", headers={"authorization": "Bearer geheim"}).json()
        (tmp_path / "lora.safetensors").rename(folder / "lora.safetensors")
        assert report["removed"] == ["lora"] and report["adapters"] == ["kronecker", "masked"]

        sent, results = threading.Barrier(9), []

        def late(image):
            with httpx.Client(base_url=process.address, timeout=30) as own:
                own.get("/health")  # connected
                sent.wait()
                results.append(own.post("/predict", **as_json(encoded(image), "masked")))

        threads = [threading.Thread(target=late, args=(image,)) for image in images[:8]]
        for thread in threads:
            thread.start()
        sent.wait()
        while client.get("/health").json()["queued"] < 8:  # they wait a second for a batch that does not fill
            assert not results
    code, err = process.end()
    for thread in threads:
        thread.join()
    assert [result.status_code for result in results] == [200] * 8
    assert code == 0 and "Traceback" not in err, err


def test_headers_without_end_are_cut_off(start, adapters, device):
    """Whatever parsers are installed, a client cannot fill the memory before its request is seen."""
    folder, _ = adapters
    process = start(folder, device, "--max-queue", "1", "--max-reading", "1")
    address = httpx.URL(process.address)
    with socket.create_connection((address.host, address.port), timeout=30) as client:
        with pytest.raises(OSError):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
            for _ in range(64):
                client.sendall(b"a" * 1_000_000)
    assert httpx.get(f"{process.address}/health", timeout=30).json()["ready"]
    with contextlib.ExitStack() as stack:  # nor with connections
        for _ in range(130):
            stack.enter_context(socket.create_connection((address.host, address.port), timeout=30))
        assert httpx.get(f"{process.address}/health", timeout=30).status_code == 503
    until(lambda: httpx.get(f"{process.address}/health", timeout=30).status_code == 200)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_and_the_options(start, adapters, device):
    folder, models = adapters
    options = ["--activate", "kronecker", "--dtype", "bf16", "--host", "localhost", "--watch", "0.1"]
    options += ["--graph-batches", "1,4"] if device.type == "cuda" else []
    (folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    try:
        process = start(folder, device, *options)
    finally:
        (folder / "broken.safetensors").unlink()
    image = pictures(1)[0]
    for name in ("kronecker", "masked"):  # merged, and beside it
        answer = httpx.post(f"{process.address}/predict", timeout=30, **as_json(encoded(image), name)).json()
        check(answer, models[name], image, name, 0.05)
    code, err = process.end(signal.SIGINT)
    assert code == 0 and "adapter  broken: not loaded" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "options, words",
    [
        (("--backbone", "tiny_vit", "--adapters", "/nowhere"), "--adapters: there is no folder /nowhere"),
        (("--adapters", "{}"), "--backbone NAME is needed"),
        (("--backbone", "resnet", "--adapters", "{}"), "--backbone resnet: give --pretrained or --weights FILE"),
        (("--backbone", "nonsense", "--pretrained", "--adapters", "{}"), "has no model 'nonsense'"),
        (("--model", "tiny_vit", "--adapters", "{}", "--max-batch", "0"), "--max-batch must be at least 1, got 0"),
        (
            ("--model", "tiny_vit", "--adapters", "{}", "--max-delay-ms", "-1"),
            "must be a number from 0 on",
        ),
        (
            ("--model", "tiny_vit", "--adapters", "{}", "--max-megapixels", "nan"),
            "--max-megapixels must be a number",
        ),
        (
            ("--model", "tiny_vit", "--adapters", "{}", "--max-megapixels", "500"),
            "--max-megapixels must be at most 89, beyond which Pillow takes an image for a bomb, got 500",
        ),
        (("--model", "tiny_vit", "--adapters", "{}", "--body-timeout", "0"), "--body-timeout must be a number above 0"),
        (("--model", "tiny_vit", "--adapters", "{}", "--max-reading", "0"), "--max-reading must be at least 1, got 0"),
        (("--model", "tiny_vit", "--adapters", "{}", "--max-request-mb", "inf"), "--max-request-mb must be a number"),
        (("--model", "tiny_vit", "--adapters", "{}", "--watch", "0"), "--watch must be a number above 0"),
        (("--model", "tiny_vit", "--adapters", "{}", "--port", "70000"), "cannot listen there"),
        (("--model", "tiny_vit", "--adapters", "{}", "--host", "no.such.host.invalid"), "cannot listen there"),
        (("--model", "tiny_vit", "--adapters", "{}", "--reload-token-env", "NOT_THERE"), "has no NOT_THERE"),
        (("--model", "tiny_vit", "--adapters", "{}", "--reload-token-file", "/none"), "cannot read /none"),
        (("--model", "tiny_vit", "--adapters", "{}", "--activate", "x"), "no adapter x; none is loaded"),
        (("--model", "tiny_vit", "--adapters", "{}", "--graph-batches", "1"), "name the adapter with --activate"),
        (
            ("--model", "tiny_vit", "--adapters", "{}", "--activate", "x", "--graph-batches", "1,b"),
            "--graph-batches must be numbers like 1,8,32, got 1,b",
        ),
    ],
)
def test_what_bad_options_get(options, words, tmp_path, capsys):
    assert main(["serve", "--device", "cpu", *(option.format(tmp_path) for option in options)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize(
    "missing, pip_name", [("fastapi", "fastapi"), ("prometheus_client", "prometheus-client"), ("uvicorn", "uvicorn")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(missing, pip_name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve", "--backbone", "tiny_vit", "--adapters", str(tmp_path)]) == 2
    expected = f"alore-ext serve: error: this command needs {pip_name}: pip install 'alore_ext[serve]'"
    assert capsys.readouterr().err.strip() == expected


def test_an_adapter_without_a_classifier_is_not_served(tmp_path):
    from alore_ext.serving.launch import ServerOptions, open_server

    write_adapter(tmp_path, "headless", ae.AloreConfig(), 3, 0, include_head=False, labels=None)
    server = open_server(ServerOptions(backbone="tiny_vit", adapters=str(tmp_path), device="cpu"))
    assert server.pool.names == [] and "include_head=True" in server.report.failed["headless"]


def test_the_package_imports_none_of_the_servers_packages():
    missing = "fastapi, uvicorn, starlette, prometheus_client, multipart, ray, PIL, timm, torchvision, transformers"
    code = "import sys, alore_ext.serving, alore_ext.cli; print(*sorted(sys.modules))"
    root = Path(ae.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not set(missing.split(", ")) & set(done.stdout.split())
