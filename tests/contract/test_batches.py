"""Handlers that are called for several jobs at once: gathered, and each settled by its own outcome."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Context, Discard, Payload, QueueWorker, Retry, Settings, Snooze, testing
from streamworker.codec import State, sealed
from streamworker.errors import ConfigurationError
from streamworker.job import Ok, Raised
from streamworker.observe import JobRun, Observer
from tests.conftest import eventually
from tests.contract.helpers import settings, working

pytestmark = pytest.mark.mode_free


class Row(Payload, kind="row", queue="q"):
    n: int


async def filled(app: App[Any], count: int) -> None:
    await app.enqueue_many([Row(n=n) for n in range(count)])


async def test_jobs_come_together_up_to_the_size(ground, raw):
    sizes: list[int] = []
    seen: list[int] = []
    app = App(settings=settings(raw, ground))

    @app.handler(batch=10, linger=0.2)
    async def rows(payloads: list[Row], contexts: list[Context]) -> None:
        assert [context.job.kind for context in contexts] == ["row"] * len(payloads)
        sizes.append(len(payloads))
        seen.extend(payload.n for payload in payloads)

    async with app:
        await filled(app, 25)
        async with working(app):
            await eventually(ground.empty)
    assert sorted(seen) == list(range(25))
    assert max(sizes) == 10 and len(sizes) <= 5, sizes


async def test_a_batch_that_does_not_fill_runs_after_its_linger(ground, raw):
    sizes: list[int] = []
    app = App(settings=settings(raw, ground))

    @app.handler(batch=100, linger=0.05)
    async def rows(payloads: list[Row]) -> None:
        sizes.append(len(payloads))

    async with app, working(app):
        await app.enqueue(Row(n=1))
        await eventually(ground.empty)
        await filled(app, 3)
        await eventually(ground.empty)
    assert sizes[0] == 1 and sum(sizes) == 4


async def test_no_batch_waits_for_more_than_there_are_slots(ground, raw):
    sizes: list[int] = []
    app = App(settings=settings(raw, ground, concurrency=4))

    @app.handler(batch=100, linger=60)
    async def rows(payloads: list[Row]) -> None:
        sizes.append(len(payloads))

    async with app:
        await filled(app, 8)
        async with working(app):
            await eventually(ground.empty)
    assert sizes == [4, 4]


async def test_each_is_settled_by_its_own_outcome(ground, raw):
    attempts: dict[int, list[int]] = {}
    app = App(settings=settings(raw, ground))

    @app.handler(batch=6, linger=60, max_attempts=2, backoff=Backoff(base=0.01, jitter=0))
    async def rows(payloads: list[Row], contexts: list[Context]) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        for payload, context in zip(payloads, contexts, strict=True):
            attempts.setdefault(payload.n, []).append(context.attempt)
            wishes = {1: ValueError("bad"), 2: Discard("no"), 3: Retry(0.0), 4: Snooze(3600)}
            outcomes.append(wishes.get(payload.n))
        return outcomes

    async with app:
        await filled(app, 6)
        async with working(app):
            await eventually(lambda: len(attempts) == 6)
            await eventually(lambda: ground.left() == 2 or raw.zcard("stream:{q}:due") in (1, 3))
        assert [len(attempts[n]) for n in (0, 2, 4, 5)] == [1, 1, 1, 1]
        async with app.operator() as operator:
            dead = (await operator.dead("q")).rows
            assert [(json.loads(row.body)["payload"]["n"], row.details["reason"]) for row in dead] == [(2, "discarded")]
            # The two that failed are charged one attempt each, the snoozed one is not.
            left = {}
            for row in (await operator.delayed("q")).rows:
                left[json.loads(row.body)["payload"]["n"]] = json.loads(row.body).get("attempt_count", 0)
            for body in ground.waiting():
                left[json.loads(body)["payload"]["n"]] = json.loads(body).get("attempt_count", 0)
            assert left == {1: 1, 3: 1, 4: 0}


async def test_what_is_raised_is_the_outcome_of_all(ground, raw):
    calls: list[list[int]] = []
    app = App(settings=settings(raw, ground))

    @app.handler(batch=3, linger=0.2, max_attempts=2, backoff=Backoff(base=0.01, jitter=0))
    async def rows(payloads: list[Row], contexts: list[Context]) -> None:
        calls.append([payload.n for payload in payloads])
        if contexts[0].attempt == 1:
            raise ValueError("the database was away")

    async with app:
        await filled(app, 3)
        async with working(app):
            await eventually(ground.empty, timeout=30)
    assert sorted(n for call in calls for n in call) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("answer", [[None], "xyz", 3, [None] * 4])
async def test_an_answer_that_does_not_fit_fails_all_of_them(ground, raw, answer):
    app = App(settings=settings(raw, ground))

    @app.handler(batch=3, linger=60, max_attempts=1)
    async def rows(payloads: list[Row]) -> Any:
        return answer

    async with app:
        await filled(app, 3)
        async with working(app):
            await eventually(lambda: raw.xlen("stream:{q}:dead") == 3)
    errors = {fields[b"error"].decode() for _, fields in raw.xrange("stream:{q}:dead")}
    assert len(errors) == 1 and "a handler of 3 jobs returned" in errors.pop()


async def test_a_batch_times_out_as_one_and_each_is_charged(ground, raw):
    calls: list[int] = []
    app = App(settings=settings(raw, ground))

    @app.handler(batch=2, linger=60, timeout=0.2, max_attempts=1)
    async def rows(payloads: list[Row], contexts: list[Context]) -> None:
        calls.append(len(payloads))
        assert contexts[1].deadline is not None
        await anyio.sleep(60)

    async with app:
        await filled(app, 2)
        async with working(app):
            await eventually(lambda: raw.xlen("stream:{q}:dead") == 2)
    assert calls == [2]
    assert {f[b"error"] for _, f in raw.xrange("stream:{q}:dead")} == {b"timed out after 0.2 s"}


async def test_at_shutdown_those_that_wait_and_those_that_run_go_back_uncharged(ground, raw):
    began: list[int] = []
    app = App(settings=settings(raw, ground, grace=0.1, concurrency=20))

    @app.handler(batch=2, linger=60)
    async def rows(payloads: list[Row]) -> None:
        began.append(len(payloads))
        await anyio.sleep(60)

    async with app:
        await filled(app, 3)
        async with working(app):
            await eventually(lambda: began and ground.held() == 3)
        assert ground.held() == 0 and ground.ready() == 3
        assert all("attempt_count" not in json.loads(body) for body in ground.waiting())


async def test_one_that_is_lost_does_not_take_the_others_along(ground, raw):
    cancelled: list[list[bool]] = []
    began: list[int] = []
    gate = anyio.Event()
    app = App(settings=settings(raw, ground, lease=2.4))

    @app.handler(batch=2, linger=60)
    async def rows(payloads: list[Row], contexts: list[Context]) -> None:
        began.append(len(payloads))
        await gate.wait()
        cancelled.append([context.cancelled for context in contexts])

    async with app:
        await filled(app, 2)
        async with working(app) as (worker,):
            await eventually(lambda: began == [2])
            lost = worker._in_flight.snapshot()[0]
            ground.hand_over(lost.claim, "somebody-else")
            await eventually(lambda: lost.cause is not None)
            gate.set()
            await eventually(lambda: worker._in_flight.counts.done == 1)
            assert ground.held() == 1  # somebody else's
            await eventually(lambda: worker._in_flight.counts.lost == 1)
    assert cancelled == [[True, False]]


async def test_when_all_are_lost_the_call_is_cancelled(ground, raw):
    began: list[int] = []
    ended: list[str] = []
    app = App(settings=settings(raw, ground, lease=2.4))

    @app.handler(batch=2, linger=60)
    async def rows(payloads: list[Row]) -> None:
        began.append(len(payloads))
        try:
            await anyio.sleep(60)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    async with app:
        await filled(app, 2)
        async with working(app) as (worker,):
            await eventually(lambda: began == [2])
            for run in worker._in_flight.snapshot():
                ground.hand_over(run.claim, "somebody-else")
            await eventually(lambda: ended == ["CancelledError"])
            await eventually(lambda: worker._in_flight.counts.lost == 2)


@pytest.mark.parametrize(
    ("how", "others"),
    [
        ("returns a failure", "done"),
        ("returns without looking", "done"),
        ("looks and returns", "done"),
        ("raises", "dead"),
    ],
)
async def test_one_that_is_cancelled_ends_alone(ground, raw, how, others):
    """The call goes on. The job ends as cancelled, unless the call returned and nobody had looked: then it is done."""
    began: list[int] = []
    told: list[bool] = []
    gate = anyio.Event()
    app = App(settings=settings(raw, ground, lease=3.0))

    @app.handler(batch=3, linger=60, max_attempts=1)
    async def rows(payloads: list[Row], contexts: list[Context]) -> list[Exception | None] | None:
        began.append(len(payloads))
        await gate.wait()
        told.extend(bool(context.cause) for context in contexts)
        if how == "looks and returns":
            assert [context.cancelled for context in contexts] == told
        if how == "raises":
            raise ValueError("all of them")
        failed = how == "returns a failure"
        return [ValueError("no") if failed and context.cause else None for context in contexts]

    async with app:
        made = [await app.enqueue(Row(n=n)) for n in range(3)]
        async with working(app) as (worker,):
            await eventually(lambda: began == [3])
            assert await app.cancel(made[1].id) == "asked"
            victim = next(run for run in worker._in_flight.snapshot() if run.job_id == made[1].id)
            await eventually(lambda: victim.cause is not None)
            gate.set()
            await eventually(ground.empty)
            counts = worker._in_flight.counts
    cancelled = int(how != "returns without looking")
    assert (counts.cancelled, counts.retried, counts.lost) == (cancelled, 0, 0)
    assert (counts.done, counts.dead) == ((3 - cancelled, 0) if others == "done" else (0, 2))
    dead = {fields[b"id"].decode() for _, fields in raw.xrange("stream:{q}:dead")}
    assert dead == (set() if others == "done" else {made[0].id, made[2].id})
    assert told == [False, True, False] and began == [3]
    assert bool(raw.exists("stream:{q}:cancelled")) != bool(
        cancelled
    )  # only who ends as cancelled takes the mark along


async def test_when_all_are_cancelled_the_call_is(ground, raw):
    began: list[int] = []
    ended: list[str] = []
    app = App(settings=settings(raw, ground, lease=3.0))

    @app.handler(batch=2, linger=60)
    async def rows(payloads: list[Row]) -> None:
        began.append(len(payloads))
        try:
            await anyio.sleep_forever()
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    async with app:
        made = [await app.enqueue(Row(n=n)) for n in range(2)]
        async with working(app) as (worker,):
            await eventually(lambda: began == [2])
            for each in made:
                await app.cancel(each.id)
            await eventually(lambda: worker._in_flight.counts.cancelled == 2)
            await eventually(ground.empty)
    assert ended == ["CancelledError"]
    assert not raw.exists("stream:{q}:cancelled", "stream:{q}:dead")


async def test_one_that_is_cancelled_while_it_waits_for_others_is_not_called(ground, raw):
    seen: list[list[int]] = []
    app = App(settings=settings(raw, ground, lease=3.0))

    @app.handler(batch=2, linger=60)
    async def rows(payloads: list[Row]) -> None:
        seen.append([payload.n for payload in payloads])

    async with app:
        made = await app.enqueue(Row(n=0))
        async with working(app) as (worker,):
            await eventually(lambda: ground.held() == 1)
            await app.cancel(made.id)
            (run,) = await eventually(worker._in_flight.snapshot)
            await eventually(lambda: run.outcome is not None)
            await app.enqueue(Row(n=1))  # makes the batch full
            await eventually(lambda: worker._in_flight.counts.cancelled == 1)
            await eventually(lambda: worker._in_flight.counts.done == 1)
            await eventually(ground.empty)
    assert seen == [[1]]


async def test_a_suspect_is_a_batch_of_one(ground, raw):
    sizes: list[tuple[int, ...]] = []
    app = App(settings=settings(raw, ground, lease=1.0))

    @app.handler(batch=10, linger=0.3)
    async def rows(payloads: list[Row], contexts: list[Context]) -> None:
        sizes.append(tuple(context.delivery for context in contexts))

    raw.hset("stream:{q}:meta", "secret", "5ec2e7 0")
    state = sealed(State(3), "s", b"5ec2e7 0")
    suspect = {"id": "s", "kind": "row", "payload": {"n": 0}, "streamworker_state": state}
    ground.push(json.dumps({"id": "a", "kind": "row", "payload": {"n": 1}}))
    ground.push(json.dumps(suspect))
    ground.push(json.dumps({"id": "b", "kind": "row", "payload": {"n": 2}}))
    async with working(app):
        await eventually(ground.empty)
    assert (4,) in sizes and not any(4 in each and len(each) > 1 for each in sizes)


async def test_sync_handlers_take_batches_too(ground, raw):
    seen: list[int] = []
    app = App(settings=settings(raw, ground))

    @app.handler(batch=5, linger=0.1)
    def rows(payloads: list[Row]) -> None:
        seen.extend(payload.n for payload in payloads)

    async with app:
        await filled(app, 10)
        async with working(app):
            await eventually(ground.empty)
    assert sorted(seen) == list(range(10))


async def test_limits_count_jobs_and_not_calls(ground, raw):
    sizes: list[int] = []
    app = App(settings=settings(raw, ground))

    @app.handler(batch=10, linger=0.05, concurrency=3)
    async def rows(payloads: list[Row]) -> None:
        sizes.append(len(payloads))
        await anyio.sleep(0.01)

    async with app:
        await filled(app, 9)
        async with working(app):
            await eventually(ground.empty, timeout=30)
    assert max(sizes) <= 3 and sum(sizes) == 9


async def test_middleware_wraps_the_call_and_observers_see_every_job(ground, raw):
    wrapped: list[tuple[int, int]] = []
    told: list[tuple[str, str]] = []

    class Teller(Observer):
        def on_start(self, run: JobRun) -> None:
            told.append(("start", run.job_id))

        def on_outcome(self, run: JobRun) -> None:
            told.append((run.word, run.job_id))

    async def middleware(ctx: Context, call_next: Any) -> Any:
        before = len(ctx.batch)
        value = await call_next()
        wrapped.append((before, len(ctx.batch)))
        return value

    app = App(settings=settings(raw, ground), middleware=[middleware], observers=[Teller()])

    @app.handler(batch=3, linger=60)
    async def rows(payloads: list[Row]) -> list[Exception | None]:
        return [None, Discard("no"), None]

    async with app:
        await filled(app, 3)
        async with working(app):
            await eventually(lambda: len(told) == 6)
    assert wrapped == [(0, 3)]
    words = [word for word, _ in told]
    assert words[:3] == ["start"] * 3 and words[3:] == ["ok", "discarded", "ok"]


async def test_without_a_server_one_job_is_a_batch_of_one():
    app = App(settings=Settings())

    @app.handler(batch=100, linger=60)
    async def rows(payloads: list[Row], contexts: list[Context]) -> list[Any]:
        return [ValueError("odd") if payload.n % 2 else payload.n for payload in payloads]

    assert await testing.run(app, Row(n=2)) == Ok(2)
    outcome = await testing.run(app, Row(n=1))
    assert isinstance(outcome, Raised) and str(outcome.error) == "odd"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch": 0}, "from 1"), ({"linger": 1}, "without batch="), ({"batch": 2, "linger": -1}, "seconds from 0")],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):

        @App(settings=Settings()).handler(**options)
        async def rows(payloads: list[Row]) -> None: ...


def test_a_batch_needs_a_list_and_a_list_needs_a_batch():
    app = App(settings=Settings())
    with pytest.raises(ConfigurationError, match="must be a list of its Payload class"):

        @app.handler(batch=2)
        async def one(payload: Row) -> None: ...

    with pytest.raises(ConfigurationError, match="must be annotated with its Payload class"):

        @app.handler
        async def many(payloads: list[Row]) -> None: ...


def test_the_decorated_function_stays_callable_as_it_was():
    app = App(settings=Settings())

    @app.handler(batch=2)
    def rows(payloads: list[Row]) -> int:
        return len(payloads)

    assert rows([Row(n=1)]) == 1
    assert app.registrations[0].name.endswith("rows")
    assert isinstance(QueueWorker(app, redis=None, database=None, services=None), QueueWorker)
