"""The mark of list mode: every byte survives it, and documents that carry it keep id and count."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker import codec
from streamworker.codec import GRACE, MOST, NOTHING, Mark, State, mark_of, seal, sealed, unmarked
from streamworker.job import Claim

ID = "0198c0de-1234-7abc-8def-0123456789ab"
SECRET = b"5ec2e7 0"
PROOF = seal(SECRET, ID, "deliveries 2")
OLD = b'{"streamworker":{"id":"%b","deliveries":2},"payload":{"a":1.50}}' % ID.encode()
MARKED = OLD.replace(b":2}", b':2,"seal":"%b"}' % PROOF.encode())


def met(seconds_ago: float) -> bytes:
    """The secret of a queue that earlier versions worked on, made so long ago."""
    return b"5ec2e7 %d" % (1000 * (time.time() - seconds_ago))


def test_a_mark_is_taken_off_and_leaves_the_bytes():
    assert unmarked(MARKED, SECRET) == (b'{"payload":{"a":1.50}}', Mark(ID, 2, PROOF))
    assert unmarked(b" \n" + MARKED, SECRET) == (b' \n{"payload":{"a":1.50}}', Mark(ID, 2, PROOF))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[1]", b'{"payload":{}}', MARKED.replace(ID.encode(), b"x"), MARKED.replace(b":2", b":99"),
        MARKED.replace(ID.encode(), ID.upper().encode()), MARKED.replace(PROOF[:4].encode(), b"0123"), OLD,
        b'{"streamworker":{"deliveries":2,"id":"%b"},"payload":{}}' % ID.encode(), b'{ "streamworker":1,"payload":{}}',
        b'{"payload":{},"streamworker":{"id":"%b","deliveries":2}}' % ID.encode(),
    ],
)  # fmt: skip
def test_what_is_no_mark_of_ours_is_left_alone(body):
    assert unmarked(body, SECRET) == (body, None)


@pytest.mark.parametrize("secret", [b"", b"other 0", b" 0"])
def test_without_the_queues_secret_nothing_is_a_mark(secret):
    assert unmarked(MARKED, secret) == (MARKED, None)
    assert codec.state_of(codec.read(MARKED), secret) == NOTHING


@given(st.binary())
def test_no_bytes_are_too_odd(body):
    rest, mark = unmarked(body, SECRET)
    assert mark is not None or rest == body


@pytest.mark.parametrize(
    "value", [None, 1, [], {}, {"id": "x"}, {"id": 5, "deliveries": 1}, {"id": "x", "deliveries": True},
              {"id": "x", "deliveries": -1}, {"id": "", "deliveries": 1}, {"id": "x" * 37, "deliveries": 1},
              {"id": "x", "deliveries": 1, "seal": 5}]
)  # fmt: skip
def test_a_field_of_others_is_no_mark(value):
    assert mark_of(value) is None
    body = json.dumps({"streamworker": value, "payload": {}}).encode()
    assert codec.read(body).payload
    assert json.loads(codec.rewrite(body, {"hop": 1}, state=NOTHING)) == {
        "streamworker": value, "payload": {}, "hop": 1,
    }  # fmt: skip


def claim(body: bytes) -> Claim:
    return Claim("q", "normal", "stream:{q}", b"1-1", 1, body, b"epoch", secret=SECRET)


def test_in_a_stream_a_marked_document_keeps_its_id_and_its_deaths():
    document = codec.read(MARKED)
    assert codec.job_id(document, claim(MARKED)) == ID
    assert codec.state_of(document, SECRET) == State(2)
    assert codec.glance(MARKED) == (ID, None)
    own = codec.read(MARKED.replace(b'"payload"', b'"id":"own","payload"'))
    assert codec.job_id(own, claim(MARKED)) == "own"


def test_the_id_of_a_mark_holds_without_a_seal():
    """A producer may choose its job's id anyway; and an identity survives whatever meta keys operators delete."""
    assert codec.job_id(codec.read(OLD), claim(OLD)) == ID
    assert json.loads(codec.rewrite(OLD, {}, state=NOTHING)) == {"payload": {"a": 1.5}, "id": ID}


def test_rewriting_puts_state_in_the_place_of_the_mark():
    again = codec.rewrite(MARKED, {"hop": 1}, state=codec.state_of(codec.read(MARKED), SECRET), secret=SECRET)
    assert json.loads(again) == {
        "payload": {"a": 1.5}, "hop": 1, "id": ID, "streamworker_state": sealed(State(2), ID, SECRET),
    }  # fmt: skip
    assert b'{"a":1.50}' in again
    document = codec.read(again)
    assert (codec.job_id(document, claim(again)), codec.state_of(document, SECRET)) == (ID, State(2))
    assert json.loads(codec.rewrite(again, {"id": "x"}, state=NOTHING)) == {"payload": {"a": 1.5}, "hop": 1, "id": "x"}


STATE = State(3, "1700000000000.125 0123abcd", 17)


def stated(field: object, **document: object) -> codec.DocumentFields:
    return codec.read(json.dumps({"payload": {}, "id": ID, "hop": 1, "streamworker_state": field, **document}).encode())


@pytest.mark.parametrize("state", [STATE, State(1), State(0, STATE.turn), State(0, "", 17), NOTHING])
def test_state_that_is_sealed_is_believed(state):
    assert codec.state_of(stated(sealed(state, ID, SECRET)), SECRET) == state


TRUE = sealed(STATE, ID, SECRET)


@pytest.mark.parametrize(
    "field",
    [
        1, "x", [], {}, {"deliveries": 3}, {**TRUE, "deliveries": 4}, {**TRUE, "turn": "1 0123abcd"}, {**TRUE, "turn": 5},
        {**TRUE, "unknown_since": 1}, {**TRUE, "seal": ""}, {**TRUE, "seal": "é"}, {**TRUE, "seal": 5}, {**TRUE, "deliveries": True},
        sealed(STATE, "other", SECRET), sealed(STATE, ID, b"other 0"), sealed(State(MOST + 1), ID, SECRET),
    ],
)  # fmt: skip
def test_state_that_others_wrote_is_not(field):
    assert codec.state_of(stated(field), SECRET) == NOTHING


def test_state_belongs_to_one_job():
    assert codec.state_of(stated(TRUE, id="other"), SECRET) == NOTHING
    assert codec.state_of(stated(TRUE, id=None), SECRET) == NOTHING


HEADERS = {"streamworker-deliveries": "2", "streamworker-unknown-since": "17", "streamworker-turn": STATE.turn}


def old(headers: object = None, **document: object) -> codec.DocumentFields:
    """As versions before the seal wrote it."""
    written = {"payload": {}, "id": ID, "hop": 1, "headers": {"trace": "00", **HEADERS} if headers is None else headers}
    return codec.read(json.dumps({**written, **document}).encode())


def test_headers_of_ours_are_taken_out_of_the_users():
    assert old().headers == {"trace": "00"}
    assert old(HEADERS).headers is None
    body = json.dumps({"payload": {}, "headers": {"a": 1.5, **HEADERS}}).encode()
    assert json.loads(codec.rewrite(body, {}, state=NOTHING)) == {"payload": {}, "headers": {"a": 1.5}}
    assert json.loads(codec.rewrite(body.replace(b'"a": 1.5, ', b""), {}, state=NOTHING)) == {"payload": {}}


def test_documents_of_earlier_versions_are_believed_for_a_while_where_those_worked():
    assert codec.state_of(old(), met(60)) == State(2, STATE.turn, 17)
    assert codec.state_of(codec.read(OLD), met(60)) == State(2)
    assert unmarked(OLD, met(60))[1] == Mark(ID, 2)
    beside = {**HEADERS}
    both = old(beside, streamworker_state=TRUE)  # put back by both versions in turn
    assert codec.state_of(both, met(60)) == State(5, STATE.turn, 17)
    assert codec.state_of(both, SECRET) == STATE


@pytest.mark.parametrize("secret", [b"", SECRET, GRACE + 1, -60, b"5ec2e7", b"5ec2e7 x", b"5ec2e7 -1"])
def test_and_nowhere_else(secret):
    secret = secret if isinstance(secret, bytes) else met(secret)
    assert codec.state_of(old(), secret) == NOTHING
    assert codec.state_of(codec.read(OLD), secret) == NOTHING
    assert unmarked(OLD, secret) == (OLD, None)


@pytest.mark.parametrize("document", [{"hop": 0}, {"hop": None}, {"id": None}])
def test_nor_where_no_worker_has_put_the_job_back(document):
    assert codec.state_of(old(**document), met(60)) == NOTHING


@pytest.mark.parametrize(
    ("value", "deaths"),
    [
        ("3", 3), (3, 3), ("0", 0), (-3, 0), ("-3", 0), ("x", 0), ("", 0), (True, 0), (None, 0), ([3], 0), (2.0, 0), ("³", 0),
        ("9" * 16, 0), (9**99, 0), (MOST + 1, 0),
    ],
)  # fmt: skip
def test_only_sane_counts_of_deaths_are_believed(value, deaths):
    assert codec.state_of(old({"streamworker-deliveries": value}), met(60)).deliveries == deaths


@pytest.mark.parametrize(
    ("created", "expected"),
    [('"1970-01-01T00:01:00Z"', 60.0), ('"1970-01-01T00:01:00"', 60.0), ("null", None), ('"x"', None), ("5", None)],
)
def test_when_a_producer_made_a_job(created, expected):
    assert codec.made_at(b'{"created_at":%b,"payload":{}}' % created.encode()) == expected
    assert codec.made_at(b"no json") is None
