"""The HTTP interface over a pool whose answers show where they come from."""

import base64
import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("python_multipart")
pytest.importorskip("PIL")

import httpx
import torch
from serving_fakes import FakePool, as_json, encoded, form, png

from alore_ext.serving.images import Decoder
from alore_ext.serving.service import rank


def test_predict_from_a_file_and_from_base64(serving):
    pool = FakePool({"a": 3, "b": 5}, labels={"b": ["v", "w", "x", "y", "z"]})
    client = serving(pool)
    for arguments in (form(4, "b", top_k=2), as_json(png(4), "b", top_k=2)):
        answer = client.post("/predict", **arguments)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["adapter"] == "b" and len(body["predictions"]) == 2
        assert (body["predictions"][0]["label"], body["predictions"][0]["index"]) == ("y", 3)
        total = 1 + 2 / math.e + 1 / math.e**2 + 1 / math.e**3  # logits 0, -1, -1, -2, -3
        assert body["predictions"][0]["probability"] == pytest.approx(1 / total, rel=1e-5)
        assert body["predictions"][1]["probability"] == pytest.approx(1 / math.e / total, rel=1e-5)
    assert pool.threads == {"alore-ext-predict"}


def test_top_k_defaults_to_5_and_ends_at_the_number_of_classes(serving):
    client = serving(FakePool({"few": 2, "many": 9}))
    answers = {k: client.post("/predict", **form(1, k)).json()["predictions"] for k in ("few", "many")}
    assert len(answers["few"]) == 2 and len(answers["many"]) == 5
    assert [p["label"] for p in answers["few"]] == ["1", "0"]
    assert len(client.post("/predict", **form(1, "many", top_k=1000)).json()["predictions"]) == 9


def test_rank_of_heads_of_unequal_size():
    rows = [torch.tensor([0.0, 2.0, 1.0]), torch.tensor([1.0]), torch.tensor([-5.0, -6.0]).bfloat16()]
    ranked = rank(rows, 2)
    assert [[index for index, _ in row] for row in ranked] == [[1, 2], [0], [0, 1]]
    for row, logits in zip(ranked, rows, strict=True):
        expected = logits.double().softmax(0).sort(descending=True).values[:2].tolist()
        assert [p for _, p in row] == pytest.approx(expected, rel=1e-6)
    single = rank(torch.stack([rows[0], rows[0].flip(0)]), 1)
    assert [row[0][0] for row in single] == [1, 1]


def test_adapters_and_health(serving):
    client = serving(FakePool({"a": 3, "b": 2}, labels={"b": ["no", "yes"]}))
    assert client.get("/adapters").json() == {
        "adapters": [
            {"name": "a", "num_classes": 3, "labels": None},
            {"name": "b", "num_classes": 2, "labels": ["no", "yes"]},
        ]
    }
    health = client.get("/health")
    assert health.status_code == 200
    assert health.json() == {"live": True, "ready": True, "adapters": 2, "reading": 0, "queued": 0}


def b64(data):
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "status, words, arguments",
    [
        (404, ["'c'", "known: a, b"], form(1, "c")),
        (422, ["adapter", "none came", "known: a, b"], {"files": {"file": png(1)}}),
        (422, ["adapter", "7"], {"json": {"image": b64(png(1)), "adapter": 7}}),
        (422, ["file", "adapter"], {"data": {"adapter": "a"}, "files": {"picture": png(1)}}),
        (422, ["file", "str"], {"files": {"file": (None, "text")}, "data": {"adapter": "a"}}),
        (422, ["top_k", "'many'"], form(1, "a", top_k="many")),
        (422, ["top_k", "'-1'"], form(1, "a", top_k="-1")),
        (422, ["top_k", "0"], form(1, "a", top_k="0")),
        (422, ["top_k", "True"], as_json(png(1), "a", top_k=True)),
        (422, ["top_k", "1.5"], as_json(png(1), "a", top_k=1.5)),
        (422, ["image", "base64", "adapter"], {"json": {"adapter": "a"}}),
        (422, ["image", "base64"], {"json": {"adapter": "a", "image": "#!"}}),
        (422, ["image", "base64"], {"json": {"adapter": "a", "image": "ü"}}),
        (404, ["\\ud800"], {"content": b'{"image": "aGFsbG8=", "adapter": "\\ud800"}'}),
        (400, ["JSON"], {"content": b"{"}),
        (400, ["JSON"], {"content": b"[" * 100_000}),
        (400, ["JSON"], {"content": b"\xff\xfe"}),
        (400, ["object", "list"], {"json": [1]}),
        (415, ["multipart", "text/plain"], {"content": b"hallo", "headers": {"content-type": "text/plain"}}),
        (415, ["multipart", "''"], {"content": b"hallo", "headers": {"content-type": ""}}),
        (400, ["multipart"], {"content": b"hallo", "headers": {"content-type": "multipart/form-data"}}),
        (400, ["multipart"], {"content": b"hallo", "headers": {"content-type": "multipart/form-data; boundary=x"}}),
        (400, ["multipart"], {"files": [("file", png(1)), ("file", png(2))], "data": {"adapter": "a"}}),
        (415, ["no image", "JPEG"], as_json(b"hallo", "a")),
        (415, ["empty"], as_json(b"", "a")),
        (415, ["decode", "PNG"], as_json(png(1, (100, 100))[:-40], "a")),
    ],
)
def test_what_bad_requests_get(serving, status, words, arguments):
    client = serving()
    if "content" in arguments and "headers" not in arguments:
        arguments = arguments | {"headers": {"content-type": "application/json"}}
    answer = client.post("/predict", **arguments)
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and all(word in detail for word in words), detail
    assert "Traceback" not in detail and len(detail) < 600
    assert client.post("/predict", **form(4, "b")).json()["predictions"][0]["index"] == 3  # and it still works


@pytest.mark.parametrize("charset", ["undefined", "hex", "idna", "utf-16", "no-such"])
def test_a_multipart_charset_that_cannot_be_decoded_is_the_clients_fault(serving, charset):
    body = b'--x\r\nContent-Disposition: form-data; name="adapter"\r\n\r\na\xff\r\n--x--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    answer = serving().post("/predict", content=body, headers=headers)
    assert answer.status_code in (400, 422), answer.text
    assert charset != "undefined" or answer.status_code == 400 and "multipart" in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["multipart", "json"])
def test_mangled_bodies_are_the_clients_fault(serving, kind):
    client, rng = serving(), random.Random(0)
    arguments = form(3, "a") if kind == "multipart" else as_json(png(3), "a")
    request = httpx.Request("POST", "http://x/predict", **arguments)
    headers = {"content-type": request.headers["content-type"]}
    for _ in range(250):
        body = bytearray(request.read())
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(body))
            body[place : place + rng.choice([0, 1, 1, 30])] = rng.randbytes(rng.choice([0, 1, 1, 10]))
        answer = client.post("/predict", content=bytes(body), headers=headers)
        assert answer.status_code in (200, 400, 404, 413, 415, 422), answer.text
        assert ("predictions" if answer.status_code == 200 else "detail") in answer.json()


def test_a_long_body_is_refused_by_its_length_and_by_its_bytes(serving):
    client = serving(max_request_mb=0.01)
    small, large = json.dumps(as_json(png(4), "a")["json"]).encode(), b" " * 10_001
    kind = {"content-type": "application/json"}
    read = []

    def chunks():  # no Content-Length
        for _ in range(1000):
            read.append(1)
            yield large[:1000]

    for content in (large, chunks()):
        answer = client.post("/predict", content=content, headers=kind)
        assert answer.status_code == 413 and "10,000" in answer.json()["detail"]
    assert client.post("/predict", content=small + large[len(small) : 10_000], headers=kind).status_code == 200
    multipart = form(1, "a") | {"files": {"file": large}}
    assert client.post("/predict", **multipart).status_code == 413


def test_an_image_bomb_is_refused_before_it_is_decoded(serving, monkeypatch):
    from PIL import Image, ImageFile

    def no_decoding(self):
        raise AssertionError("decoded")

    bomb = encoded(Image.new("1", (20_000, 20_000)))  # 400 megapixels in some kilobytes
    large = encoded(Image.new("1", (1001, 1000)))
    client = serving(max_megapixels=1)
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile.ImageFile, "load", no_decoding)
        for image in (bomb, large):
            answer = client.post("/predict", **as_json(image, "a"))
            assert answer.status_code == 413 and "1,000,000" in answer.json()["detail"], answer.text
    assert client.post("/predict", **as_json(encoded(Image.new("1", (1000, 1000))), "a")).status_code == 200


def test_nan_is_an_error_of_its_own_request(serving):
    client = serving(FakePool({"a": 3}, nan=9))
    answer = client.post("/predict", **form(9, "a"))
    assert answer.status_code == 500 and "not finite" in answer.json()["detail"]
    assert client.post("/predict", **form(1, "a")).status_code == 200


def test_a_model_that_fails_tells_the_log_and_not_the_client(serving, caplog):
    client = serving(FakePool({"a": 3}, broken=9))
    answer = client.post("/predict", **form(9, "a"))
    assert answer.status_code == 500 and "the model broke" not in answer.text and "log" in answer.json()["detail"]
    assert "the model broke" in caplog.text
    assert client.post("/predict", **form(1, "a")).status_code == 200


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_device_is_not_ready_and_refuses(serving, monkeypatch, lost):
    """An accelerator's error alone is not enough: some of them pass."""

    def broken(*arguments, **options):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    if lost:
        monkeypatch.setattr("alore_ext.serving.service._lost", lambda device: True)
    pool = FakePool({"a": 3})
    client = serving(pool)
    with monkeypatch.context() as patched:
        patched.setattr(pool, "predict", broken, raising=False)
        assert client.post("/predict", **form(1, "a")).status_code == 500
    health, answer = client.get("/health"), client.post("/predict", **form(1, "a"))
    assert (health.status_code, answer.status_code) == ((503, 503) if lost else (200, 200))
    assert health.json()["live"] == health.json()["ready"] == (not lost)
    assert not lost or "started anew" in answer.json()["detail"]


def test_reading_requests_waits_for_no_image(serving, monkeypatch):
    """Images that take long to decode keep nobody from an answer that needs none."""
    begun, gate = threading.Event(), threading.Event()
    decode = Decoder.__call__

    def slow(self, data):
        begun.set()
        assert gate.wait(30)
        return decode(self, data)

    monkeypatch.setattr(Decoder, "__call__", slow)
    client = serving(decode_threads=1)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(client.post, "/predict", **as_json(png(4), "b"))
        try:
            assert begun.wait(10)
            assert client.post("/predict", **as_json(png(1), "nobody")).status_code == 404
            assert not asked.done()
        finally:
            gate.set()
        assert asked.result().status_code == 200


def test_an_error_nobody_thought_of_is_json_too(serving, monkeypatch):
    client = serving()

    def surprise(self, *arguments):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("alore_ext.serving.service.PredictionService.classify", surprise)
    answer = client.post("/predict", **form(1, "a"))
    assert answer.status_code == 500 and answer.json() == {"detail": "internal error; the server's log has the cause"}
    monkeypatch.undo()
    assert client.post("/predict", **form(1, "a")).status_code == 200


def test_unknown_paths_and_methods(serving):
    client = serving()
    assert client.get("/nothing").status_code == 404
    assert client.get("/predict").status_code == 405
    assert client.post("/adapters/reload").status_code == 403  # no token was configured
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]["/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
    }
