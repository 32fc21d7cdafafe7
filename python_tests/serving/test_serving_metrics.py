"""What is counted, and that no client can make the counters grow without bound."""

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("PIL")

from prometheus_client.parser import text_string_to_metric_families
from serving_fakes import FakePool, form

from alore_ext.serving.batching import BatchRecord
from alore_ext.serving.metrics import Metrics


def samples(text):
    return {
        (sample.name.removeprefix("alore_ext_"), *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_are_counted_by_route_status_and_adapter(serving):
    client = serving(FakePool({"a": 3, "b": 5}))
    for adapter in ("a", "a", "b", "nobody", "someone else"):
        client.post("/predict", **form(1, adapter))
    client.get("/health")
    client.get("/wp-admin.php")
    client.get("/another/path")
    values = samples(client.get("/metrics").text)
    assert values[("requests_total", "adapter=a", "route=/predict", "status=200")] == 2
    assert values[("requests_total", "adapter=b", "route=/predict", "status=200")] == 1
    assert values[("requests_total", "adapter=unknown", "route=/predict", "status=404")] == 2
    assert values[("requests_total", "adapter=", "route=/health", "status=200")] == 1
    assert values[("requests_total", "adapter=", "route=other", "status=404")] == 2
    assert values[("rejected_total", "reason=unknown_adapter")] == 2
    assert values[("request_seconds_count", "route=/predict")] == 5
    assert values[("batch_size_sum",)] == values[("queue_seconds_count",)] == 3
    assert values[("adapters_loaded",)] == 2 and values[("queue_depth",)] == 0
    assert not any("someone" in part or "wp-admin" in part for key in values for part in key)


def test_servers_do_not_share_their_counters(serving):
    first, second = serving(), serving()
    first.post("/predict", **form(1, "a"))
    assert ("requests_total", "adapter=a", "route=/predict", "status=200") not in samples(second.get("/metrics").text)


def test_names_are_counted_up_to_a_bound(monkeypatch):
    monkeypatch.setattr("alore_ext.serving.metrics._MOST_ADAPTERS", 2)
    metrics = Metrics()
    for name in ("a", "b", "c", "d", "a"):
        metrics.request("/predict", 200, 0.1, name, {"a", "b", "c", "d"})
    metrics.request("/predict", 200, 0.1, "a", set())  # removed since: its series goes on
    values = samples(metrics.text().decode())
    counts = {key[1]: value for key, value in values.items() if key[0] == "requests_total"}
    assert counts == {"adapter=a": 3, "adapter=b": 1, "adapter=other": 2}


def test_a_batch_is_counted():
    metrics = Metrics()
    metrics.batch(BatchRecord(3, (0.001, 0.002, 0.3), 0.2, 1))
    values = samples(metrics.text().decode())
    assert values[("batch_size_bucket", "le=2.0")] == 0 and values[("batch_size_bucket", "le=4.0")] == 1
    assert values[("batch_seconds_sum",)] == 0.2 and values[("failed_predictions_total",)] == 1
    assert values[("queue_seconds_sum",)] == 0.303
