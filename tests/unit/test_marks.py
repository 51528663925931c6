"""The mark of list mode: every byte survives it, and documents that carry it keep id and count."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker import codec
from streamworker.job import Claim
from streamworker.marks import Mark, mark_of, unmarked

ID = "0198c0de-1234-7abc-8def-0123456789ab"
MARKED = b'{"streamworker":{"id":"%b","deliveries":2},"payload":{"a":1.50}}' % ID.encode()


def test_a_mark_is_taken_off_and_leaves_the_bytes():
    assert unmarked(MARKED) == (b'{"payload":{"a":1.50}}', Mark(ID, 2))
    assert unmarked(b" \n" + MARKED) == (b' \n{"payload":{"a":1.50}}', Mark(ID, 2))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[1]", b'{"payload":{}}', b'{"streamworker":{"id":"x","deliveries":2},"payload":{}}',
        b'{"streamworker":{"deliveries":2,"id":"%b"},"payload":{}}' % ID.encode(), b'{ "streamworker":1,"payload":{}}',
        b'{"payload":{},"streamworker":{"id":"%b","deliveries":2}}' % ID.encode(),
    ],
)  # fmt: skip
def test_what_is_no_mark_of_ours_is_left_alone(body):
    assert unmarked(body) == (body, None)


@given(st.binary())
def test_no_bytes_are_too_odd(body):
    rest, mark = unmarked(body)
    assert mark is not None or rest == body


@pytest.mark.parametrize(
    "value", [None, 1, [], {}, {"id": "x"}, {"id": 5, "deliveries": 1}, {"id": "x", "deliveries": True},
              {"id": "x", "deliveries": -1}, {"id": "", "deliveries": 1}, {"id": "x" * 37, "deliveries": 1}]
)  # fmt: skip
def test_a_field_of_somebody_elses_is_no_mark(value):
    assert mark_of(value) is None
    body = json.dumps({"streamworker": value, "payload": {}}).encode()
    assert codec.read(body).payload
    assert json.loads(codec.rewrite(body, {"hop": 1})) == {"streamworker": value, "payload": {}, "hop": 1}


def claim(body: bytes) -> Claim:
    return Claim("q", "normal", "stream:{q}", b"1-1", 1, body, b"epoch")


def test_in_a_stream_a_marked_document_keeps_its_id_and_its_deaths():
    document = codec.read(MARKED)
    assert codec.job_id(document, claim(MARKED)) == ID
    assert codec.deaths_before(document) == 2
    assert codec.glance(MARKED) == (ID, None)
    own = codec.read(MARKED.replace(b'"payload"', b'"id":"own","payload"'))
    assert codec.job_id(own, claim(MARKED)) == "own"


def test_rewriting_folds_the_mark_into_the_document():
    again = codec.rewrite(MARKED, {"hop": 1})
    assert json.loads(again) == {
        "payload": {"a": 1.5}, "hop": 1, "id": ID, "headers": {codec.DELIVERIES_HEADER: "2"},
    }  # fmt: skip
    assert b'{"a":1.50}' in again
    document = codec.read(again)
    assert (codec.job_id(document, claim(again)), codec.deaths_before(document)) == (ID, 2)


def test_rewriting_keeps_an_own_id_and_adds_earlier_deaths():
    body = (
        b'{"streamworker":{"id":"%b","deliveries":2},"id":"own","payload":{},"headers":{"streamworker-deliveries":"3"}}'
    )
    again = json.loads(codec.rewrite(body % ID.encode(), {}))
    assert again == {"id": "own", "payload": {}, "headers": {"streamworker-deliveries": "5"}}


def test_taking_back_what_a_document_is_charged_with():
    charges = codec.charges(codec.read(MARKED))
    assert charges == {codec.DELIVERIES_HEADER: None}
    assert json.loads(codec.rewrite(MARKED, {"id": "x"}, charges)) == {"payload": {"a": 1.5}, "id": "x"}
    assert codec.charges(codec.read(b'{"payload":{}}')) == {}


@pytest.mark.parametrize(
    ("created", "expected"),
    [('"1970-01-01T00:01:00Z"', 60.0), ('"1970-01-01T00:01:00"', 60.0), ("null", None), ('"x"', None), ("5", None)],
)
def test_when_a_producer_made_a_job(created, expected):
    assert codec.made_at(b'{"created_at":%b,"payload":{}}' % created.encode()) == expected
    assert codec.made_at(b"no json") is None
