"""What producers may enqueue: a payload that its own type can decode, with nothing that JSON changes without a word."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import math
from decimal import Decimal
from typing import Any, Generic, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker import App, Payload, Settings, codec, results, testing
from streamworker.errors import ConfigurationError, InvalidJob, UsageError
from streamworker.job import Enqueued
from streamworker.payload import fit_of, infinity_in

NAN, INF = math.nan, math.inf
T = TypeVar("T")


class Line(msgspec.Struct):
    price: float | None = None


@dataclasses.dataclass
class Silent:
    """Equal whatever it holds."""

    price: float | None = dataclasses.field(default=None, compare=False)


class Odd(msgspec.Struct):  # noqa: PLW1641
    price: float | None = None

    def __eq__(self, other: object) -> bool:
        return True


class Grade(enum.Enum):
    GOOD = 1


class Mark(enum.Enum):
    HALF = 0.5


class Graded(Payload, kind="graded", queue="prices"):
    mark: Mark


class Price(Payload, kind="price", queue="prices"):
    item: int
    old: float | None = None
    new: float = 0.0
    lines: tuple[Line, ...] = ()
    extra: Any = None
    silent: Silent | None = None
    odd: Odd | None = None
    grade: Grade | None = None


class Camel(Payload, kind="camel", queue="prices", rename="camel"):
    unit_price: float | None = None


class Sparse(Payload, kind="sparse", queue="prices", omit_defaults=True):
    limit: float | None = NAN


class Note(Payload, kind="note", queue="prices"):
    text: str | None = None
    sum: Decimal | None = None


class Strict(Payload, kind="strict", queue="prices"):
    n: int

    def __post_init__(self) -> None:
        if self.n == 13:
            raise ValueError("not 13")


class Box(Payload, Generic[T], kind="box", queue="prices"):
    item: T


class _Stored:
    async def publish(self, jobs: Any) -> list[Enqueued]:
        return [Enqueued(job.id, new=True) for job in jobs]


async def _no_ledger() -> None:
    return None


def opened() -> App[None]:
    """An app that stores nothing."""
    app = App(settings=Settings(redis_url="redis://127.0.0.1:1"))
    app._connection.broker = _Stored  # type: ignore[assignment,method-assign]
    app._connection.archive = _no_ledger  # type: ignore[method-assign]
    return app


def ways(given: Any) -> list[Any]:
    """Every way to enqueue from Python."""
    app = opened()
    return [
        lambda: app.job(given),
        lambda: app.job(given, delay=1),
        lambda: asyncio.run(app.enqueue(given)),
        lambda: asyncio.run(app.enqueue(given, priority="high")),
        lambda: asyncio.run(app.enqueue_many([Note(), given])),
        lambda: asyncio.run(app.enqueue(given, connection=object())),  # type: ignore[arg-type]
        lambda: app.enqueue_blocking(given),
        lambda: testing.context(given),
        lambda: app.cron("* * * * *", given, name="tick"),
    ]


MISFITS = [
    (Price(item=1, old=NAN), "Price.old is NaN"),
    (Price(item=1, new=INF), "Price.new is NaN or an infinity"),
    (Price(item=1, new=-INF), "Price.new is NaN or an infinity"),
    (Price(item=1, lines=(Line(), Line(NAN))), r"Price.lines\[1\].price is NaN"),
    (Price(item=1, extra={"a": [1, NAN]}), r"Price.extra.a\[1\] is NaN"),
    (Price(item=1, extra=(None, {INF})), r"Price.extra\[1\]\[0\] is NaN"),
    (Price(item=1, silent=Silent(NAN)), "Price.silent.price is NaN"),
    (Price(item=1, odd=Odd(NAN)), "Price.odd.price is NaN"),
    (Camel(NAN), "Camel.unitPrice is NaN"),
    (Sparse(INF), "Sparse.limit is NaN"),
    (Box(NAN), "Box.item is NaN"),
    (Price(item="3"), "Price does not fit its own type: Price.item: Expected `int`, got `str`"),  # type: ignore[arg-type]
    (Price(item=1, lines=(Line(price="x"),)), r"Price.lines\[0\].price: Expected"),  # type: ignore[arg-type]
    (Price(item=None), "Price.item: Expected `int`, got `null`"),  # type: ignore[arg-type]
    (Note(5), "Note.text: Expected `str | null`, got `int`"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("payload", "says"), MISFITS)
def test_what_no_worker_could_decode_is_refused_where_it_is_written(payload, says):
    for way in ways(payload):
        with pytest.raises(InvalidJob, match=says) as caught:
            way()
        assert "\n" not in str(caught.value)


def test_a_types_own_checks_are_made_again():
    made = Strict(12)
    msgspec.structs.force_setattr(made, "n", 13)
    with pytest.raises(InvalidJob, match="Strict does not fit its own type: not 13"):
        opened().job(made)


@pytest.mark.parametrize(
    "payload",
    [
        Price(item=1), Price(item=2**80, old=1e308, new=5), Price(item=1, extra={"a": None, "b": (1, 2.5), "c": {3}}),
        Price(item=1, silent=Silent(1.5), odd=Odd(), grade=Grade.GOOD, lines=(Line(), Line(0.1))), Camel(), Camel(1.5), Sparse(),
        Note("NaN null"), Note(sum=Decimal("NaN")), Note(), Box({"any": [None]}), Box(1.5), Strict(1),
    ],
)  # fmt: skip
def test_what_fits_is_taken_and_arrives_as_it_was(payload):
    raw = opened().job(payload).payload
    assert fit_of(type(payload)).decode(raw) is not None
    assert bytes(raw) == msgspec.json.encode(payload)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(values, st.none() | st.floats(), st.floats())
def test_nothing_changes_on_its_way(extra, old, new):
    """Whatever is accepted is decoded to what was written: Python's own JSON agrees about what is finite."""
    payload = Price(item=1, old=old, new=new, extra=extra)
    try:
        json.dumps([extra, old, new], allow_nan=False)
    except ValueError:
        with pytest.raises(InvalidJob):
            codec.encode_payload(payload)
    else:
        assert fit_of(Price).decode(codec.encode_payload(payload)) == payload


def test_a_class_that_nothing_can_decode_is_named_with_its_place():
    with pytest.raises(
        ConfigurationError, match=r"test_values\.py:\d+: the payload Graded cannot be decoded: Enums must"
    ):
        opened().job(Graded(Mark.HALF))


class Base(Payload, kind="base", queue="prices"):
    n: int


class Derived(Base, kind="derived", queue="prices"):
    more: float | None = None


def test_a_subclass_is_checked_as_itself():
    assert opened().job(Base(1)).payload
    for wrong in (Derived(1, NAN), Derived(1, "x")):  # type: ignore[arg-type]
        with pytest.raises(InvalidJob, match=r"Derived\.more"):
            opened().job(wrong)
    assert not fit_of(Derived).finite and fit_of(Base).finite


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"item": 1}, "a dict is no payload: enqueue an instance of a class like"),
        (Price, r"Price is a class: enqueue an instance of it, Price\(\.\.\.\)"),
        (Payload, "the class Payload is no payload"),
        (int, "the class int is no payload"),
        (Line(), "a Line is no payload"),
        ("price", "a str is no payload"),
        (None, "a NoneType is no payload"),
        (5, "an int is no payload"),
    ],
)
def test_what_is_no_payload_is_named(given, says):
    for way in ways(given):
        with pytest.raises(UsageError, match=says):
            way()


def test_a_job_is_enqueued_as_it_is():
    app = opened()
    made = app.job(Price(item=1), priority="low", key="k")
    for answer in (
        asyncio.run(app.enqueue(made)),
        *asyncio.run(app.enqueue_many([made])),
    ):
        assert answer == Enqueued(made.id, new=True)
    with pytest.raises(UsageError, match=r"this is a job already: give it to enqueue\(\)"):
        app.job(made)  # type: ignore[arg-type]
    for options in ({"delay": 5}, {"priority": "high"}, {"key": "x"}, {"queue": "q"}, {"headers": {}}):
        with pytest.raises(UsageError, match=r"comes too late for a job .*: give it to app\.job\(\)"):
            asyncio.run(app.enqueue(made, **options))
        with pytest.raises(UsageError, match="comes too late"):
            app.enqueue_blocking(made, **options)  # type: ignore[misc]


@pytest.mark.parametrize("given", [Price(item=1), 5, None])
def test_one_where_many_are_wanted(given):
    with pytest.raises(UsageError, match=r"enqueue_many\(\) takes a list"):
        asyncio.run(opened().enqueue_many(given))


def test_nothing_of_a_bulk_with_a_misfit_is_enqueued():
    app = opened()
    app._connection.broker = lambda: pytest.fail("something was sent")  # type: ignore[method-assign]
    with pytest.raises(InvalidJob):
        asyncio.run(app.enqueue_many([Price(item=1), Price(item=1, old=NAN)]))


@pytest.mark.parametrize("headers", [{"a": NAN}, {"a": {"b": [INF]}}])
def test_headers_hold_no_nan_either(headers):
    with pytest.raises(InvalidJob, match="the header a.* is NaN or an infinity"):
        opened().job(Price(item=1), headers=headers)
    assert opened().job(Price(item=1), headers={"a": None, "b": 1.5}).headers == {"a": None, "b": 1.5}


@pytest.mark.parametrize(
    ("value", "where"), [(NAN, "NaN"), ([1, INF], r"at \[1\] NaN"), ({"a": {"b": -INF}}, r"at a\.b NaN"), (Line(NAN), "at price NaN")]
)  # fmt: skip
def test_a_result_of_nan_is_not_kept_and_says_why(value, where):
    told = results.read(results.completed(value))
    assert told is not None and told.status == "completed" and not told.result
    with pytest.raises(ValueError, match=f"what the handler returned is {where} or an infinity"):
        results.result_json(value)
    assert results.result_json([None, "NaN", {"a": None}]) == b'[null,"NaN",{"a":null}]'


def test_where_an_infinity_is():
    assert infinity_in({"a": [msgspec.Raw(b"null"), {"b": INF}]}) == ".a[1].b"
    assert infinity_in(1.5) is None and infinity_in(NAN) == ""
