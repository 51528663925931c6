"""Order: of the jobs of a queue with one order key at most one is ready, running or retrying, in the order of acceptance."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Discard, Payload, Retry, Settings, Snooze, codec
from streamworker.broker import SettleRequest
from streamworker.broker.dispatcher import RedisDispatcher
from streamworker.broker.order import OrderSweeper
from streamworker.broker.redis.client import RedisAddress
from streamworker.job import Claim, Dead, Done, Drop, PackedJob, ReleaseAt, RetryAt, Settled
from tests.conftest import eventually
from tests.contract.ground import GROUP
from tests.contract.helpers import names, recover, settings, settle_one, working


@pytest.fixture
async def operator(ground, redis_url):
    async with App(settings=Settings(redis_url=redis_url, mode=ground.mode)).operator() as operator:
        yield operator


def document(name: str, key: str | None = "k", **fields: Any) -> bytes:
    return json.dumps({"id": name, "order_key": key, "payload": {"name": name}, **fields}).encode()


def ordered(name: str, key: str = "k", level: Any = "normal", **options: Any) -> PackedJob:
    return PackedJob(name, "q", level, document(name, key), key_ttl=60.0, lined=True, **options)


def ending(claim: Claim, verdict: Any = None, **options: Any) -> SettleRequest:
    """As a worker makes it."""
    told = json.loads(claim.body or b"{}")
    given: dict[str, Any] = {"job_id": told["id"], "kind": "k", "order": told["order_key"], **options}
    if verdict is None:
        return SettleRequest(claim, Done(), note=b"{}", **given)
    if isinstance(verdict, RetryAt | ReleaseAt):
        given.pop("order")
        given.setdefault("body", json.dumps({**told, "hop": 1 + told.get("hop", 0)}).encode())
    return SettleRequest(claim, verdict, **given)


def fair_one(name: str) -> PackedJob:
    body = json.dumps({"id": name, "fair_key": "t", "hop": 1, "payload": {}}).encode()
    return PackedJob(name, "q", "normal", body, lined=True)


async def held(operator: Any) -> Any:
    """The one job that a worker holds."""
    rows, after = [], ""
    while after is not None:
        page = await operator.pending("q", after)
        rows, after = rows + page.rows, page.after
    (row,) = rows
    return row


async def claimed(broker: Any) -> list[str]:
    return names(await broker.claim(10, 0, ()))


async def one(broker: Any) -> Claim:
    (claim,) = await broker.claim(10, 0, ())
    return claim


def nothing_left(raw: Any) -> bool:
    """No key of lines: whatever ended has passed its key on, and the last one gave it back."""
    left = [name for name in raw.keys("stream:{q}:*") if b":order" in name or b":lines" in name or b":halted" in name]
    return not left and not int(raw.hget("stream:{q}:meta", "waiting") or 0)


async def test_one_at_a_time_in_the_order_of_acceptance(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b"), ordered("x", "other"), ordered("c")])
        first, other = await broker.claim(10, 0, ())
        assert names([first, other]) == ["a", "x"]
        assert (await broker.depth())[0].waiting == 2
        for follower in ("b", "c"):
            assert await settle_one(broker, ending(first)) is Settled.SETTLED
            first = await one(broker)
            assert names([first]) == [follower]
        await broker.settle([ending(first), ending(other)])
        assert nothing_left(raw)


async def test_order_beats_level(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("low", level="low")])
        await broker.publish([ordered("high", level="high"), ordered("other", "other", "high")])
        claims = {names([claim])[0]: claim for claim in await broker.claim(10, 0, ())}
        assert list(claims) == ["other", "low"]
        await settle_one(broker, ending(claims["low"]))
        assert (await one(broker)).level == "high"


@pytest.mark.parametrize("verdict", [Done, Drop, Dead])
async def test_every_ending_passes_the_key_on(broker_factory, raw, verdict):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        ended = {Done: None, Drop: Drop(), Dead: Dead("why")}[verdict]
        assert await settle_one(broker, ending(await one(broker), ended)) is Settled.SETTLED
        last = await one(broker)
        assert names([last]) == ["b"]
        await settle_one(broker, ending(last, ended))
        assert nothing_left(raw)


async def test_an_ending_whose_claim_is_lost_passes_nothing_on(broker_factory, ground):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        claim = await one(broker)
        ground.hand_over(claim, "another")
        assert await settle_one(broker, ending(claim)) is Settled.LOST
        assert await claimed(broker) == []


@pytest.mark.parametrize("at", [None, 0.2], ids=["at once", "later"])
@pytest.mark.parametrize("kind", [RetryAt, ReleaseAt])
async def test_a_job_that_goes_on_keeps_its_key(broker_factory, kind, at):
    if kind is RetryAt and at is None:
        pytest.skip("a retry has a time")
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        when = None if at is None else time.time() + at
        await settle_one(broker, ending(await one(broker), kind(when, "why")))
        if at is not None:
            assert await claimed(broker) == []
            await anyio.sleep(at)
            await broker.promote()
        again = await one(broker)
        assert names([again]) == ["a"]
        await settle_one(broker, ending(again))
        assert await claimed(broker) == ["b"]


async def test_a_claim_whose_lease_expired_keeps_its_key(broker_factory, ground):
    async with broker_factory("w") as broker, broker_factory("v") as other:
        await broker.publish([ordered("a"), ordered("b")])
        claim = await one(broker)
        ground.ripen(claim)
        (again,) = await recover(other, ground)
        assert names([again]) == ["a"]
        await settle_one(other, ending(again))
        assert await claimed(other) == ["b"]


async def test_a_delayed_job_takes_its_place_when_it_is_due(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("late", delay=0.1), ordered("a"), ordered("b")])
        first = await one(broker)
        await anyio.sleep(0.15)
        await broker.promote()
        assert names([first]) == ["a"] and await claimed(broker) == []
        await settle_one(broker, ending(first))
        second = await one(broker)
        await settle_one(broker, ending(second))
        assert names([second]) == ["b"] and await claimed(broker) == ["late"]


async def test_a_key_halts_at_a_dead_job_until_it_is_replayed(broker_factory, operator, raw):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        await settle_one(broker, ending(await one(broker), Dead("why"), halts=True))
        assert await claimed(broker) == []
        assert raw.hgetall("stream:{q}:halted") == {b"k": b"a"}
        (depth,) = await broker.depth()
        assert (depth.ready, depth.waiting, depth.halted, depth.load) == (0, 1, 1, 0)
        sentences = [each.sentence for each in await operator.findings(["q"]) if each.subject == "order"]
        assert sentences == ["q: 1 order keys halt (k): replay or drop the dead jobs that hold them"]
        (letter,) = (await operator.dead("q")).rows
        assert await operator.replay(letter)
        assert not raw.exists("stream:{q}:halted")
        again = await one(broker)
        await settle_one(broker, ending(again))
        assert names([again]) == ["a"] and await claimed(broker) == ["b"]


@pytest.mark.parametrize("how", ["erase", "purge"])
async def test_a_key_halts_at_a_dead_job_until_it_is_deleted(broker_factory, operator, raw, how):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        await settle_one(broker, ending(await one(broker), Dead("why"), halts=True))
        if how == "erase":
            assert await operator.erase((await operator.dead("q")).rows[0])
        else:
            assert await operator.purge("q", "dead", 10) == 1
        last = await one(broker)
        await settle_one(broker, ending(last))
        assert names([last]) == ["b"] and nothing_left(raw)


async def test_a_replayed_job_takes_its_place_anew(broker_factory, operator):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        await settle_one(broker, ending(await one(broker), Dead("why")))
        running = await one(broker)
        assert await operator.replay((await operator.dead("q")).rows[0])
        assert names([running]) == ["b"] and await claimed(broker) == []
        await settle_one(broker, ending(running))
        assert await claimed(broker) == ["a"]


async def test_what_an_operator_ends_passes_its_key_on(broker_factory, operator, raw):
    async with broker_factory("w") as broker:
        await broker.publish([ordered(name) for name in "abcd"])
        await broker.claim(10, 0, ())
        assert await operator.drop(await held(operator))
        second = await one(broker)
        assert names([second]) == ["b"] and await operator.bury(await held(operator), "by hand")
        third = await one(broker)
        await settle_one(broker, ending(third, RetryAt(time.time() + 60, "why")))
        (parked,) = (await operator.delayed("q")).rows
        assert names([third]) == ["c"] and await operator.forget(parked)
        last = await one(broker)
        await settle_one(broker, ending(last))
        assert names([last]) == ["d"] and nothing_left(raw)


async def test_a_cancelled_delayed_job_passes_its_key_on(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        await settle_one(broker, ending(await one(broker), RetryAt(time.time() + 60, "why")))
        assert await broker.cancel("q", "a")
        assert await claimed(broker) == ["b"]


async def test_purging_the_ready_jobs_empties_the_lines(broker_factory, operator, raw, ground):
    async with broker_factory("w") as broker:
        await broker.publish([ordered(f"{key}{n}", key) for n in range(5) for key in "kl"])
        running = (await broker.claim(1, 0, ()))[0]
        assert await operator.purge("q", "ready", 1000) == 9
        assert (await broker.depth())[0].waiting == 0 and ground.ready() == 0
        await settle_one(broker, ending(running))
        assert nothing_left(raw)
        await broker.publish([ordered("fresh")])
        assert await claimed(broker) == ["fresh"]


async def test_without_memory_the_next_job_stays_in_its_line(broker_factory, raw):
    """Settling frees, so that the server takes the script; the key is passed on all the same."""
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        claim = await one(broker)
        raw.config_set("maxmemory", 1)
        try:
            answer = await settle_one(broker, ending(claim))
        finally:
            raw.config_set("maxmemory", 0)
        assert answer is Settled.SETTLED
        assert await claimed(broker) == ["b"]


async def test_the_job_after_it_waits_for_a_ready_key_that_can_be_written(broker_factory, raw, ground):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b", level="high")])
        claim = await one(broker)
        raw.delete(ground.place("high"))
        raw.set(ground.place("high"), "odd")
        await settle_one(broker, ending(claim))
        assert raw.llen("stream:{q}:order:k") == 1, "the job is nowhere else"


async def test_a_key_whose_job_is_nowhere_is_found_and_passed_on(broker_factory, ground, raw):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b"), ordered("x", "other"), ordered("y", "other")])
        claims = {names([claim])[0]: claim for claim in await broker.claim(10, 0, ())}
        sweeper, keys = broker._order, broker._keys[0]
        assert await sweeper.sweep(keys) == 0
        ground.finish(claims["a"])  # by hand, or by a version without order
        assert await sweeper.sweep(keys) == 0 and not sweeper.is_in_doubt, "one look a minute"
        raw.delete("stream:{q}:swept")
        assert await sweeper.sweep(keys) == 0 and sweeper.is_in_doubt
        assert await sweeper.sweep(keys) == 1 and not sweeper.is_in_doubt
        assert await claimed(broker) == ["b"]


async def test_a_worker_looks_again_soon_for_a_job_that_it_missed(broker_factory, ground, raw, monkeypatch):
    monkeypatch.setattr("streamworker.broker.order.SWEEP_AGAIN", 0.01)
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        ground.finish(await one(broker))

        async def passed_on():
            await broker.promote()
            return await claimed(broker)

        assert await eventually(passed_on) == ["b"]


class Dodging:
    """A session whose every question a job dodges: it is among the delayed ones while others are asked for, and ready else."""

    def __init__(self, session, raw, ground, member, body):
        self.run, self._session, self._raw, self._ground, self._job = session.run, session, raw, ground, (member, body)

    async def ask(self, command, key, *rest):
        member, body = self._job
        place = self._ground.place("normal")
        self._raw.delete(place)
        if key == "stream:{q}:due":
            self._raw.zrem(key, member)
            self._ground.push(body)
        else:
            self._raw.zadd("stream:{q}:due", {member: 1})
        return await self._session.ask(command, key, *rest)


async def test_a_job_that_moves_while_its_queue_is_read_keeps_its_key(broker_factory, ground, raw):
    """As one does that waits for a permit: another job of its key would run before it."""
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        claim = await one(broker)
        ground.finish(claim)
        sweeper = OrderSweeper(Dodging(broker._session, raw, ground, "normal/a/1", claim.body))
        assert await sweeper.sweep(broker._keys[0]) == 0 and sweeper.is_in_doubt
        sweeper._session = broker._session  # it stays for a moment
        assert await sweeper.sweep(broker._keys[0]) == 0 and not sweeper.is_in_doubt


async def test_a_key_that_passes_on_while_its_queue_is_read_keeps_its_job(broker_factory, ground, raw, monkeypatch):
    """Jobs end, and the next of their key is another one, which was missing once."""
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b"), ordered("c")])

        async def nothing(session, keys):
            raw.hset("stream:{q}:order", "k", "b")
            for found in ():
                yield found

        monkeypatch.setattr("streamworker.broker.order._ids", nothing)
        assert await broker._order.sweep(broker._keys[0]) == 0 and not broker._order.is_in_doubt


async def test_what_waits_is_counted_anew_when_the_meta_hash_is_lost(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b"), ordered("c")])
        raw.delete("stream:{q}:meta")
        await settle_one(broker, ending(await one(broker)))
        assert (await broker.depth())[0].waiting < 1, "the number is lost"
        raw.delete("stream:{q}:swept")
        assert await broker._order.sweep(broker._keys[0]) == 0
        assert (await broker.depth())[0].waiting == 1


@pytest.mark.parametrize("where", ["ready", "claimed", "delayed", "halted"])
async def test_a_key_whose_job_waits_somewhere_stays(broker_factory, where):
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b")])
        if where != "ready":
            claim = await one(broker)
        if where == "delayed":
            await settle_one(broker, ending(claim, RetryAt(time.time() + 60, "why")))
        elif where == "halted":
            await settle_one(broker, ending(claim, Dead("why"), halts=True))
        assert await broker._order.sweep(broker._keys[0]) == 0


async def test_what_waits_in_lines_is_in_the_queue_for_the_ledger(broker_factory, ground, redis_url):
    """Else a comparison after a loss would dispatch it again."""
    dispatcher = RedisDispatcher(RedisAddress(redis_url), ground.keys, group=GROUP, namespace="")
    async with broker_factory("w") as broker:
        await broker.publish([ordered("a"), ordered("b"), ordered("c"), fair_one("f"), fair_one("g"), fair_one("h")])
        found = {job_id async for ids in dispatcher.ids("q") for job_id in ids}
        assert found == set("abcfgh")
    await dispatcher.close()


# -- with workers


class Step(Payload, kind="step", queue="q", order_by="key"):
    key: str
    number: int
    fate: str = ""


class Careful(Payload, kind="careful", queue="q", order_by="key", on_dead="halt"):
    key: str
    number: int


class Log:
    """What ran: starts and ends."""

    def __init__(self) -> None:
        self.ran: dict[str, list[int]] = defaultdict(list)
        self.running: dict[str, int] = defaultdict(int)
        self.overlaps = 0
        self.tries: dict[tuple[str, int], int] = defaultdict(int)

    async def run(self, payload: Step) -> None:
        key = payload.key
        self.running[key] += 1
        self.overlaps += self.running[key] > 1
        self.tries[key, payload.number] += 1
        first = self.tries[key, payload.number] == 1
        try:
            await anyio.sleep(0.002)
            match payload.fate:
                case "retry" if first:
                    raise Retry(after=0.05)
                case "snooze" if first:
                    raise Snooze(0.05)
                case "fail" if first:
                    raise RuntimeError("once")
                case "dead":
                    raise Discard("no")
            self.ran[key].append(payload.number)
        finally:
            self.running[key] -= 1


async def test_workers_keep_the_order_through_retries_snoozes_and_deaths(raw, ground):
    log = Log()
    app = App(settings=settings(raw, ground, concurrency=20))

    @app.handler(backoff=Backoff(base=0.01))
    async def step(payload: Step) -> None:
        await log.run(payload)

    fates = ["", "retry", "snooze", "fail", "dead", "", "retry"]
    async with app, working(app, workers=2):
        jobs = [Step(f"k{key}", number, fates[(number + key) % 7]) for number in range(14) for key in range(6)]
        await app.enqueue_many(jobs)
        wanted = {
            f"k{key}": [number for number in range(14) if fates[(number + key) % 7] != "dead"] for key in range(6)
        }
        await eventually(lambda: dict(log.ran) == wanted, timeout=20)
    assert log.overlaps == 0
    assert nothing_left(raw)


async def test_a_producer_of_another_language_gets_order_from_the_claim_on(raw, ground):
    """It adds documents with the wire field; a worker moves those whose turn it is not behind their line."""
    log = Log()
    app = App(settings=settings(raw, ground, concurrency=20))

    @app.handler
    async def step(payload: Step) -> None:
        await log.run(payload)

    for number in range(8):
        for key in "ab":
            body = {"kind": "step", "order_key": key, "payload": {"key": key, "number": number}}
            ground.push(json.dumps(body))
    async with app, working(app):
        await eventually(lambda: len(log.ran["a"]) == len(log.ran["b"]) == 8, timeout=20)
    assert log.overlaps == 0
    assert dict(log.ran) == {"a": list(range(8)), "b": list(range(8))}
    assert nothing_left(raw)


async def test_a_halted_key_waits_for_the_operator(raw, ground, operator):
    ran: list[int] = []
    app = App(settings=settings(raw, ground))

    @app.handler
    async def careful(payload: Careful) -> None:
        if payload.number == 0 and len(ran) == 0:
            ran.append(-1)
            raise Discard("first")
        ran.append(payload.number)

    async with app, working(app):
        await app.enqueue_many([Careful("k", number) for number in range(3)])
        await eventually(lambda: raw.hlen("stream:{q}:halted") == 1)
        assert ran == [-1]
        (letter,) = (await operator.dead("q")).rows
        assert await operator.replay(letter)
        await eventually(lambda: ran == [-1, 0, 1, 2])


async def test_a_worker_that_stops_hands_the_job_back_with_its_key(raw, ground):
    started = anyio.Event()
    ran: list[int] = []
    app = App(settings=settings(raw, ground, grace=0))

    @app.handler
    async def step(payload: Step) -> None:
        if not started.is_set():
            started.set()
            await anyio.sleep(60)
        ran.append(payload.number)

    async with app:
        await app.enqueue_many([Step("k", number) for number in range(3)])
        async with working(app):
            await started.wait()
        async with working(app):
            await eventually(lambda: ran == [0, 1, 2])


def test_a_key_is_text_of_at_most_200_bytes():
    from streamworker.errors import UsageError
    from streamworker.producer import make_job

    assert make_job(Step("a" * 200, 1)).order_key == "a" * 200
    assert make_job(Step("", 1)).order_key is None
    with pytest.raises(UsageError, match=r"Step\.key has more than 200 bytes"):
        make_job(Step("a" * 201, 1))
    packed = codec.pack(make_job(Step("k", 1)), max_bytes=10_000, key_ttl=1)
    assert json.loads(packed.body)["order_key"] == "k" and packed.lined


def test_a_class_names_its_fields():
    with pytest.raises(TypeError, match="order_by='nope' names no field"):

        class Wrong(Payload, kind="wrong", queue="q", order_by="nope"):
            key: str

    with pytest.raises(TypeError, match="on_dead"):

        class Odd(Payload, kind="odd", queue="q", on_dead="halt"):
            key: str
