"""Many clients at once, some of them bad: nothing is lost, and nobody gets another's answer."""

import asyncio
import collections
import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")
pytest.importorskip("PIL")

import httpx
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving_fakes import SPEC, FakePool, as_json, encoded, form, png
from serving_live import running

from alore_ext.serving.app import create_app
from alore_ext.serving.settings import Settings

ADAPTERS = {"a": 7, "b": 11, "c": 2, "d": 13}


def run(address, scenario, connections=100):
    async def main():
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(base_url=address, timeout=30, limits=limits) as client:
            return await scenario(client)

    return asyncio.run(main())


def samples(text, name):
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"alore_ext_{name}"
    }


@pytest.fixture
def app():
    def make(pool, **settings):
        return create_app(pool, SPEC, Settings(**settings))

    return make


def test_hundreds_of_requests_with_failures_among_them(app):
    pool = FakePool(ADAPTERS, broken=255, nan=254, seconds=0.001)
    bad = {
        404: lambda: form(1, "nobody"),
        415: lambda: as_json(b"no image", "a"),
        422: lambda: form(1, "a", top_k="x"),
        413: lambda: as_json(encoded(Image.new("1", (3000, 2000))), "a"),
        500: lambda: form(255, "b"),
    }
    kinds = [(number % 250, name, 200) for number, name in zip(range(240), list(ADAPTERS) * 60, strict=True)]
    kinds += [(None, None, status) for status in list(bad) * 8] + [(254, "d", 500)] * 5

    async def scenario(client):
        async def ask(value, name, status):
            if value is None:
                return await client.post("/predict", **bad[status]())
            arguments = form(value, name, top_k=2) if value % 2 else as_json(png(value), name, top_k=2)
            return await client.post("/predict", **arguments)

        order = sorted(kinds, key=lambda kind: hash(str(kind)) % 1000)
        return order, await asyncio.gather(*(ask(*kind) for kind in order)), (await client.get("/metrics")).text

    with running(app(pool, max_megapixels=5, max_queue=1000)) as address:
        order, answers, metrics = run(address, scenario)
    for (value, name, status), answer in zip(order, answers, strict=True):
        assert answer.status_code == status, answer.text
        if status == 200:
            body = answer.json()
            assert body["adapter"] == name and body["predictions"][0]["index"] == pool.expected(name, value)
    assert any(len(set(batch)) > 1 for batch in pool.batches), "adapters were never mixed in a batch"
    assert max(map(len, pool.batches)) <= 32 and len(pool.batches) < 240
    counts = samples(metrics, "requests_total")
    by_status = collections.Counter()
    for labels, value in counts.items():
        if dict(labels)["route"] == "/predict":
            by_status[int(dict(labels)["status"])] += value
    assert by_status == collections.Counter(status for _, _, status in order)
    assert samples(metrics, "queue_depth") == {(): 0}


def test_a_full_queue_gets_429_and_the_others_their_answer(app):
    pool = FakePool(ADAPTERS)
    pool.gate.clear()

    async def scenario(client):
        ask = [asyncio.ensure_future(client.post("/predict", **form(i, "b"))) for i in range(60)]
        while sum(task.done() for task in ask) < 50:
            await asyncio.sleep(0.01)
        pool.gate.set()
        answers = await asyncio.gather(*ask)
        again = await client.post("/predict", **form(3, "b"))
        return answers, again, (await client.get("/metrics")).text

    with running(app(pool, max_queue=10, max_batch=4)) as address:
        answers, again, metrics = run(address, scenario)
    assert collections.Counter(answer.status_code for answer in answers) == {200: 10, 429: 50}
    for value, answer in enumerate(answers):
        if answer.status_code == 200:
            assert answer.json()["predictions"][0]["index"] == pool.expected("b", value)
        else:
            assert answer.headers["retry-after"] == "1" and "of 10 at the most" in answer.json()["detail"]
    assert again.status_code == 200
    assert samples(metrics, "rejected_total")[(("reason", "queue_full"),)] == 50


def raw_request(value, adapter):
    request = httpx.Request("POST", "http://x/predict", **form(value, adapter))
    head = "".join(f"{name}: {text}\r\n" for name, text in request.headers.items())
    return f"POST /predict HTTP/1.1\r\n{head}\r\n".encode() + request.read()


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_clients_that_go_away_harm_nobody_and_free_their_place(app):
    pool = FakePool(ADAPTERS)
    pool.gate.clear()
    place = None

    def connect(data):
        connection = socket.create_connection(place)
        connection.sendall(data)
        return connection

    with running(app(pool, max_batch=4, max_queue=60)) as address:
        place = (urlsplit(address).hostname, urlsplit(address).port)
        client = httpx.Client(base_url=address, timeout=20)
        whole = [connect(raw_request(200 + i, "b")) for i in range(30)]  # waiting for the model
        half = [connect(raw_request(1, "b")[:-50]) for _ in range(10)]  # in the middle of their bodies
        until(lambda: client.get("/health").json()["queued"] == 30)
        until(lambda: client.get("/health").json()["reading"] == 10)
        staying = {200 + i: whole[i] for i in range(0, 30, 5)}
        for connection in set(whole + half) - set(staying.values()):
            connection.close()
        until(lambda: client.get("/health").json()["queued"] == len(staying))
        until(lambda: client.get("/health").json()["reading"] == 0)
        pool.gate.set()
        for value, connection in staying.items():
            connection.settimeout(10)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            assert json.load(answer)["predictions"][0]["index"] == pool.expected("b", value)
            connection.close()
        gone = samples(client.get("/metrics").text, "requests_total")
        client.close()
    assert sum(map(len, pool.batches)) <= 4 + len(staying)  # of those who left, only whom the first batch had taken
    assert sum(value for labels, value in gone.items() if ("status", "499") in labels) == 40 - len(staying)


def test_a_body_that_never_ends_is_given_up(app):
    with running(app(FakePool(ADAPTERS), body_timeout_s=0.3, max_queue=1)) as address:
        place = (urlsplit(address).hostname, urlsplit(address).port)
        with socket.create_connection(place) as connection:
            connection.sendall(raw_request(1, "a")[:-50])
            connection.settimeout(10)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 408 and "within the 0.3 s of --body-timeout" in json.load(answer)["detail"]
        assert httpx.post(f"{address}/predict", **form(1, "a")).status_code == 200


def test_slow_clients_take_no_place_in_the_queue(app):
    with running(
        app(FakePool(ADAPTERS), max_queue=1, max_reading=4),
    ) as address:
        place = (urlsplit(address).hostname, urlsplit(address).port)
        slow = [socket.create_connection(place) for _ in range(4)]
        for connection in slow[:3]:
            connection.sendall(raw_request(1, "a")[:-50])
        with httpx.Client(base_url=address, timeout=20) as client:
            until(lambda: client.get("/health").json()["reading"] == 3)
            assert client.post("/predict", **form(1, "a")).status_code == 200
            slow[3].sendall(raw_request(1, "a")[:-50])
            until(lambda: client.get("/health").json()["reading"] == 4)
            refused = client.post("/predict", **form(1, "a"))
            assert refused.status_code == 429 and "4 requests are being read, of 4" in refused.json()["detail"]
            for connection in slow:
                connection.close()
            until(lambda: client.get("/health").json()["reading"] == 0)
            assert client.post("/predict", **form(1, "a")).status_code == 200


def test_the_event_loop_is_free_while_the_model_works(app):
    with running(app(FakePool(ADAPTERS, seconds=0.6))) as address:

        async def scenario(client):
            asked = asyncio.ensure_future(client.post("/predict", **form(1, "a")))
            await asyncio.sleep(0.1)
            started = time.monotonic()
            for path in ("/health", "/adapters", "/metrics"):
                assert (await client.get(path)).status_code == 200
            assert (await client.post("/predict", **form(1, "nobody"))).status_code == 404
            assert time.monotonic() - started < 0.4 and not asked.done()
            return (await asked).status_code

        assert run(address, scenario) == 200
