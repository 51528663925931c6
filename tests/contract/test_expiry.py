"""Jobs that expire: never started later, whatever they wait for, and no failure; the server's clock judges."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from streamworker import App, Backoff, Context, Payload, QueueWorker, Snooze, codec, testing
from streamworker.broker.base import RedisBroker
from streamworker.errors import JobExpired, UsageError
from streamworker.job import Expire, Expired, Job, Settled
from streamworker.observe import JobRun, Observer, Settlement
from streamworker.worker import admission
from streamworker.worker.inflight import WorkerCounts
from tests.conftest import eventually
from tests.contract.helpers import done, one, settings, settle_one, working

LONG_AGO = "2020-01-01T00:00:00Z"
ZONELESS = datetime(2030, 1, 1)  # noqa: DTZ001 - it is UTC


class Code(Payload, kind="code", queue="q"):
    how: str = ""


class Watching(Observer):
    """What observers are told."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.verdicts: list[Any] = []

    def on_outcome(self, run: JobRun) -> None:
        self.words.append(run.word)

    def on_settled(self, settlement: Settlement) -> None:
        self.verdicts += [run.verdict for run, result in settlement.items if result is Settled.SETTLED]


class Scene:
    """An app, and what its handlers did."""

    def __init__(self, raw, ground, **options: Any) -> None:
        self.began: list[str] = []
        self.watching = Watching()
        self.app = App(settings=settings(raw, ground, **options), observers=[self.watching])
        self.app.handler(timeout=30, backoff=Backoff(base=30, jitter=0))(self.code)

    async def code(self, payload: Code, ctx: Context) -> None:
        self.began.append(ctx.job.id)
        match payload.how:
            case "fail":
                raise ValueError("no luck")
            case "snooze":
                raise Snooze(60)


@pytest.fixture
def scene(raw, ground):
    return Scene(raw, ground)


def passed(raw, moment: datetime) -> bool:
    """Whether the server's clock is past it."""
    seconds, micros = raw.time()
    return seconds + micros / 1e6 > moment.timestamp()


def written(ground) -> list[dict[str, Any]]:
    return [json.loads(body) for body in ground.waiting()]


async def until_expired(raw, ground) -> None:
    """All that waits has expired by the server's clock."""
    moments = [datetime.fromisoformat(each["expires_at"]) for each in written(ground) if "expires_at" in each]
    await eventually(lambda: all(passed(raw, moment) for moment in moments))


def empty(ground, raw) -> bool:
    return bool(ground.empty() and not raw.xlen("stream:{q}:dead"))


def counts(worker: QueueWorker) -> WorkerCounts:
    """What it has counted; nothing before it has started."""
    return worker._in_flight.counts if hasattr(worker, "_in_flight") else WorkerCounts()


# -- what is written


def test_documents_without_it_are_as_they_were():
    made = Job(id="j", queue="q", kind="k", payload=codec.encode_payload(Code()))
    body = b'{"id":"j","queue_name":"q","kind":"k","priority":100,"payload":{"how":""}}'
    assert codec.pack(made, max_bytes=9999, key_ttl=1).body == body


async def test_seconds_are_counted_by_the_servers_clock(scene, ground, monkeypatch):
    async with scene.app:
        broker = scene.app._connection.broker()

        async def clock(queue: str) -> float:
            return 4_000_000_000.0

        monkeypatch.setattr(broker, "clock", clock)
        await scene.app.enqueue_many([Code(), scene.app.job(Code(), expires_in=60)])
        await scene.app.enqueue(Code(), expires_at=ZONELESS)
    first, second, third = written(ground)
    assert "expires_at" not in first and "expires_in" not in second
    assert datetime.fromisoformat(second["expires_at"]).timestamp() == 4_000_000_060
    assert third["expires_at"] == "2030-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expires_in": 5, "expires_at": datetime.now(UTC)}, "same thing twice"),
        ({"expires_in": 5, "delay": 5}, "no run would ever start"),
        ({"expires_at": ZONELESS, "run_at": datetime(2030, 1, 1, tzinfo=UTC)}, "no run would ever start"),
        ({"expires_in": -1}, "seconds from 0"),
        ({"expires_in": "soon"}, "must be float"),
        ({"expires_at": 5}, "must be datetime"),
    ],
)
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(UsageError, match=says):
        App().job(Code(), **options)


# -- never started later


async def test_a_job_that_waited_too_long_never_starts(scene, ground, raw):
    async with scene.app:
        late = await scene.app.enqueue(Code(), expires_in=0.05)
        fresh = await scene.app.enqueue(Code(), expires_in=600)
        plain = await scene.app.enqueue(Code())
        await eventually(lambda: passed(raw, datetime.fromisoformat(written(ground)[0]["expires_at"])))
        ending = asyncio.create_task(scene.app.result(late.id, timeout=30))
        await eventually(lambda: raw.hget("stream:{q}:meta", "waits"))
        async with working(scene.app) as (worker,):
            await eventually(lambda: empty(ground, raw))
            with pytest.raises(JobExpired, match="expired before it could start"):
                await ending
            await eventually(lambda: (counts(worker).expired, counts(worker).done, counts(worker).dead) == (1, 2, 0))
    assert sorted(scene.began) == sorted([fresh.id, plain.id])
    assert scene.watching.words.count("expired") == 1 and Expire() in scene.watching.verdicts


async def test_this_machines_clock_judges_nothing(scene, ground, raw, monkeypatch):
    async with scene.app:
        made = await scene.app.enqueue(Code(), expires_in=60)
        monkeypatch.setattr(admission, "time", lambda: 4_000_000_000.0)
        async with working(scene.app):
            await eventually(lambda: empty(ground, raw))
    assert scene.began == [made.id]


async def test_any_language_writes_it(scene, ground, raw):
    ground.push(json.dumps({"id": "a", "kind": "code", "payload": {}, "expires_at": LONG_AGO}))
    ground.push(json.dumps({"id": "b", "kind": "code", "payload": {}, "expires_at": None}))
    ground.push(json.dumps({"id": "c", "kind": "code", "payload": {}, "expires_at": "soon"}))
    async with scene.app, working(scene.app) as (worker,):
        await eventually(ground.empty)
        await eventually(lambda: counts(worker).dead == 1)
        await eventually(lambda: counts(worker).expired == 1)
    assert scene.began == ["b"]
    ((_, letter),) = raw.xrange("stream:{q}:dead")
    assert letter[b"reason"] == b"undecodable" and b"expires_at" in letter[b"error"]


async def test_a_kind_that_is_not_known_here_expires_too(scene, ground, raw):
    ground.push(json.dumps({"id": "a", "kind": "of.tomorrow", "payload": {}, "expires_at": LONG_AGO}))
    async with scene.app, working(scene.app) as (worker,):
        await eventually(lambda: empty(ground, raw))
        await eventually(lambda: counts(worker).expired == 1)


@pytest.mark.parametrize("how", ["fail", "snooze"])
async def test_a_run_that_would_be_due_too_late_ends_at_once(scene, ground, raw, how):
    async with scene.app:
        made = await scene.app.enqueue(Code(how=how), expires_in=20)
        ending = asyncio.create_task(scene.app.result(made.id, timeout=30))
        await eventually(lambda: raw.hget("stream:{q}:meta", "waits"))
        async with working(scene.app) as (worker,):
            await eventually(lambda: empty(ground, raw))
            await eventually(lambda: counts(worker).expired == 1)
            assert (counts(worker).retried, counts(worker).released) == (0, 0)
            with pytest.raises(JobExpired, match="no luck" if how == "fail" else "snoozed"):
                await ending
    assert scene.began == [made.id]
    (verdict,) = scene.watching.verdicts
    assert verdict.charged is (how == "fail")


async def test_a_retry_in_time_keeps_the_moment(scene, ground, raw):
    async with scene.app:
        await scene.app.enqueue(Code(how="fail"), expires_in=600)
        before = written(ground)[0]["expires_at"]
        async with working(scene.app) as (worker,):
            await eventually(lambda: counts(worker).retried == 1)
    (body,) = raw.hvals("stream:{q}:bodies")
    assert json.loads(body)["expires_at"] == before


async def test_a_delayed_job_whose_moment_has_passed_is_promoted_and_ends(scene, ground, raw):
    body = json.dumps({"id": "a", "kind": "code", "payload": {}, "run_at": LONG_AGO, "expires_at": LONG_AGO})
    raw.hset("stream:{q}:bodies", "normal/a/00000000", body)
    raw.zadd("stream:{q}:due", {"normal/a/00000000": 1})
    async with scene.app, working(scene.app) as (worker,):
        await eventually(lambda: counts(worker).expired == 1)
        await eventually(lambda: empty(ground, raw))
    assert scene.began == []


async def test_a_job_that_is_due_after_it_expires_is_not_parked(scene, ground, raw):
    late = {
        "id": "a",
        "kind": "code",
        "payload": {},
        "run_at": "2090-01-01T00:00:00Z",
        "expires_at": "2080-01-01T00:00:00Z",
    }
    ground.push(json.dumps(late))
    async with scene.app, working(scene.app) as (worker,):
        await eventually(lambda: empty(ground, raw))
        await eventually(lambda: counts(worker).expired == 1)


async def test_an_orphan_expires_and_the_zombie_cannot_settle_it(scene, ground, raw, broker_factory):
    async with broker_factory("zombie") as zombie, scene.app:
        await scene.app.enqueue(Code(), expires_in=0.05)
        await until_expired(raw, ground)
        claim = await one(zombie)
        ground.ripen(claim)
        async with working(scene.app) as (worker,):
            await eventually(lambda: empty(ground, raw))
            await eventually(lambda: counts(worker).expired == 1)
        assert await settle_one(zombie, done(claim)) is Settled.LOST
    assert scene.began == []


async def test_a_batch_drops_its_expired_members_before_the_handler(ground, raw):
    seen: list[str] = []
    app = App(settings=settings(raw, ground))

    @app.handler(batch=10, linger=0.6)
    async def codes(payloads: list[Code]) -> None:
        seen.extend(payload.how for payload in payloads)

    async with app, working(app) as (worker,):
        await app.enqueue_many([
            app.job(Code(how="fresh"), expires_in=600), app.job(Code(how="late"), expires_in=0.3), Code(how="plain"),
        ])  # fmt: skip
        await eventually(lambda: empty(ground, raw))
        await eventually(lambda: counts(worker).expired == 1)
    assert sorted(seen) == ["fresh", "plain"]


async def test_a_job_that_waits_for_its_limit_expires(ground, raw):
    began: list[str] = []
    go = asyncio.Event()
    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=1)
    async def codes(payload: Code) -> None:
        began.append(payload.how)
        await go.wait()

    async with app, working(app) as (worker,):
        await app.enqueue(Code(how="first"))
        await eventually(lambda: began)
        await app.enqueue(Code(how="second"), expires_in=0.3)
        await eventually(lambda: counts(worker).expired == 1 or counts(worker).released == 1)
        await asyncio.sleep(0.35)
        go.set()
        await eventually(lambda: empty(ground, raw))
        await eventually(lambda: counts(worker).expired == 1)
    assert began == ["first"]


async def test_a_dead_letter_that_is_replayed_too_late_does_not_run(scene, ground, raw):
    body = json.dumps({"id": "a", "kind": "code", "payload": {}, "expires_at": LONG_AGO})
    raw.xadd("stream:{q}:dead", {"job": body, "id": "a", "level": "normal"})
    async with scene.app, scene.app.operator() as operator:
        (letter,) = (await operator.dead("q")).rows
        assert await operator.replay(letter)
        async with working(scene.app) as (worker,):
            await eventually(lambda: empty(ground, raw))
            await eventually(lambda: counts(worker).expired == 1)
    assert scene.began == []


# -- without a server


async def test_testing_says_the_same(scene):
    assert isinstance(
        await testing.run(scene.app, scene.app.job(Code(), expires_at=datetime(2020, 1, 1, tzinfo=UTC))), Expired
    )
    await testing.run(scene.app, scene.app.job(Code(), expires_in=60))
    assert len(scene.began) == 1


def test_a_handler_sees_when_its_job_expires():
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    ctx = testing.context(App().job(Code(), expires_at=moment))
    assert ctx.job.expires_at == moment


async def test_plain_jobs_ask_no_clock(scene, ground, raw, monkeypatch):
    asked: list[str] = []

    async def clock(_: RedisBroker, queue: str) -> float:
        asked.append(queue)
        return 0.0

    monkeypatch.setattr(RedisBroker, "clock", clock)
    async with scene.app, working(scene.app):
        await scene.app.enqueue_many([Code() for _ in range(20)])
        await eventually(lambda: len(scene.began) == 20)
    assert asked == []
