"""The history of runs: counted in workers, kept in Redis where there is no ledger."""

from __future__ import annotations

import asyncio
import random
from itertools import count, cycle

import msgspec
import pytest

from streamworker import App, Backoff, Discard, Payload, QueueWorker, Settings
from streamworker.broker.redis import redis_history
from streamworker.telemetry.run_history import (
    DAY,
    HOUR,
    MINUTE,
    HistoryQuery,
    HistoryRow,
    HistorySums,
    RunTally,
    bucket_of,
    percentiles,
)
from streamworker.worker import history_recorder
from tests.conftest import eventually

AT = 1_800_000_000 // DAY * DAY
"""The first second of a day."""


class Note(Payload, kind="note", queue="q"):
    text: str = ""


class Other(Payload, kind="other", queue="r"):
    text: str = ""


WRONG = {
    f"{AT} w{number}": msgspec.msgpack.encode(value)
    for number, value in enumerate([
        [1, 2], [1, 1, 0, 0, [250, 1], [0]], [1, 1, 0, 0, [], [0]], [1, 1, 0, 0, [0, -1], [0]], [1, 1, 0, 0, [-1, 1], [0]],
    ])
}  # fmt: skip


def tally(n: int = 1, run: float = 0.01, wait: float = 0.2) -> RunTally:
    return RunTally(n, n, 0, 0, {bucket_of(run): n}, {bucket_of(wait): n})


def random_tally(chance: random.Random) -> RunTally:
    numbers = [chance.randrange(1000) for _ in range(4)]
    times = [{chance.randrange(200): chance.randrange(1, 10**6) for _ in range(chance.randrange(6))} for _ in range(2)]
    return RunTally(*numbers, *times)  # type: ignore[arg-type]


def added_up(rows, step: int) -> HistorySums:
    """What reading these rows must give."""
    sums = HistorySums()
    for row in rows:
        sums.add(row.at // step * step, (row.queue, row.kind), row.tally)
    return sums


async def everything(store, span, *, queue=None, kind=None, step=None):
    return await store.read(HistoryQuery(span, AT, AT + 3 * DAY, step or span, queue, kind))


@pytest.fixture
async def stores(ground, redis_url, broker_factory):
    """(what writes, a second one as of another worker, what reads)."""
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode))
    async with broker_factory() as one, broker_factory() as other, app.operator() as operator:
        yield one.history, other.history, operator.history


async def test_workers_add_to_one_minute_and_every_span_is_the_sum(stores):
    one, other, reader = stores
    chance = random.Random(23)
    written = [
        HistoryRow(AT + minute * MINUTE, queue, kind, random_tally(chance))
        for minute in (0, 1, 59, 60, 61, 1440)
        for queue in ("q", "r")
        for kind in ("a", "b c")
        for _ in range(3)
    ]
    chance.shuffle(written)
    await asyncio.gather(
        *(
            store.add(written[at : at + 6])
            for at, store in zip(range(0, len(written), 6), [one, other] * 6, strict=True)
        )
    )
    for span in (MINUTE, HOUR, DAY):
        assert await everything(reader, span) == added_up(written, span), span
    assert await everything(reader, MINUTE, step=HOUR) == added_up(written, HOUR)
    only = added_up([row for row in written if (row.queue, row.kind) == ("r", "b c")], HOUR)
    assert await everything(reader, HOUR, queue="r", kind="b c") == only
    assert await everything(reader, HOUR, queue="r") == added_up([row for row in written if row.queue == "r"], HOUR)
    late = HistoryQuery(MINUTE, AT + MINUTE, AT + HOUR, MINUTE)
    assert set((await reader.read(late)).steps) == {AT + MINUTE, AT + 59 * MINUTE}
    whole = added_up(written, HOUR)
    assert await reader.read(HistoryQuery(MINUTE, AT, AT + 3 * DAY, HOUR, kinds=False)) == HistorySums(
        whole.steps, {}, whole.counts
    )


async def test_the_space_is_bounded(stores, raw, monkeypatch):
    """Kinds without end are one kind, and all keys expire."""
    monkeypatch.setattr(redis_history, "MOST_KINDS", 5)
    one, _, reader = stores
    for number in range(8):
        await one.add([HistoryRow(AT, "q", f"k{number}", tally()), HistoryRow(AT, "q", "k0", tally())])
    found = {kind: tally.done for (_, kind), tally in (await everything(reader, DAY)).kinds.items()}
    assert found == {"k0": 9, "k1": 1, "k2": 1, "k3": 1, "k4": 1, redis_history.OTHERS: 3}
    # A kind that has not run for sixty days makes room.
    raw.zadd("stream:{q}:history:kinds", {"k1": 1000})
    await one.add([HistoryRow(AT, "q", "new", tally())])
    assert ("q", "new") in (await everything(reader, DAY)).kinds
    keys = raw.keys("stream:{q}:history:*")
    assert len(keys) == 4
    assert all(0 < raw.ttl(key) <= 90 * DAY for key in keys)


async def test_what_others_wrote_there_is_passed_over(stores, raw):
    one, _, reader = stores
    await one.add([HistoryRow(AT, "q", "k", tally())])
    (page,) = raw.keys(f"stream:{{q}}:history:{MINUTE}:*")
    raw.hset(page, mapping={f"{AT} odd": b"\xc1", "odd": b"", f"{AT} k": b"no tally", **WRONG})
    assert await everything(reader, MINUTE) == HistorySums()
    await one.add([HistoryRow(AT, "q", "k", tally(2))])
    assert (await everything(reader, MINUTE)).kinds == {("q", "k"): tally(2)}
    await one.add([HistoryRow(AT, "q", "k", tally(3, run=4000.0))])
    assert (await everything(reader, MINUTE)).kinds["q", "k"].run == {bucket_of(0.01): 2, bucket_of(4000.0): 3}


@pytest.mark.mode_free
async def test_sixty_days_of_forty_kinds_are_small(stores, raw):
    """Pages are as large as tallies of busy kinds make them; the whole is said, and bounded."""
    one, _, _ = stores
    chance = random.Random(4)
    before = raw.info("memory")["used_memory"]
    tallies = cycle([busy(chance) for _ in range(101)])
    rows = [
        HistoryRow(AT + minute * MINUTE, "q", f"kind.number.{kind}", next(tallies))
        for minute in range(60)
        for kind in range(40)
    ]
    for at in range(0, len(rows), 400):
        await one.add(rows[at : at + 400])
    page = raw.memory_usage(f"stream:{{q}}:history:{MINUTE}:{AT}", samples=0)
    used = raw.info("memory")["used_memory"] - before
    whole = page * 48 + page * 60 * 24 / 60
    print(f"an hour of forty kinds: {page:,} bytes ({used:,} with its hour and day); sixty days: {whole / 1e6:.0f} MB")
    assert whole < 60e6


def busy(chance: random.Random) -> RunTally:
    """A thousand runs of about 20 ms that waited about 5 ms."""
    made = RunTally(1000, 990, 10, 5)
    for _ in range(200):
        for counts, typical in ((made.run, 0.02), (made.wait, 0.005)):
            bucket = bucket_of(chance.lognormvariate(0, 0.7) * typical)
            counts[bucket] = counts.get(bucket, 0) + 5
    return made


async def test_a_worker_keeps_what_its_runs_came_to(ground, redis_url, raw, monkeypatch):
    monkeypatch.setattr(history_recorder, "EVERY", 0.2)
    settings = Settings(redis_url=redis_url, mode=ground.mode, lease=1, concurrency=20)
    app = App(settings=settings)
    release = asyncio.Event()
    tries = count()

    @app.handler(backoff=Backoff(base=0.001, cap=0.01))
    async def note(payload: Note) -> None:
        match payload.text:
            case "hold":
                await release.wait()
            case "dead":
                raise Discard("no")
            case "again":
                if next(tries) == 0:
                    raise ValueError("once")

    @app.handler
    def other(payload: Other) -> None:
        pass

    async def totals():
        async with app.operator() as operator:
            now = await operator.history.now()
            return (await operator.history.read(HistoryQuery(DAY, now - DAY, now + DAY, DAY))).kinds

    worker = QueueWorker(app, redis=None, database=None, services=None)
    task = asyncio.create_task(worker.start())
    async with app:
        await app.enqueue(Note(text="hold"))
        await eventually(worker.ready.is_set)

        async def held():
            return (await totals()).get(("q", "note"))

        found = await eventually(held)
        assert (found.started, found.done) == (1, 0)  # it is counted when it starts
        await app.enqueue_many([Note(text=text) for text in ("dead", "again")] + [Note() for _ in range(50)])
        await app.enqueue_many([Other() for _ in range(30)])
        release.set()
        await eventually(lambda: worker.ended_runs == 84)
    await worker.stop()
    await task
    found = await totals()
    one, other_ = found["q", "note"], found["r", "other"]
    assert (one.started, one.done, one.failed, one.retried) == (54, 52, 2, 1)
    assert (other_.started, other_.done, other_.failed, other_.retried) == (30, 30, 0, 0)
    assert sum(one.run.values()) == pytest.approx(54, abs=10)  # a sample stands for all
    assert sum(other_.wait.values()) == pytest.approx(30, abs=10)
    assert (percentiles(other_.run, [0.5])[0] or 9) < 1
    assert raw.ttl("stream:{q}:history:kinds") > 0


async def test_off_writes_nothing(redis_url, raw):
    settings = Settings(redis_url=redis_url, lease=1, history="off")
    app = App(settings=settings)

    @app.handler
    async def note(payload: Note) -> None:
        pass

    worker = QueueWorker(app, redis=None, database=None, services=None)
    async with app:
        await app.enqueue_many([Note() for _ in range(20)])
    await worker.run(burst=True)
    assert worker._in_flight.counts.done == 20
    assert raw.keys("*history*") == []


async def test_a_wrong_clock_here_moves_no_minute_and_no_wait(redis_url, monkeypatch):
    """Minutes and waits are those of the server's clock."""
    true = history_recorder.time
    monkeypatch.setattr(history_recorder, "time", lambda: true() - 7200)
    app = App(settings=Settings(redis_url=redis_url, lease=1))

    @app.handler
    async def note(payload: Note) -> None:
        pass

    worker = QueueWorker(app, redis=None, database=None, services=None)
    task = asyncio.create_task(worker.start())
    async with app:
        await eventually(worker.ready.is_set)
        await eventually(lambda: abs(worker._history.tallies.offset - (true() - asyncio.get_running_loop().time())) < 2)
        await app.enqueue(Note())
        await eventually(lambda: worker.ended_runs == 1)
    await worker.stop()
    await task
    async with app.operator() as operator:
        now = await operator.history.now()
        sums = await operator.history.read(HistoryQuery(MINUTE, now - 3 * HOUR, now + DAY, MINUTE))
    ((at, found),) = sums.steps.items()
    assert abs(now - at) < 180
    assert (percentiles(found.wait, [0.99])[0] or 0) < 60


async def test_what_cannot_be_kept_is_said_and_the_worker_goes_on(redis_url, raw, caplog, monkeypatch):
    flush, flushed = history_recorder.HistoryRecorder._flush, []

    async def counted(self):
        if had := await flush(self):
            flushed.append(self)
        return had

    monkeypatch.setattr(history_recorder.HistoryRecorder, "_flush", counted)
    monkeypatch.setattr(history_recorder, "EVERY", 0.1)
    raw.set("stream:{q}:history:kinds", "a string")
    app = App(settings=Settings(redis_url=redis_url, lease=1))

    @app.handler
    async def note(payload: Note) -> None:
        pass

    worker = QueueWorker(app, redis=None, database=None, services=None)
    task = asyncio.create_task(worker.start())
    async with app:
        for number in range(1, 4):  # each in a flush of its own, which fails
            await app.enqueue(Note())
            await eventually(lambda number=number: worker.ended_runs == number and len(flushed) >= number)
        await eventually(lambda: "history_not_recorded" in caplog.text)
    await worker.stop()
    await task
    assert caplog.text.count("history_not_recorded") == 1  # once a minute
