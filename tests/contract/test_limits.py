"""Limits of kinds: never more than allowed in the whole fleet, in the order of arrival, nothing charged, nothing left over."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from time import monotonic
from typing import Any

import anyio
import pytest

from streamworker import App, Backoff, Context, Payload, Retry, Settings, codec
from streamworker.codec import State, seal, sealed
from streamworker.errors import ConfigurationError
from streamworker.limits import AcquireRequest, Limit, Permit, quota
from streamworker.worker.admission import limit_name
from tests.conftest import eventually
from tests.contract.helpers import document, job, list_in_all, names, settings, working

TWO = Limit("q", "k", concurrency=2)


def asking(claim: Any, limit: Limit = TWO, turn: str = "") -> AcquireRequest:
    return AcquireRequest(claim, limit, json.loads(claim.body)["id"], secrets.token_hex(4), turn)


async def defer(broker: Any, claim: Any, answer: Any) -> None:
    """What a worker does with a job that may not run yet."""
    from time import time

    from tests.contract.helpers import release, settle_one

    job_id = json.loads(claim.body)["id"]
    body = codec.rewrite(claim.body, {}, state=State(turn=answer.turn), secret=claim.secret)
    ending = release(claim, time() + answer.wait, member=answer.member, job_id=job_id, body=body)
    assert (await settle_one(broker, ending)).value == "settled"


def turn(claim: Any) -> str:
    return codec.state_of(codec.read(claim.body), claim.secret).turn


def put_off(raw: Any, seconds: float = 60) -> None:
    """The one that was called was called later than that, or earlier: it has a second to come, and machines stall."""
    calls = "stream:{q}:limit:calls"
    (member,) = raw.zrange(calls, 0, -1)
    raw.zincrby(calls, seconds * 1000, member)


def limit_keys(raw: Any) -> list[str]:
    return sorted(key.decode() for key in raw.keys("*:limit:*"))


async def test_as_many_as_allowed_hold_it_and_the_next_is_called_when_one_leaves(broker_factory, ground, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job(name) for name in "abcd"])
        claims = await broker.claim(4, 0, ())
        answers = await broker.acquire("q", [asking(claim) for claim in claims], ())
        assert [answer.hold is not None for answer in answers] == [True, True, False, False]
        assert all(0 < answer.wait <= 31 for answer in answers[2:])
        for claim, answer in zip(claims[2:], answers[2:], strict=True):
            await defer(broker, claim, answer)
        assert ground.ready() == 0 and raw.zcard("stream:{q}:due") == 2
        await broker.acquire("q", [], [answers[0].hold])
        called = await broker.claim(4, 0, claims[:2])  # without a tick: the script that gave back has called it
        assert names(called) == ["c"]
        assert raw.zcard("stream:{q}:due") == raw.hlen("stream:{q}:bodies") == 1
        (answer,) = await broker.acquire("q", [asking(called[0], turn=turn(called[0]))], ())
        assert answer.hold is not None
        await broker.acquire("q", [], [answers[1].hold, answer.hold])
        (last,) = await broker.claim(4, 0, claims[:2])
        (answer,) = await broker.acquire("q", [asking(last, turn=turn(last))], ())
        await broker.acquire("q", [], [answer.hold])
        assert limit_keys(raw) == []


async def test_a_newcomer_does_not_overtake_one_that_waits(broker_factory, raw):
    one = Limit("q", "k", concurrency=1)
    async with broker_factory("w") as broker:
        await broker.publish([job(name) for name in "abc"])
        a, b, c = await broker.claim(3, 0, ())
        first, second = await broker.acquire("q", [asking(a, one), asking(b, one)], ())
        await defer(broker, b, second)
        await broker.acquire("q", [], [first.hold])
        put_off(raw)
        (late,) = await broker.acquire("q", [asking(c, one)], ())
        assert late.hold is None  # b was called, and has not come yet
        assert late.wait <= 2.0  # should b never come, it is noticed soon
        (called,) = await broker.claim(3, 0, (a, c))
        assert names([called]) == ["b"]
        (answer,) = await broker.acquire("q", [asking(called, one, turn(called))], ())
        assert answer.hold is not None
        assert turn(called).split()[0] == second.turn.split()[0]


async def test_one_that_was_called_and_never_comes_holds_nobody_up(broker_factory, raw):
    one = Limit("q", "k", concurrency=1)
    async with broker_factory("w") as broker:
        await broker.publish([job(name) for name in "abc"])
        a, b, c = await broker.claim(3, 0, ())
        first, second = await broker.acquire("q", [asking(a, one), asking(b, one)], ())
        await defer(broker, b, second)
        await broker.acquire("q", [], [first.hold])
        put_off(raw, -5)
        assert await may(broker, asking(c, one))


async def test_one_that_was_dropped_while_it_waited_holds_nobody_up(broker_factory, raw, monkeypatch):
    monkeypatch.setattr("streamworker.broker.base.PATIENCE", 0.3)
    one = Limit("q", "k", concurrency=1)
    async with broker_factory("w") as broker:
        await broker.publish([job(name) for name in "abc"])
        a, b, c = await broker.claim(3, 0, ())
        first, second, third = await broker.acquire("q", [asking(each, one) for each in (a, b, c)], ())
        await defer(broker, b, second)
        await defer(broker, c, third)
        raw.zrem("stream:{q}:due", second.member)  # an operator
        raw.hdel("stream:{q}:bodies", second.member)
        await broker.acquire("q", [], [first.hold])
        (called,) = await broker.claim(3, 0, (a,))
        assert names([called]) == ["c"]  # called in b's place
        waits = []
        async with anyio.create_task_group() as group:

            async def come() -> None:
                answer = None
                while answer is None or answer.hold is None:
                    (answer,) = await broker.acquire("q", [asking(called, one, turn(called))], ())
                    waits.append(answer.wait)
                    await anyio.sleep(answer.wait)

            group.start_soon(come)
        assert sum(waits) < 2


async def test_a_hold_lapses_unless_it_is_renewed(broker_factory, raw):
    one = Limit("q", "k", concurrency=1)
    async with broker_factory("w", lease=0.4) as broker:
        await broker.publish([job(name) for name in "ab"])
        a, b = await broker.claim(2, 0, ())
        first, second = await broker.acquire("q", [asking(a, one), asking(b, one)], ())
        assert second.wait <= 0.5  # when the first one's hold would lapse
        began = monotonic()
        while monotonic() - began < 0.7:
            await broker.renew_permits([first.hold])
            (second,) = await broker.acquire("q", [asking(b, one, second.turn)], ())
            assert second.hold is None
            await anyio.sleep(0.05)
        await eventually(lambda: may(broker, asking(b, one, second.turn)), 5)


async def may(broker: Any, each: AcquireRequest) -> bool:
    (answer,) = await broker.acquire("q", [each], ())
    return answer.hold is not None


async def test_a_hold_that_was_given_back_is_not_renewed_to_life(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        (claim,) = await broker.claim(1, 0, ())
        (answer,) = await broker.acquire("q", [asking(claim)], ())
        await broker.acquire("q", [], [answer.hold])
        await broker.renew_permits([answer.hold])
        assert limit_keys(raw) == []


async def test_asking_again_after_a_lost_reply_takes_no_second_place(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job(name) for name in "abc"])
        a, b, c = await broker.claim(3, 0, ())
        for _ in range(3):
            (answer,) = await broker.acquire("q", [asking(a)], ())
            assert answer.hold is not None
        assert raw.zcard("stream:{q}:limit:holds:k") == 1
        assert await may(broker, asking(b))
        assert not await may(broker, asking(c))
        assert not await may(broker, asking(c))


async def test_a_rate_spaces_starts_and_says_when_to_come(broker_factory, raw):
    rate = Limit("q", "k", gap=0.1, burst=2)
    async with broker_factory("w") as broker:
        await broker.publish([job(str(n)) for n in range(6)])
        claims = await broker.claim(6, 0, ())
        answers = await broker.acquire("q", [asking(claim, rate) for claim in claims], ())
        assert [answer.hold is not None for answer in answers] == [True, True, False, False, False, False]
        waits = [answer.wait for answer in answers[2:]]
        for number, wait in enumerate(waits, 1):
            assert 0.1 * number - 0.01 < wait <= 0.1 * number + 0.01, waits
        assert 0 < raw.pttl("stream:{q}:limit:bucket:k") <= 200
        for claim, answer in zip(claims[2:], answers[2:], strict=True):
            await defer(broker, claim, answer)
        came: list[str] = []
        deadline = monotonic() + 20
        while len(came) < 4 and monotonic() < deadline:
            await broker.promote()
            for claim in await broker.claim(6, 0, claims):
                (answer,) = await broker.acquire("q", [asking(claim, rate, turn(claim))], ())
                if answer.hold is not None:
                    came.append(names([claim])[0])
                else:
                    await defer(broker, claim, answer)
            await anyio.sleep(0.005)
        assert came == ["2", "3", "4", "5"]


async def test_the_keys_of_limits_do_not_outlive_their_use(broker_factory, raw):
    """Nobody ever asks again: what is noted of turns and calls ends by itself."""
    one = Limit("q", "k", concurrency=1)
    async with broker_factory("w", lease=0.2) as broker:
        await broker.publish([job(name) for name in "ab"])
        a, b = await broker.claim(2, 0, ())
        first, second = await broker.acquire("q", [asking(a, one), asking(b, one)], ())
        await defer(broker, b, second)
        await broker.acquire("q", [], [first.hold])
        assert limit_keys(raw)
        assert all(0 < raw.pttl(key) < 30_000 for key in limit_keys(raw))


async def test_a_turn_that_makes_no_sense_is_a_first_time(broker_factory, ground, raw):
    seen = []

    class Odd(Payload, kind="odd", queue="q"):
        pass

    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=1)
    async def odd(payload: Odd, ctx: Context) -> None:
        seen.append(ctx.job.id)

    raw.hset("stream:{q}:meta", "secret", "5ec2e7 0")
    for name, value in {
        "a": 5,
        "b": "x",
        "c": "99999999999999 deadbeef",
        "d": ["1 deadbeef"],
        "e": "1 DEADBEEF",
    }.items():
        state = {**sealed(State(), name, b"5ec2e7 0"), "turn": value}
        proof = {**state, "seal": seal(b"5ec2e7 0", name, f"state 0 0 {value}")}
        ground.push(json.dumps({"id": name, "kind": "odd", "payload": {}, "streamworker_state": proof}))
    async with working(app):
        await eventually(lambda: sorted(seen) == list("abcde"))


# -- whole workers


class Work(Payload, kind="work", queue="q"):
    n: int
    tenant: str = ""


class Watch:
    """How many run at once, and in which order they began."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.order: list[int] = []
        self.at: list[float] = []
        self.hops: list[int] = []

    async def run(self, payload: Work, ctx: Context, seconds: float) -> None:
        self.running[payload.tenant] += 1
        self.most[payload.tenant] = max(self.most[payload.tenant], self.running[payload.tenant])
        self.order.append(payload.n)
        self.at.append(monotonic())
        self.hops.append(ctx.job.hop)
        assert (ctx.attempt, ctx.delivery) == (1, 1)
        await anyio.sleep(seconds)
        self.running[payload.tenant] -= 1


async def test_a_fleet_keeps_to_the_cap_in_order_and_charges_nothing(ground, raw):
    watch = Watch()
    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=3)
    async def work(payload: Work, ctx: Context) -> None:
        await watch.run(payload, ctx, 0.02)

    async with app:
        await app.enqueue_many([Work(n=n) for n in range(40)])
        async with working(app, workers=3):
            await eventually(lambda: len(watch.order) == 40, timeout=30)
            await eventually(lambda: not watch.running.total())
            assert watch.most[""] == 3
            assert max(watch.hops) <= 4  # parked once, called once; a look too early now and then
            late = [abs(n - place) for place, n in enumerate(watch.order)]
            assert max(late) <= 12, watch.order  # three workers claim at once; nobody starves
            await eventually(ground.empty)
    assert limit_keys(raw) == []


async def test_values_of_a_field_have_limits_of_their_own(ground, raw):
    watch = Watch()
    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=1, limit_by="tenant")
    async def work(payload: Work, ctx: Context) -> None:
        await watch.run(payload, ctx, 0.03)

    async with app:
        await app.enqueue_many([Work(n=n, tenant=tenant) for n in range(5) for tenant in ("a", "b:c", "ü" * 200)])
        async with working(app, workers=2):
            await eventually(lambda: len(watch.order) == 15, timeout=30)
    assert set(watch.most.values()) == {1} and len(watch.most) == 3
    assert limit_keys(raw) == []


async def test_kinds_without_limits_are_not_held_up_by_those_with(ground, raw):
    ran = []
    gate = anyio.Event()
    app = App(settings=settings(raw, ground, concurrency=4))

    class Free(Payload, kind="free", queue="q"):
        n: int

    @app.handler(concurrency=1)
    async def work(payload: Work, ctx: Context) -> None:
        await gate.wait()

    @app.handler
    async def free(payload: Free) -> None:
        ran.append(payload.n)

    async with app:
        await app.enqueue_many([*(Work(n=n) for n in range(20)), *(Free(n=n) for n in range(20))])
        async with working(app):
            await eventually(lambda: len(ran) == 20)
            gate.set()
            await eventually(ground.empty, timeout=30)


async def test_a_rate_holds_over_the_fleet(ground, raw):
    watch = Watch()
    app = App(settings=settings(raw, ground))

    @app.handler(rate="50/s", burst=5)
    async def work(payload: Work, ctx: Context) -> None:
        await watch.run(payload, ctx, 0)

    async with app:
        await app.enqueue_many([Work(n=n) for n in range(40)])
        async with working(app, workers=2):
            await eventually(lambda: len(watch.order) == 40, timeout=60)
    for first in range(len(watch.at)):
        within = sum(watch.at[first] <= at < watch.at[first] + 0.5 for at in watch.at)
        assert within <= 25 + 5 + 5, watch.at  # rate * time + burst, and what our own loop was late by
    assert watch.at[-1] - watch.at[0] >= (40 - 5) / 50 - 0.05


async def test_retries_snoozes_and_failures_give_their_places_back(ground, raw):
    seen: Counter[int] = Counter()
    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=1, max_attempts=2, backoff=Backoff(base=0.01, jitter=0))
    async def work(payload: Work, ctx: Context) -> None:
        seen[payload.n] += 1
        if ctx.attempt == 1 and payload.n % 2:
            raise Retry(0.01)

    async with app:
        await app.enqueue_many([Work(n=n) for n in range(6)])
        async with working(app):
            await eventually(lambda: seen.total() == 9, timeout=30)
            await eventually(ground.empty, timeout=30)
    assert limit_keys(raw) == []


@pytest.mark.mode_free
async def test_sync_handlers_are_limited_too(ground, raw):
    import threading
    import time

    lock, now, most = threading.Lock(), [0], [0]
    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=2)
    def work(payload: Work) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    async with app:
        await app.enqueue_many([Work(n=n) for n in range(12)])
        async with working(app, workers=2):
            await eventually(ground.empty, timeout=30)
    assert most == [2]


@list_in_all
async def test_an_idle_fleet_with_waiters_asks_seldom(ground, raw):
    """Two wait for a job that takes long: they are asked about once a lease, not all the time."""
    gate = anyio.Event()
    app = App(settings=settings(raw, ground, lease=0.6))

    @app.handler(concurrency=1)
    async def work(payload: Work, ctx: Context) -> None:
        await gate.wait()

    async with app:
        await app.enqueue_many([Work(n=n) for n in range(3)])
        async with working(app, workers=2):
            await eventually(lambda: raw.zcard("stream:{q}:due") == 2)
            turns = "stream:{q}:limit:turns:work"
            members, changes, until = set(raw.zrange(turns, 0, -1)), 0, monotonic() + 1.8
            while monotonic() < until:
                await anyio.sleep(0.02)
                now = set(raw.zrange(turns, 0, -1))
                changes += len(now - members)
                members = now
            assert changes <= 10, changes
            gate.set()
            await eventually(ground.empty, timeout=30)


async def test_a_worker_that_stops_gives_its_places_back(ground, raw):
    gate = anyio.Event()
    began: list[int] = []
    app = App(settings=settings(raw, ground, grace=0.1))

    @app.handler(concurrency=1)
    async def work(payload: Work, ctx: Context) -> None:
        began.append(payload.n)
        await gate.wait()

    async with app:
        await app.enqueue_many([Work(n=n) for n in range(3)])
        async with working(app):
            await eventually(lambda: len(began) == 1)
        assert ground.held() == 0
        assert not raw.exists("stream:{q}:limit:holds:work")
        gate.set()
        async with working(app):
            await eventually(ground.empty, timeout=30)


# -- what is said at registration


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concurrency": 0}, "from 1"),
        ({"concurrency": True}, "from 1"),
        ({"rate": "fast"}, "'100/s'"),
        ({"rate": "0/s"}, "'100/s'"),
        ({"rate": "5/0s"}, "'100/s'"),
        ({"rate": "10000000/s"}, "'100/s'"),
        ({"burst": 2}, "without concurrency= or rate="),
        ({"concurrency": 1, "burst": 2}, "needs rate="),
        ({"limit_by": "tenant"}, "without concurrency= or rate="),
        ({"concurrency": 1, "limit_by": "nobody"}, "no field"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):

        @App(settings=Settings()).handler(**options)
        async def work(payload: Work) -> None: ...


def test_rates():
    def told(rate: str, burst: int | None = None) -> tuple[float, int]:
        made = quota(rate=rate, burst=burst)
        assert made is not None
        return made.gap, made.burst

    assert told("100/s") == (0.01, 10)
    assert told("600/min") == (0.1, 1)
    assert told(" 5 / 10s ") == (2.0, 1)
    assert told("10/h") == (360.0, 1)
    assert told("10/h", burst=10) == (360.0, 10)
    assert told("1/day") == (86400.0, 1)


def test_no_kind_has_the_keys_of_another():
    by = quota(concurrency=1, limit_by="tenant")
    plain = quota(concurrency=1)
    assert by is not None and plain is not None
    assert limit_name("a", by, Work(n=1, tenant="b")) == "a:b"
    assert limit_name("a:b", plain, Work(n=1)) == "a%3Ab"
    assert limit_name("a%3Ab", plain, Work(n=1)) == "a%253Ab"
    assert len(limit_name("a", by, Work(n=1, tenant="x" * 101))) == 66
    assert Permit(TWO, "x") == Permit(TWO, "x") and document("x")
