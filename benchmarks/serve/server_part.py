"""`alore-ext serve` in a process of its own, under load from this one over loopback, with failures among the requests.

The backbone is the bundled ViT. Each client sends its next request when its last is answered. Every answer is compared
with what the adapter's own model gives for that image, computed here.
"""

import asyncio
import collections
import importlib.util
import io
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import alore_ext as ae
from alore_ext.models import tiny_vit

NEEDED = ("fastapi", "uvicorn", "httpx", "python_multipart", "prometheus_client", "PIL")
METHODS = {"alore": ae.AloreConfig(4, 4), "mlae": ae.MlaeConfig(8), "lora": ae.LoraConfig(rank=4)}
ADAPTERS, CLASSES, IMAGES = 12, 10, 64
# Of all requests: an unknown adapter, bytes that are no image, a client that leaves before its answer.
UNKNOWN, BROKEN, LEAVING = 0.03, 0.03, 0.02


def server(args):
    """Rows: requests a second and latencies of good requests, counts by status, what went wrong.

    `lost`: requests without an answer whose client had not left. `wrong`: another status than the request deserves, or
    another adapter's or image's label. `stuck`: requests that the server still holds when all clients are done. `exit`:
    the server's exit code. All must be 0.
    """
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        return [{"part": "server", "what": f"skipped: {', '.join(missing)} not installed"}]
    with tempfile.TemporaryDirectory() as folder:
        pictures = [_picture(i) for i in range(IMAGES)]
        expected = _write_adapters(Path(folder), pictures)
        command = [sys.executable, "-m", "alore_ext.cli", "serve", "--backbone", "tiny_vit", "--adapters", folder]
        command += ["--port", "0", "--max-queue", "1024"] + (["--device", args.device] if args.device else [])
        log = Path(folder) / "server.log"
        # In another folder than this one, where Python would find the source tree before the package that is measured.
        # The caller's PYTHONPATH stays behind it: what the server needs may be there.
        paths = [str(Path(ae.__file__).parents[1]), os.environ.get("PYTHONPATH")]
        where = {"cwd": folder, "env": os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
        with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, **where) as process:
            try:
                address = _address(log, process)
                result = asyncio.run(_load(address, pictures, expected, args.clients, args.seconds))
            finally:
                process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeError(f"the server did not stop in 30 s:\n{log.read_text()}") from None
    latencies = sorted(result.pop("latencies"))
    if not latencies:
        raise RuntimeError(f"the server answered no good request: {result}")
    cut = [latencies[int(len(latencies) * share)] * 1e3 for share in (0.5, 0.99)]
    rate = len(latencies) / result["seconds"]
    row = {"part": "server", "what": f"tiny_vit, {ADAPTERS} adapters, {args.clients} clients", **result}
    row |= {
        "per_s": rate,
        "p50_ms": cut[0],
        "p99_ms": cut[1],
        "mean_ms": statistics.mean(latencies) * 1e3,
        "exit": code,
    }
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(result["statuses"].items()))
    row["text"] = (
        f"{rate:.0f} images/s  p50 {cut[0]:.1f} ms  p99 {cut[1]:.1f} ms  {statuses}, {result['left']} left  "
        f"lost {result['lost']}  wrong {result['wrong']}  stuck {result['stuck']}  exit {code}"
    )
    return [row]


def _picture(seed):
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=generator).float()
    pixels = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").byte()[0].permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@torch.no_grad()
def _write_adapters(folder, pictures):
    """Adapter files; name -> [image] -> label that its own model gives. Near ties are None: either may win."""
    from alore_ext.serving.images import Decoder
    from alore_ext.training.backbone import input_spec
    from alore_ext.training.images import normalize

    expected = {}
    for i in range(ADAPTERS):
        method = list(METHODS)[i % len(METHODS)]
        torch.manual_seed(i)
        model = ae.patch(tiny_vit(num_classes=CLASSES), METHODS[method]).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.15)
        name = f"{method}{i}"
        ae.save_adapter(model, folder / f"{name}.safetensors", labels=[f"{name} class {c}" for c in range(CLASSES)])
        spec = input_spec(model, None)
        pixels = torch.stack([Decoder(spec.size, 10**7)(data) for data in pictures]).float()
        top = model(normalize(pixels, spec.mean, spec.std)).topk(2)
        clear = top.values[:, 0] - top.values[:, 1] > 1e-3
        expected[name] = [
            f"{name} class {index}" if is_clear else None
            for index, is_clear in zip(top.indices[:, 0].tolist(), clear.tolist(), strict=True)
        ]
    return expected


def _address(log, process):
    end = time.time() + 60
    while time.time() < end and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


async def _load(address, pictures, expected, clients, seconds):
    import httpx

    totals = {"statuses": collections.Counter(), "latencies": [], "lost": 0, "wrong": 0, "left": 0}
    limits = httpx.Limits(max_connections=clients + 8)
    async with httpx.AsyncClient(base_url=address, timeout=30, limits=limits) as client:
        await _until_ready(client)
        start = time.perf_counter()
        await asyncio.gather(
            *(_client(client, random.Random(i), pictures, expected, start + seconds, totals) for i in range(clients))
        )
        totals["seconds"] = time.perf_counter() - start
        totals["stuck"] = await _stuck(client)
    totals["statuses"] = dict(totals["statuses"])
    return totals


async def _until_ready(client):
    import httpx

    for _ in range(300):
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise RuntimeError("the server is not ready after 30 s")


async def _stuck(client):
    """Requests that the server holds although nobody waits for one, after time to notice who has left."""
    for _ in range(50):
        health = (await client.get("/health")).json()
        if not (held := health["reading"] + health["queued"]):
            return 0
        await asyncio.sleep(0.1)
    return held


async def _client(client, draw, pictures, expected, end, totals):
    import httpx

    names = list(expected)
    while time.perf_counter() < end:
        name, image, kind = draw.choice(names), draw.randrange(len(pictures)), draw.random()
        data, status = pictures[image], 200
        if kind < UNKNOWN:
            name, status = "nobody", 404
        elif kind < UNKNOWN + BROKEN:
            data, status = data[: draw.randrange(8, 60)], 415
        leaves = kind > 1 - LEAVING
        request = client.post("/predict", files={"file": data}, data={"adapter": name, "top_k": "1"})
        start = time.perf_counter()
        try:
            answer = await asyncio.wait_for(request, 0.002 if leaves else 30)
        except asyncio.TimeoutError:
            totals["left" if leaves else "lost"] += 1
            continue
        except httpx.HTTPError:
            totals["lost"] += 1
            continue
        totals["statuses"][answer.status_code] += 1
        if answer.status_code != status:
            totals["wrong"] += 1
        elif status == 200:
            totals["latencies"].append(time.perf_counter() - start)
            body = answer.json()
            label, own = body["predictions"][0]["label"], expected[name][image]
            totals["wrong"] += body["adapter"] != name or (own is not None and label != own)
