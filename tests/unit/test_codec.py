"""The wire: what is read, what is refused, and that rewriting keeps what is not ours."""

import json
import math
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker import Payload, codec
from streamworker.codec import NOTHING, State, sealed
from streamworker.errors import InvalidJob, JobTooLarge
from streamworker.job import Claim, Job

SECRET = b"5ec2e7 0"
OURS = {
    "id", "queue_name", "kind", "priority", "payload", "created_at", "run_at", "attempt_count", "max_attempts", "hop", "headers",
    "streamworker", "streamworker_state",
}  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(
        st.characters(exclude_categories=["Cs"])
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def dumps(value: Any, **options: Any) -> bytes:
    return json.dumps(value, **options).encode()


@given(
    unknown=st.dictionaries(texts.filter(lambda name: name not in OURS), json_values, max_size=5),
    payload=st.dictionaries(texts, json_values, max_size=4),
    headers=st.dictionaries(texts.filter(lambda name: name not in codec.OLD_HEADERS), json_values, max_size=4),
    ascii_=st.booleans(),
    hop=st.integers(0, 2**53),
)
def test_rewriting_keeps_unknown_keys_byte_for_byte(unknown, payload, headers, ascii_, hop):
    body = dumps({**unknown, "payload": payload, "headers": headers, "priority": "low"}, ensure_ascii=ascii_, indent=1)
    before = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    after = msgspec.json.decode(
        codec.rewrite(body, {"hop": hop, "id": "x"}, state=State(2), secret=SECRET), type=dict[str, msgspec.Raw]
    )
    for name in [*unknown, "payload", "priority", "headers"]:
        assert bytes(after.pop(name)) == bytes(before[name])
    assert json.loads(bytes(after.pop("streamworker_state"))) == sealed(State(2), "x", SECRET)
    assert {name: json.loads(bytes(value)) for name, value in after.items()} == {"hop": hop, "id": "x"}


@given(payload=st.dictionaries(texts, json_values, max_size=4), value=st.integers(0, 2**53))
def test_rewriting_twice_is_rewriting_once(payload, value):
    body = dumps({"payload": payload, "kept": [1, 2.50, {"a": None}]})
    once = codec.rewrite(body, {"hop": value})
    assert codec.rewrite(once, {"hop": value}) == once


def test_numbers_no_float_can_hold_survive_a_rewrite():
    body = b'{"payload":{"n":123456789012345678901234567890.10},"x":1E400,"y":-0.0,"z":[1.0,1e2]}'
    assert codec.rewrite(body, {"hop": 1}) == body[:-1] + b',"hop":1}'


def test_a_patch_removes_what_is_none():
    assert codec.rewrite(b'{"payload":{},"hop":3,"id":"a"}', {"hop": None}) == b'{"payload":{},"id":"a"}'
    assert codec.rewrite(b'{"payload":{},"kind":"a"}', {"kind": None}, state=NOTHING) == b'{"payload":{}}'


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b'{"headers":{}', b"\xff", b"[" * 100_000])
def test_what_is_no_document_is_not_rewritten(body):
    with pytest.raises(InvalidJob):
        codec.rewrite(body, {"hop": 1}, state=NOTHING)


readings = st.fixed_dictionaries(
    {"payload": st.dictionaries(texts, json_values, max_size=3)},
    optional={
        "id": st.none() | texts,
        "queue_name": st.none() | texts,
        "kind": st.none() | texts,
        "priority": json_values,
        "created_at": json_values,
        "run_at": st.none() | st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
        "attempt_count": st.none() | st.integers(0, 2**53),
        "max_attempts": st.none() | st.integers(0, 2**53),
        "hop": st.none() | st.integers(0, 2**53),
        "headers": st.none() | st.dictionaries(texts, json_values, max_size=3),
        "something": json_values,
    },
)


@given(readings)
def test_whatever_follows_the_rules_is_read(document):
    reading = codec.read(dumps(document))
    assert json.loads(bytes(reading.payload)) == document["payload"]
    for name in ("id", "kind", "attempt_count", "hop", "headers"):
        assert getattr(reading, name) == document.get(name)
    moment = codec.when(reading)
    expected = document.get("run_at")
    assert moment == (None if expected is None else datetime.fromisoformat(expected).timestamp())


@given(st.binary(max_size=200) | json_values.map(dumps) | readings.map(dumps).map(lambda b: b[:-1]))
def test_everything_else_is_refused_in_one_way(body):
    with suppress(InvalidJob):
        codec.read(body)
    assert codec.glance(body) is not None


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"x"', b"{}", b'{"payload":}', b'{"payload":{}} x', b'\xef\xbb\xbf{"payload":{}}',
        b'{"payload":{},"id":5}', b'{"payload":{},"id":[]}', b'{"payload":{},"kind":{}}', b'{"payload":{},"queue_name":1}',
        b'{"payload":{},"attempt_count":-1}', b'{"payload":{},"attempt_count":1.5}', b'{"payload":{},"attempt_count":"1"}',
        b'{"payload":{},"hop":-1}', b'{"payload":{},"hop":9007199254740993}', b'{"payload":{},"max_attempts":-5}',
        b'{"payload":{},"max_attempts":true}', b'{"payload":{},"headers":[]}', b'{"payload":{},"headers":"x"}',
        b'{"payload":{},"run_at":"yesterday"}', b'{"payload":{},"run_at":"2026-02-30T00:00:00Z"}',
        b'{"payload":{"a":"\\ud800"}}', b'{"payload":{},"id":"\\udfff"}', b'{"payload":{"a":"\xed\xa0\x80"},"id":"\xed\xa0\x80"}',
        b'{"payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"payload":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"payload":{},"headers":{"a":' + b"9" * 5000 + b"}}", b'{"payload":{},"headers":{"a":1e400}}',
        dumps({"payload": {}, "id": "x" * 201}), dumps({"payload": {}, "id": "é" * 101}), dumps({"payload": {}, "id": "😀" * 51}),
    ],
)  # fmt: skip
def test_refused(body):
    with pytest.raises(InvalidJob, match="the document is no job"):
        codec.read(body)
    assert codec.glance(body) == (None, None)


@pytest.mark.parametrize("name", ["x" * 200, "é" * 100, "😀" * 50, "x", "\0", "a b\n", "/", "{x}"])
def test_ids_up_to_200_bytes_are_taken_as_they_are(name):
    assert codec.read(dumps({"payload": {}, "id": name})).id == name


@pytest.mark.parametrize(
    "body",
    [b'{"payload":{"a":"\\u0000"}}', b'{"payload":{},"created_at":"nonsense","priority":{"x":1}}', b'{"payload":5}'],
)
def test_what_is_not_ours_to_judge_is_read(body):
    codec.read(body)


@given(
    attempts=st.integers(0, 2**53),
    level=st.sampled_from(["high", "normal", "low"]),
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50),
    kind=texts,
    run_at=st.none() | st.datetimes(timezones=st.just(UTC)),
    headers=st.none()
    | st.dictionaries(texts.filter(lambda name: name not in codec.OLD_HEADERS), json_values, max_size=3),
)
def test_what_is_packed_reads_the_same(attempts, level, name, kind, run_at, headers):
    job = Job(
        id=name, queue="q", kind=kind, payload=msgspec.Raw(b'{"a":1}'), level=level, attempts=attempts, max_attempts=3, hop=2,
        created_at=datetime(2026, 1, 1, tzinfo=UTC), run_at=run_at, headers=headers,
    )  # fmt: skip
    packed = codec.pack(job, max_bytes=10_000, key_ttl=60)
    reading = codec.read(packed.body)
    assert (reading.id, reading.kind or "", reading.attempt_count or 0) == (name, kind, attempts)
    assert (reading.hop, reading.max_attempts, reading.headers) == (2, 3, headers)
    assert bytes(reading.payload) == b'{"a":1}'
    assert codec.when(reading) == packed.run_at == (None if run_at is None else run_at.timestamp())
    written = json.loads(packed.body)
    assert codec.level_of(written["priority"]) == packed.level == level
    assert written["queue_name"] == packed.queue == "q"
    assert written.keys() <= OURS


def test_a_document_over_the_limit_is_refused():
    job = Job(id="x", queue="q", kind="k", payload=msgspec.Raw(b'"' + b"x" * 1000 + b'"'))
    size = len(codec.pack(job, max_bytes=10_000, key_ttl=1).body)
    assert len(codec.pack(job, max_bytes=size, key_ttl=1).body) == size
    with pytest.raises(JobTooLarge, match="store the data elsewhere"):
        codec.pack(job, max_bytes=size - 1, key_ttl=1)


class Anything(Payload, kind="anything", queue="q"):
    value: Any = None


@pytest.mark.parametrize("value", [object(), "\ud800", {1: object()}, {(1, 2): 3}])
def test_payloads_json_cannot_hold_are_refused(value):
    with pytest.raises(InvalidJob, match="Anything cannot be written as JSON"):
        codec.encode_payload(Anything(value))


def test_a_payload_that_contains_itself_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidJob):
        codec.encode_payload(Anything(loop))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_json_has_no_word_for_are_refused(value):
    """They were written as null, and reached the handler as None."""
    with pytest.raises(InvalidJob, match=r"Anything\.value is NaN or an infinity"):
        codec.encode_payload(Anything(value))


@pytest.mark.parametrize(
    ("priority", "level"),
    [
        (None, "normal"), ("high", "high"), ("normal", "normal"), ("low", "low"), (-5, "high"), (0, "high"), (50, "high"),
        (51, "normal"), (100, "normal"), (150, "normal"), (151, "low"), (10**30, "low"),
    ],
)  # fmt: skip
def test_levels(priority, level):
    assert codec.level_of(priority) == level


@pytest.mark.parametrize("priority", ["", "HIGH", "urgent", True, False, 1.5, [], b"high"])
def test_no_levels(priority):
    with pytest.raises(ValueError, match="must be 'high', 'normal', 'low' or a number"):
        codec.level_of(priority)


def claim(place: str = "stream:{q}", entry: bytes = b"1-0", epoch: bytes = b"e") -> Claim:
    return Claim("q", "normal", place, entry, 1, b"{}", epoch)


def test_derived_ids_are_stable_for_ever():
    # Pinned: bytes already in Redis at an upgrade must keep their ids.
    assert (
        codec.derived_id("stream:{billing}", b"0123456789abcdef", b"1700000000000-0")
        == "293734cd-105a-5e0c-b1bb-910737bf79a9"
    )


@given(st.tuples(texts, st.integers(0), st.integers(0)), st.tuples(texts, st.integers(0), st.integers(0)))
def test_derived_ids_differ_where_the_place_does(one, other):
    def derived(place: str, epoch: int, entry: int) -> str:
        return codec.derived_id(f"stream:{{{place}}}", str(epoch).encode(), f"{entry}-0".encode())

    if "|" not in one[0] + other[0]:
        assert (derived(*one) == derived(*other)) == (one == other)
    assert UUID(derived(*one)).version == 5


@pytest.mark.parametrize("name", [b"", b',"id":null', b',"id":""'])
def test_only_a_job_without_id_gets_a_derived_one(name):
    reading = codec.read(b'{"payload":{}' + name + b"}")
    assert codec.job_id(reading, claim()) == codec.derived_id("stream:{q}", b"e", b"1-0")
    assert codec.job_id(codec.read(b'{"payload":{},"id":"mine"}'), claim()) == "mine"


def test_fresh_ids_are_of_version_7_and_sorted():
    ids = [codec.new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(UUID(name).version == 7 for name in ids)
    assert ids == sorted(ids)
