"""Jobs as producers make them, and the frozen values they travel in."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from streamworker import App, Payload, Settings
from streamworker.errors import ConfigurationError, InvalidJob, UsageError
from streamworker.job import LEVELS, Claim, Done


class Send(Payload, kind="mail.send", queue="mail"):
    to: str
    more: Any = None


app = App(settings=Settings())


def test_a_job_names_what_its_class_names():
    job = app.job(Send("x"))
    assert (job.queue, job.kind, job.level, job.attempts, job.hop, job.max_attempts) == (
        "mail",
        "mail.send",
        "normal",
        0,
        0,
        None,
    )
    assert job.created_at is not None and abs(datetime.now(UTC) - job.created_at) < timedelta(seconds=5)
    assert bytes(job.payload) == b'{"to":"x","more":null}'
    assert app.job(Send("x")).id != job.id


def test_options():
    moment = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    job = app.job(Send("x"), queue="other", priority="high", run_at=moment, key="k", key_ttl=5, headers={"a": 1})
    assert (job.queue, job.level, job.run_at, job.key, job.key_ttl, job.headers) == (
        "other",
        "high",
        moment,
        "k",
        5,
        {"a": 1},
    )
    assert app.job(Send("x"), run_at=datetime(2030, 1, 1)).run_at == datetime(2030, 1, 1, tzinfo=UTC)  # noqa: DTZ001
    assert app.job(Send("x"), priority=200).level == "low"
    assert app.job(Send("x"), delay=0).delay == 0


@pytest.mark.parametrize(
    "options",
    [
        {"delay": -1}, {"delay": float("nan")}, {"delay": float("inf")}, {"delay": 1e17}, {"key_ttl": -1}, {"key": ""}, {"priority": "urgent"},
        {"priority": True}, {"delay": 1, "run_at": datetime(2030, 1, 1, tzinfo=UTC)},
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options):
    with pytest.raises(UsageError):
        app.job(Send("x"), **options)


def test_a_wrong_queue_or_payload():
    with pytest.raises(ConfigurationError, match="no queue name"):
        app.job(Send("x"), queue="a b")
    with pytest.raises(InvalidJob, match="Send cannot be written"):
        app.job(Send("x", object()))


async def test_enqueueing_needs_an_open_app():
    with pytest.raises(UsageError, match="not open"):
        await app.enqueue(Send("x"))
    with pytest.raises(UsageError, match="await enqueue"):
        app.enqueue_blocking(Send("x"))


def test_values_are_frozen():
    assert LEVELS == ("high", "normal", "low")
    for value, field in (
        (Claim("q", "low", "p", b"1-0", 1, b"", b""), "count"),
        (app.job(Send("x")), "attempts"),
        (Settings(), "lease"),
    ):
        with pytest.raises(AttributeError):
            setattr(value, field, 1)
    assert Done() == Done()
