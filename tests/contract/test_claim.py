"""Publishing and claiming: order, limits, waiting, keys that are not as they should be."""

import asyncio
import json
import re
import time
from contextlib import suppress
from uuid import UUID

import anyio
import pytest

from streamworker import App, Payload, codec
from streamworker.broker.claim import Options
from streamworker.broker.lists import ListBroker
from streamworker.broker.redis.client import RedisAddress
from streamworker.errors import ConfigurationError, Unreachable
from streamworker.job import Settled
from streamworker.settings.rules import QueueSpec
from tests.conftest import eventually
from tests.contract.ground import GROUP, out_of_memory
from tests.contract.helpers import (
    HIGH,
    IDS,
    LOW,
    META,
    NORMAL,
    done,
    job,
    list_only,
    names,
    one,
    settings,
    stream_only,
    working,
)

LEVELS = ("high", "normal", "low")


async def test_order_over_queues_and_levels(broker_factory):
    async with broker_factory("w", queues=("a", "b")) as broker:
        jobs = [job(f"{q}{level}{n}", q, level) for n in range(3) for level in reversed(LEVELS) for q in ("b", "a")]
        answers = await broker.publish(jobs)
        assert [(answer.id, answer.new) for answer in answers] == [(each.id, True) for each in jobs]
        claims = await broker.claim(100, 0, ())
        assert names(claims) == [f"{q}{level}{n}" for q in "ab" for level in LEVELS for n in range(3)]
        assert [(claim.queue, claim.level) for claim in claims] == [
            (q, level) for q in "ab" for level in LEVELS for _ in range(3)
        ]
        assert all(claim.count == 1 and not claim.suspect for claim in claims)
        assert [claim.body for claim in claims] == [
            each.body for each in sorted(jobs, key=lambda j: names(claims).index(j.id))
        ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
async def test_never_more_than_asked_for(broker_factory, weighted, limit):
    async with broker_factory("w", queues=("a", "b"), weighted=weighted) as broker:
        await broker.publish([job(queue=q, level=level) for q in "ab" for level in LEVELS for _ in range(10)])
        seen, claims = 0, []
        while seen < 60:
            new = await broker.claim(limit, 5, claims)
            assert len(new) == min(limit, 60 - seen)
            seen += len(new)
            claims += new
        assert len(set(names(claims))) == 60


@stream_only
async def test_a_blocking_read_brings_at_most_one_more_of_each_other_stream(broker_factory, raw, ground):
    async with broker_factory("w") as broker:
        claiming = asyncio.create_task(broker.claim(1, 5, ()))
        await eventually(
            lambda: any(c["cmd"].startswith("xreadgroup") and "b" in c["flags"] for c in raw.client_list())
        )
        with raw.pipeline(transaction=True) as pipe:
            for level in reversed(LEVELS):
                for _ in range(5):
                    ground.push('{"payload":{}}', level, client=pipe)
            pipe.execute()
        claims = await claiming
        assert 1 <= len(claims) <= 3
        assert len({claim.place for claim in claims}) == len(claims)


async def test_strict_high_leaves_low_nothing_and_weighted_its_tenth(broker_factory):
    for weighted, expected in ((False, 0), (True, 10)):
        async with broker_factory("w", weighted=weighted) as broker:
            await broker.publish([job(level=level) for level in ("high", "low") for _ in range(120)])
            claims = []
            for _ in range(20):
                claims += await broker.claim(5, 0, claims)
            assert sum(claim.level == "low" for claim in claims) == pytest.approx(expected, abs=expected * 0.9)
            low = sum(claim.level == "low" for claim in claims)
            assert low == 0 if not weighted else low >= 10
            await broker.settle([done(claim) for claim in claims])
            while rest := await broker.claim(100, 0, ()):
                await broker.settle([done(claim) for claim in rest])


async def test_orphans_of_low_levels_are_not_starved_by_new_high_jobs(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("orphan", level="low")])
        ground.ripen(await one(gone))
        await broker.publish([job(level="high") for _ in range(100)])
        assert "orphan" in names(await broker.claim(5, 0, ()))


async def test_caps_hold_per_queue(broker_factory):
    async with broker_factory("w", queues=(("a", 2), "b", ("c", 1))) as broker:
        await broker.publish([job(queue=q) for q in "abc" for _ in range(5)])
        first = await broker.claim(100, 0, ())
        assert sorted(claim.queue for claim in first) == ["a", "a", "b", "b", "b", "b", "b", "c"]
        assert await broker.claim(100, 0.05, first) == []
        rest = [claim for claim in first if claim.queue != "a"]
        again = await broker.claim(100, 0, rest)
        assert [claim.queue for claim in again] == ["a", "a"]


async def test_a_capped_out_queue_does_not_wake_a_waiting_claim(broker_factory):
    async with broker_factory("w", queues=(("a", 1), "b")) as broker:
        await broker.publish([job(queue="a"), job(queue="a")])
        running = [await one(broker)]
        claiming = asyncio.create_task(broker.claim(10, 5, running))
        await asyncio.sleep(0)
        await broker.publish([job("wakes", queue="b")])
        assert names(await claiming) == ["wakes"]


@pytest.mark.parametrize("cap_of_b", [1, None])
async def test_a_capped_queue_goes_on_as_soon_as_one_of_its_jobs_ends(raw, ground, cap_of_b):
    """Whatever the worker waits for meanwhile: nothing at all (all queues at their caps), or jobs of another queue."""
    ran: list[int] = []
    app = App(settings=settings(raw, ground, queues=(QueueSpec("a", 1), QueueSpec("b", cap_of_b))))

    class Capped(Payload, kind="capped", queue="a"):
        n: int

    class Held(Payload, kind="held", queue="b"):
        pass

    release = asyncio.Event()

    @app.handler
    async def capped(payload: Capped) -> None:
        await asyncio.sleep(0.002)
        ran.append(payload.n)

    @app.handler
    async def held(payload: Held) -> None:
        await release.wait()

    async with app:
        await app.enqueue(Held())
        await app.enqueue_many([Capped(n=n) for n in range(30)])
    async with working(app):
        # One look a second, or one at the end of a blocking read, would take 30 s and more.
        await eventually(lambda: len(ran) == 30, 15)
        release.set()
    assert ran == list(range(30))


async def test_a_waiting_claim_looks_again_when_told_that_there_is_room(broker_factory, ground):
    async with broker_factory("w", queues=(("a", 1), "b")) as broker:
        await broker.publish([job("first", queue="a"), job("second", queue="a")])
        running = [await one(broker)]
        claiming = asyncio.create_task(broker.claim(10, 5, running))
        await eventually(ground.blocked)
        running.clear()
        with anyio.fail_after(3):
            await broker.look_again()
            assert await claiming == []
            assert names(await broker.claim(10, 5, running)) == ["second"]


async def test_what_has_ended_fills_no_cap(broker_factory):
    async with broker_factory("w", queues=(("a", 2),)) as broker:
        await broker.publish([job(queue="a") for _ in range(5)])
        running = await broker.claim(10, 0, ())
        assert await broker.claim(10, 0, running, lambda queue: 0) == []
        running += await broker.claim(10, 0, running, lambda queue: 1)
        assert len(running) == 3


@pytest.mark.parametrize("level", LEVELS)
async def test_a_waiting_claim_wakes_at_once(broker_factory, ground, level):
    async with broker_factory("w", queues=("a", "b")) as broker, broker_factory() as producer:
        waits = []
        for n in range(5):
            claiming = asyncio.create_task(broker.claim(10, 5, ()))
            await eventually(ground.blocked)
            started = time.monotonic()
            await producer.publish([job(str(n), "b", level)])
            claims = await claiming
            waits.append(time.monotonic() - started)
            assert names(claims) == [str(n)]
            await broker.settle([done(claim) for claim in claims])
        # Most of them: on a busy machine one or two wait for the processor.
        assert sorted(waits)[2] < 0.1


async def test_a_claim_waits_no_longer_than_told(broker_factory):
    async with broker_factory("w") as broker:
        started = time.monotonic()
        assert await broker.claim(10, 0, ()) == []
        assert time.monotonic() - started < 0.1
        assert await broker.claim(10, 0.3, ()) == []
        assert 0.25 < time.monotonic() - started < 1.0


async def test_interrupt_ends_a_waiting_claim_and_all_later_waits(broker_factory, ground):
    async with broker_factory("w") as broker:
        claiming = asyncio.create_task(broker.claim(10, 5, ()))
        await eventually(ground.blocked)
        started = time.monotonic()
        await broker.interrupt()
        assert await claiming == []
        assert await broker.claim(10, 5, ()) == []
        assert time.monotonic() - started < 0.5
        await broker.interrupt()
        await broker.publish([job("x")])
        assert names(await broker.claim(10, 5, ())) == ["x"]


async def test_two_workers_never_get_the_same_job(broker_factory):
    async with broker_factory("one") as one_, broker_factory("two") as two:
        await one_.publish([job(str(n)) for n in range(200)])
        got: list[str] = []

        async def take(broker) -> None:
            held: list = []
            while claims := await broker.claim(7, 0, held):
                held += claims
                got.extend(names(claims))

        await asyncio.gather(take(one_), take(two))
        assert sorted(got, key=int) == [str(n) for n in range(200)]


@stream_only
async def test_an_entry_written_by_hand(broker_factory, raw):
    raw.xadd("stream:{q}", {"job": '{"payload":{"a":1}}'})  # before any worker was there
    async with broker_factory("w") as broker:
        raw.xadd("stream:{q}:high", {"other": "x", "job": '{"payload":{"a":2}}', "more": "y"})
        raw.xadd("stream:{q}:low", {"other": "x"})
        claims = await broker.claim(10, 0, ())
        assert [claim.body for claim in claims] == [b'{"payload":{"a":2}}', b'{"payload":{"a":1}}', None]
        assert [claim.epoch for claim in claims] == raw.hmget("stream:{q}:ids", "id:1", "id:2", "id:3")


async def test_a_paused_queue_is_passed_over(broker_factory, raw, ground):
    async with broker_factory("w", queues=("a", "q")) as broker:
        raw.hset("stream:{a}:meta", "paused", "1")
        await broker.publish([job("a", "a"), job("q", "q")])
        assert names(await broker.claim(10, 0, ())) == ["q"]
        claiming = asyncio.create_task(broker.claim(10, 5, ()))
        await eventually(ground.blocked)
        await broker.publish([job("a2", "a"), job("q2", "q")])
        assert names(await claiming) == ["q2"]
        raw.hdel("stream:{a}:meta", "paused")
        assert names(await broker.claim(10, 0, ())) == ["a", "a2"]


async def test_with_everything_paused_a_claim_still_ends(broker_factory, raw):
    async with broker_factory("w") as broker:
        raw.hset(META, "paused", "1")
        await broker.publish([job()])
        assert await broker.claim(10, 0.2, ()) == []
        claiming = asyncio.create_task(broker.claim(10, 30, ()))
        await broker.interrupt()
        assert await asyncio.wait_for(claiming, 3) == []


# -- groups and keys that go missing or are not ours


def wreck_key(raw):
    raw.delete(NORMAL)


def wreck_group(raw):
    raw.xgroup_destroy(NORMAL, GROUP)


def wreck_all(raw):
    raw.flushall()


def wreck_meta(raw):
    raw.delete(META)


WRECKS = [wreck_key, wreck_group, wreck_all, wreck_meta]


@stream_only
@pytest.mark.parametrize("wreck", WRECKS)
async def test_missing_groups_are_made_anew(broker_factory, raw, wreck):
    async with broker_factory("w", queues=("a", "q")) as broker:
        epoch, derived = raw.hget(META, "epoch"), raw.hget(IDS, "id:2")
        wreck(raw)
        raw.xadd(NORMAL, {"job": '{"id":"q","payload":{}}'})
        await broker.publish([job("a", "a")])
        claims = []
        for _ in range(3):
            claims += await broker.claim(10, 0, claims)
        assert sorted(names(claims)) == ["a", "q"]
        assert raw.hget(META, "epoch") not in (None, epoch)
        assert {claim.epoch for claim in claims if claim.queue == "q"} == {raw.hget(IDS, "id:2")}
        assert (raw.hget(IDS, "id:2") == derived) is (wreck is not wreck_all)


@stream_only
@pytest.mark.parametrize("wreck", WRECKS)
async def test_missing_groups_are_made_anew_while_waiting(broker_factory, raw, wreck, server, ground):
    async with broker_factory("w", queues=("a", "q")) as broker:
        claims: list = []

        async def claiming() -> None:
            while len(claims) < 2:
                claims.extend(await broker.claim(10, 5, claims))

        task = asyncio.create_task(claiming())
        await eventually(ground.blocked)
        wreck(raw)
        raw.xadd(NORMAL, {"job": '{"id":"q","payload":{}}'})
        raw.xadd("stream:{a}", {"job": '{"id":"a","payload":{}}'})
        # Redis 6.2 says nothing to a blocked reader, so that only the end of BLOCK (5 s) brings it on.
        await asyncio.wait_for(task, 8)
        assert sorted(names(claims)) == ["a", "q"]
        assert {claim.epoch for claim in claims if claim.queue == "q"} <= {raw.hget(IDS, "id:2")}


@stream_only
async def test_a_group_made_anew_delivers_what_was_there_again(broker_factory, raw, ground):
    async with broker_factory("w") as broker:
        await broker.publish([job("x"), job("y")])
        first = await broker.claim(10, 0, ())
        wreck_group(raw)
        second = await broker.claim(10, 0, ())
        assert names(second) == names(first)
        assert await broker.settle([done(claim) for claim in second]) != []
        assert ground.state()[NORMAL] == []


@pytest.mark.parametrize("wrong", LEVELS)
async def test_a_key_of_a_wrong_type_blinds_no_other_level(broker_factory, raw, ground, wrong):
    async with broker_factory("w", queues=("q", "b")) as broker:
        raw.delete(ground.place(wrong))
        raw.set(ground.place(wrong), "neither stream nor list")
        for level in LEVELS:
            if level != wrong:
                await broker.publish([job(level, "q", level)])
        await broker.publish([job("b", "b")])
        claims = []
        for _ in range(3):
            claims += await broker.claim(10, 0, claims)
        assert len(claims) == 3
        claiming = asyncio.create_task(broker.claim(10, 5, claims))
        await asyncio.sleep(0)
        await broker.publish([job("b2", "b")])
        assert names(await claiming) == ["b2"]
        ground.sweep_soon(broker)
        assert await broker.claim(10, 0, claims) == []


@stream_only
async def test_a_foreign_group_is_refused_at_the_start(broker_factory, raw):
    async with broker_factory() as broker:
        raw.xgroup_create(LOW, "others", mkstream=True)
        with pytest.raises(ConfigurationError, match=r"stream:\{q\}:low is also read by the group 'others'"):
            await broker.join("w")


async def test_a_worker_without_queues_is_refused(broker_factory):
    async with broker_factory(queues=()) as broker:
        with pytest.raises(ConfigurationError, match="no queue to work on"):
            await broker.join("w")


async def test_no_server_is_said_in_one_sentence(broker_factory):
    with pytest.raises(Unreachable, match="does not answer") as caught:
        async with broker_factory("w", url="redis://:secret@127.0.0.1:1/0"):
            pass
    assert "secret" not in str(caught.value)


@stream_only
async def test_namespaces_see_nothing_of_each_other(broker_factory, raw):
    async with broker_factory("w", namespace="ns:") as ours, broker_factory("w") as other:
        await ours.publish([job("x"), job("y", delay=0.0)])
        assert await other.claim(10, 0, ()) == []
        assert names(await ours.claim(10, 0, ())) == ["x", "y"]
        assert raw.exists("ns:stream:{q}:meta") and (await other.depth())[0].ready == 0


async def test_a_job_of_another_queue_than_its_bytes_say_is_taken_where_it_lies(broker_factory, ground):
    ground.push(json.dumps({"payload": {}, "queue_name": "other", "priority": "high"}), "low")
    async with broker_factory("w") as broker:
        claim = await one(broker)
        assert (claim.queue, claim.level) == ("q", "low")


# -- what only list mode has to promise


@list_only
async def test_what_producers_push_left_is_taken_from_the_right_with_every_byte(broker_factory, raw):
    bodies = [b' {"payload" : {"n":%d}, "\xc3\xa9":\t1E3 }' % n for n in range(3)] + [b"", b"{}", b"\xff\x00", b"[1]"]
    for body in bodies:
        raw.lpush("queue:q", body)
    raw.lpush("queue:q:high", '{"payload":{}}')
    async with broker_factory("w") as broker:
        claims = await broker.claim(100, 0, ())
        assert [claim.body for claim in claims] == [b'{"payload":{}}', *bodies]
        assert {claim.level for claim in claims[1:]} == {"normal"}
        held = raw.lrange("queue:q:claimed:w", 0, -1)
        assert [wrapper.split(b" ", 3)[3] for wrapper in held] == [b'{"payload":{}}', *bodies]
        assert not raw.exists("queue:q", "queue:q:high")


@list_only
async def test_identical_elements_are_different_jobs(broker_factory, raw):
    raw.lpush("queue:q", *['{"payload":{}}'] * 100)
    async with broker_factory("w") as broker:
        claims = await broker.claim(100, 0, ())
        ids = [codec.job_id(codec.read(claim.body), claim) for claim in claims]
        assert len(set(ids)) == 100 and all(UUID(each).version == 7 for each in ids)
        assert ids == sorted(ids)  # made by the server's clock, in the order in which they were taken
        assert await broker.settle([done(claim) for claim in claims[:50]]) == [Settled.SETTLED] * 50
        assert raw.llen("queue:q:claimed:w") == raw.zcard("stream:{q}:leases") == 50
        assert sorted(claim.entry for claim in await broker.own_pending(())) == sorted(
            claim.entry for claim in claims[50:]
        )


@list_only
async def test_namespaces_share_the_lists_and_nothing_else(broker_factory, raw):
    async with broker_factory("w", namespace="ns:") as ours, broker_factory("v") as other:
        await ours.publish([job("x"), job("y", delay=60.0)])
        assert raw.llen("queue:q") == 1 and raw.zcard("ns:stream:{q}:due") == 1
        assert names(await ours.claim(10, 0, ())) == ["x"]
        assert raw.llen("ns:queue:q:claimed:w") == raw.zcard("ns:stream:{q}:leases") == 1
        depth = (await other.depth())[0]
        assert (depth.ready, depth.running, depth.delayed) == (0, 0, 0)


@list_only
async def test_a_waiting_worker_is_woken_on_lists_it_did_not_know_of(broker_factory, raw):
    """The lists do not exist before the first job, and one bell per list waits for each of them."""
    async with broker_factory("w", queues=("a", "q")) as broker:
        claiming = asyncio.create_task(broker.claim(10, 5, ()))
        await eventually(lambda: sum("b" in client["flags"] for client in raw.client_list()) == 6)
        raw.lpush("queue:a:low", '{"id":"x","payload":{}}')
        assert names(await claiming) == ["x"]


@list_only
async def test_waiting_takes_nothing_whatever_becomes_of_the_connection(broker_factory, raw, ground):
    async with broker_factory("w") as broker:
        for n in range(10):
            claiming = asyncio.create_task(broker.claim(10, 5, ()))
            await eventually(lambda: len(ground.blocked()) == 3)
            with raw.pipeline(transaction=False) as pipe:
                pipe.lpush("queue:q", f'{{"id":"{n}","payload":{{}}}}')
                for client in ground.blocked():
                    pipe.client_kill_filter(_id=client["id"])
                pipe.execute(raise_on_error=False)
            claims = []
            with suppress(Unreachable):
                claims = await claiming
            while not claims:
                with suppress(Unreachable):
                    claims = await broker.claim(10, 0, ())
            assert names(claims) == [str(n)]
            assert await broker.settle([done(claim) for claim in claims]) == [Settled.SETTLED]


@list_only
@pytest.mark.parametrize("key", ["queue:q:high", "queue:q:claimed:w", "stream:{q}:leases", "stream:{q}:meta"])
async def test_a_key_of_a_wrong_type_is_said_at_the_start(broker_factory, raw, key):
    raw.set(key, "x")
    with pytest.raises(ConfigurationError, match=f"the key {re.escape(key)} is a string, not a"):
        async with broker_factory("w"):
            pass


@pytest.mark.parametrize("key", ["queue:a", "stream:{a}", "stream:{a}:meta", "stream:{a}:dead", "stream:{a}:fair"])
async def test_a_worker_starts_although_a_producer_has_spoilt_one_of_its_queues(broker_factory, raw, key):
    raw.set(key, "x")
    async with broker_factory("w", queues=("a", "b"), fair_weights=(("t", 2.0),)) as broker:
        await broker.publish([job("b", "b")])
        (claim,) = await broker.claim(10, 0, ())
        assert names([claim]) == ["b"]
        assert await broker.settle([done(claim)]) == [Settled.SETTLED]
        assert await broker.leave()


@stream_only
async def test_memory_that_is_full_at_the_start_is_no_error_of_the_configuration(broker_factory, raw):
    async with broker_factory("w"):
        raw.delete(*(f"stream:{{q}}{level}" for level in ("", ":high", ":low")))
    with out_of_memory(raw), pytest.raises(Unreachable, match="out of memory"):
        async with broker_factory("x"):
            pass


async def test_a_worker_all_of_whose_queues_are_spoilt_does_not_start(broker_factory, raw):
    for queue in "ab":
        raw.set(f"stream:{{{queue}}}:meta", "x")
    with pytest.raises(ConfigurationError, match="wrong type|not a hash"):
        async with broker_factory("w", queues=("a", "b")):
            pass


@list_only
@pytest.mark.parametrize("key", ["queue:a:claimed:w", "stream:{a}:leases", "stream:{a}:meta"])
async def test_a_key_of_a_wrong_type_blinds_no_other_queue(broker_factory, raw, key):
    async with broker_factory("w", queues=("a", "b")) as broker:
        await broker.publish([job("a", "a"), job("b", "b")])
        raw.delete(key)
        raw.set(key, "x")
        claims = await broker.claim(10, 0, ())
        claims += await broker.claim(10, 0.05, claims)
        assert names(claims) == ["b"]
        raw.delete(key)
        assert names(await broker.claim(10, 0, claims)) == ["a"]


async def test_list_mode_refuses_a_cluster_in_one_sentence():
    with pytest.raises(
        ConfigurationError, match="list mode cannot use the Redis Cluster at .* STREAMWORKER_MODE=stream"
    ):
        ListBroker(RedisAddress("redis+cluster://127.0.0.1:7000"), Options(queues=(("q", None),)))


@list_only
async def test_a_queue_named_like_what_a_worker_holds_is_refused(broker_factory):
    with pytest.raises(ConfigurationError, match=":claimed:"):
        async with broker_factory("w", queues=("a:claimed:b",)):
            pass


# -- ids of entries that have none


def wreck_ids(raw):
    raw.delete(IDS)


def wreck_group_and_meta(raw):
    raw.xgroup_destroy(NORMAL, GROUP)
    raw.delete(META)


def wreck_group_and_ids(raw):
    raw.xgroup_destroy(NORMAL, GROUP)
    raw.delete(IDS)


def wreck_an_empty_level(raw):
    raw.delete(LOW)


def wreck_other_groups(raw):
    raw.xgroup_destroy(LOW, GROUP)
    raw.xgroup_destroy(HIGH, GROUP)


KEPT = [
    wreck_group, wreck_meta, wreck_ids, wreck_group_and_meta, wreck_group_and_ids, wreck_an_empty_level, wreck_other_groups
]  # fmt: skip


def identity(claim):
    return codec.job_id(codec.read(claim.body), claim)


@stream_only
@pytest.mark.parametrize("wreck", KEPT)
@pytest.mark.parametrize("restarted", [False, True], ids=["by workers that run", "by workers started anew"])
async def test_an_identity_survives_whatever_is_deleted_around_the_entries(broker_factory, raw, wreck, restarted):
    async with broker_factory("a", lease=0.2) as one:
        raw.xadd(NORMAL, {"job": '{"payload":{"n":1}}'})
        raw.xadd(NORMAL, {"job": '{"payload":{"n":2}}'})
        (first,) = await one.claim(1, 0, ())
        wreck(raw)
        if not restarted:
            await one.claim(0, 0, ())
            await one.claim(1, 0, [first])  # heals; and takes the second one
        async with broker_factory("b", lease=0.2) as two:
            found = {}

            async def both() -> bool:
                found.update({claim.body: identity(claim) for claim in await two.claim(10, 0, ())})
                return len(found) == 2

            await eventually(both)
    assert found[first.body] == identity(first)
    assert len(set(found.values())) == 2
    assert codec.derived_id(NORMAL, raw.hget(IDS, "id:2"), first.entry) == identity(first)


@stream_only
async def test_what_ids_are_derived_from_is_remembered_by_who_runs_where_both_hashes_are_gone(broker_factory, raw):
    async with broker_factory("a") as broker:
        raw.xadd(NORMAL, {"job": '{"payload":{"n":1}}'})
        (first,) = await broker.claim(1, 0, ())
        raw.delete(META, IDS)
        raw.xadd(NORMAL, {"job": '{"payload":{"n":2}}'})
        (second,) = await broker.claim(1, 0, [first])
        assert second.epoch == first.epoch == raw.hget(IDS, "id:2") == raw.hget(META, "id:2")


@stream_only
@pytest.mark.parametrize("healed", [False, True], ids=["added before it is noticed", "added afterwards"])
@pytest.mark.parametrize("flushed", [False, True], ids=["a level deleted", "FLUSHALL"])
async def test_an_entry_id_that_comes_again_in_a_stream_made_anew_is_another_job(broker_factory, raw, healed, flushed):
    async with broker_factory("w") as broker:
        raw.xadd(NORMAL, {"job": '{"payload":{}}'}, id="1-1")
        raw.xadd(NORMAL, {"job": '{"payload":{}}'}, id="1-2")
        first = await broker.claim(2, 0, ())
        raw.flushall() if flushed else raw.delete(NORMAL)
        if healed:
            assert await broker.claim(1, 0, ()) == []
        raw.xadd(NORMAL, {"job": '{"payload":{}}'}, id="1-1")
        (second,) = await broker.claim(1, 0, ())
    assert second.entry == first[0].entry and identity(second) != identity(first[0])


@stream_only
async def test_a_queue_of_an_older_release_keeps_its_identities(broker_factory, raw):
    """They were derived from the epoch of the queue, and there is nothing yet that says so by level."""
    raw.xgroup_create(NORMAL, GROUP, "0", mkstream=True)
    raw.hset(META, "epoch", "old")
    raw.xadd(NORMAL, {"job": '{"payload":{}}'})
    async with broker_factory("w") as broker:
        (claim,) = await broker.claim(1, 0, ())
    assert identity(claim) == codec.derived_id(NORMAL, b"old", claim.entry)


@list_only
async def test_an_identity_in_a_list_survives_too(broker_factory, raw):
    """It is written beside the element when it is first taken."""
    async with broker_factory("a", lease=0.3) as one:
        raw.lpush("queue:q", '{"payload":{}}')
        (first,) = await one.claim(1, 0, ())
        raw.delete(META)
        async with broker_factory("b", lease=0.3) as two:
            claims = []

            async def again() -> bool:
                claims.extend(await two.claim(1, 0, ()))
                return bool(claims)

            await eventually(again)
    assert identity(claims[0]) == identity(first)
