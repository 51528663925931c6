"""Metrics as text: what Prometheus's own client reads out of it."""

from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamworker.telemetry.exposition import Family, Histogram, render
from streamworker.worker.metrics import FAMILIES

COUNT = Family("a_total", "counter", 'Says "\\" and\nmore.', ("queue", "kind"))
SIZE = Family("b_seconds", "histogram", "How long.", ("queue",), (0.5, 1.0, 10.0))
GAUGE = Family("c", "gauge", "How much.")


def read(text: bytes):
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def test_labels_of_any_text_come_out_as_they_went_in():
    hostile = 'x"} 1\ny{z="\\'
    families = read(render([(COUNT, {("q", hostile): 3})]))
    (sample,) = families["a"].samples
    assert sample.labels == {"queue": "q", "kind": hostile}
    assert sample.value == 3
    assert families["a"].documentation == COUNT.help


def test_a_histogram_is_cumulative_and_its_last_bucket_is_its_count():
    tally = Histogram(SIZE.bounds)
    for value in (0.1, 0.5, 0.6, 11.0):
        tally.add(value)
    samples = read(render([(SIZE, {("q",): tally})]))["b_seconds"].samples
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert buckets == {"0.5": 2, "1": 3, "10": 3, "+Inf": 4}
    assert {sample.name: sample.value for sample in samples if "le" not in sample.labels} == {
        "b_seconds_sum": pytest.approx(12.2), "b_seconds_count": 4,
    }  # fmt: skip


@pytest.mark.parametrize("value", [0, 1, 0.25, 1e-9, 2**53, 1e300, math.inf, -math.inf])
def test_numbers_keep_their_value(value):
    (sample,) = read(render([(GAUGE, {(): value})]))["c"].samples
    assert sample.value == value


def test_a_metric_without_numbers_is_named_all_the_same():
    assert read(render([(COUNT, {})]))["a"].type == "counter"


def test_names_are_once_and_follow_the_rules():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert (len(family.bounds) > 0) == (family.kind == "histogram"), family.name
        assert list(family.bounds) == sorted(set(family.bounds))
        assert not {"job_id", "worker_id", "worker", "id", "job", "le"} & set(family.labels)
