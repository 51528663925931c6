"""Leases: who keeps a claim, who gets it after a death, and what a job that kills its workers may still do."""

import asyncio
import time
from collections import Counter
from contextlib import contextmanager

import anyio
import msgspec
import pytest

from streamworker import codec
from streamworker.codec import unmarked
from streamworker.errors import Unreachable
from streamworker.job import Settled
from streamworker.policy import group_sizes, half_of
from tests.conftest import Server, eventually, free_port
from tests.contract.ground import GROUP
from tests.contract.helpers import (
    ENDINGS,
    LEVELS,
    META,
    NORMAL,
    dead,
    done,
    job,
    list_only,
    names,
    one,
    recover,
    release,
    settle_one,
    stream_only,
)
from tests.crash.clock import Clock

ALONE = 4
"""The delivery from which on a suspect runs apart; alone in the groups of these brokers."""


async def test_renewing_resets_the_lease_and_counts_no_delivery(broker_factory, ground):
    async with broker_factory("w", queues=("a", "q")) as broker:
        await broker.publish([job(level=level) for level in ("high", "normal", "low")] + [job(queue="a")])
        claims = await broker.claim(10, 0, ())
        for claim in claims:
            ground.ripen(claim, 100_000)
            assert ground.idle(claim) >= 100_000
        assert await broker.renew(claims) == []
        for claim in claims:
            assert ground.idle(claim) < 1000
            assert ground.owner(claim) == (b"w", 1)
        assert await broker.renew([]) == []


async def test_renewing_never_steals_and_names_what_is_lost(broker_factory, raw, ground):
    async with broker_factory("w") as broker:
        await broker.publish([job(str(n)) for n in range(5)])
        mine, stolen, recounted, finished, _ = claims = await broker.claim(10, 0, ())
        ground.hand_over(stolen, "rescuer", idle=5000)
        ground.hand_over(recounted, "w", count=2)
        ground.finish(finished)
        lost = await broker.renew(claims)
        assert {claim.entry for claim in lost} == {stolen.entry, recounted.entry, finished.entry}
        assert ground.owner(stolen)[0] == b"rescuer" and ground.idle(stolen) >= 5000
        assert ground.owner(mine) == (b"w", 1)


async def test_renewing_many_and_after_everything_was_flushed(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job() for _ in range(1200)])
        claims = await broker.claim(2000, 0, ())
        assert await broker.renew(claims) == []
        raw.flushall()
        assert len(await broker.renew(claims)) == 1200


async def test_a_dead_workers_jobs_come_after_the_lease_and_not_before(broker_factory, ground):
    async with broker_factory("dead", lease=0.5) as gone, broker_factory("w", lease=0.5) as broker:
        await gone.publish([job(str(n), level=level) for n, level in enumerate(("high", "normal", "low"))])
        claims = await gone.claim(10, 0, ())
        taken = time.monotonic()
        got: list = []

        async def rescued() -> bool:
            got.extend(await broker.claim(10, 0.05, got))
            return len(got) == 3

        await eventually(rescued, 3)
        assert 0.45 <= time.monotonic() - taken <= 1.5
        assert sorted(names(got)) == ["0", "1", "2"]
        assert all(claim.count == 2 and not claim.suspect for claim in got)
        assert {(claim.level, claim.place) for claim in got} == {(level, ground.place(level)) for level in LEVELS}
        assert [claim.body for claim in sorted(got, key=lambda c: names([c]))] == [
            c.body for c in sorted(claims, key=lambda c: names([c]))
        ]
        assert await gone.settle([done(claim) for claim in claims]) == [Settled.LOST] * 3
        assert await broker.settle([done(claim) for claim in got]) == [Settled.SETTLED] * 3


async def test_a_renewed_claim_is_nobodys_orphan(broker_factory, raw):
    async with broker_factory("slow", lease=0.3) as slow, broker_factory("w", lease=0.3) as broker:
        await slow.publish([job("x")])
        claim = await one(slow)
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            assert await slow.renew([claim]) == []
            assert await broker.claim(10, 0.02, ()) == []
        assert await settle_one(slow, done(claim)) is Settled.SETTLED


async def test_what_runs_here_is_never_claimed_again(broker_factory, ground):
    async with broker_factory("w") as broker:
        await broker.publish([job(str(n), level=level) for n in range(5) for level in ("high", "low")])
        claims = await broker.claim(100, 0, ())
        for claim in claims:
            ground.ripen(claim)
        assert await recover(broker, ground, running=claims) == []
        assert all(ground.owner(claim) == (b"w", 1) for claim in claims)
        for claim in claims:
            ground.ripen(claim)
        again = await recover(broker, ground, running=claims[:4])
        assert sorted(names(again)) == sorted(names(claims[4:]))


async def test_no_more_orphans_than_slots(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job(str(n)) for n in range(20)])
        for claim in await gone.claim(100, 0, ()):
            ground.ripen(claim)
        got: list = []
        for _ in range(7):
            new = await recover(broker, ground, limit=3, running=got)
            assert len(new) <= 3
            got += new
        assert sorted(names(got), key=int) == [str(n) for n in range(20)]


async def test_caps_hold_for_orphans(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w", queues=(("q", 2),)) as broker:
        await gone.publish([job() for _ in range(5)])
        for claim in await gone.claim(100, 0, ()):
            ground.ripen(claim)
        got = await recover(broker, ground)
        assert len(got) == 2
        assert await recover(broker, ground, running=got) == []


async def test_one_sweep_at_a_time_for_the_whole_fleet(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("one") as first, broker_factory("two") as second:
        await gone.publish([job("x")])
        claim = await one(gone)
        assert await recover(first, ground) == []  # takes the token: nothing is ripe for a while
        ground.hand_over(claim, "dead", idle=10_000_000)
        ground.sweep_soon(second)
        assert await second.claim(10, 0, ()) == []
        assert names(await recover(second, ground)) == ["x"]


async def test_an_orphan_deep_in_a_long_list_of_busy_ones_is_found(broker_factory, ground):
    async with broker_factory("busy") as busy, broker_factory("w") as broker:
        await busy.publish([job(str(n)) for n in range(5000)])
        claims: list = []
        while new := await busy.claim(1000, 0, claims):
            claims += new
        assert len(claims) == 5000
        orphans = [claims[0], claims[2500], claims[4999]]
        for claim in orphans:
            ground.hand_over(claim, "dead", idle=10_000_000)
        got: list = []
        for _ in range(60):
            got += await recover(broker, ground, limit=2, running=got)
            if len(got) == 3:
                break
        assert sorted(names(got), key=int) == ["0", "2500", "4999"]
        owners = {entry: (owner, count) for entry, owner, count in ground.claims("q")}
        left = [claim for claim in claims if claim not in orphans]
        assert all(owners[claim.entry] == (b"busy", 1) for claim in left)


@stream_only
async def test_an_orphan_deleted_underneath_is_acknowledged(broker_factory, raw, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("x"), job("y")])
        first, second = await gone.claim(10, 0, ())
        ground.ripen(first)
        ground.ripen(second)
        raw.xdel(NORMAL, first.entry)
        assert names(await recover(broker, ground)) == ["y"]
        assert [entry["message_id"] for entry in raw.xpending_range(NORMAL, GROUP, "-", "+", 10)] == [second.entry]


async def test_an_orphan_keeps_the_id_it_had(broker_factory, raw, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        ground.push('{"payload":{}}')
        claim = await one(gone)
        ground.ripen(claim)
        (again,) = await recover(broker, ground)
        reading = codec.read(b'{"payload":{}}')
        assert codec.job_id(reading, again) == codec.job_id(reading, claim)


# -- jobs that kill their workers


async def test_a_suspect_is_reserved_counted_when_confirmed_and_alone(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("poison"), job("innocent")])
        poison, innocent = await gone.claim(10, 0, ())
        ground.ripen(poison, count=ALONE - 1)
        ground.ripen(innocent)
        (other,) = await recover(broker, ground)  # nothing comes beside a suspect, and it beside nothing
        assert names([other]) == ["innocent"] and other.count == 2 and not other.suspect
        assert await settle_one(broker, done(other)) is Settled.SETTLED
        (reserved,) = await recover(broker, ground)
        assert names([reserved]) == ["poison"] and reserved.suspect and reserved.count == ALONE - 1
        assert ground.owner(reserved) == (b"w", ALONE - 1)
        assert await broker.renew([reserved]) == []
        confirmed = await broker.confirm(reserved)
        assert confirmed is not None and not confirmed.suspect and confirmed.count == ALONE
        assert ground.owner(confirmed) == (b"w", ALONE)
        assert await broker.confirm(reserved) is None  # once
        assert await settle_one(broker, done(reserved)) is Settled.LOST
        assert await settle_one(broker, done(confirmed)) is Settled.SETTLED


async def test_one_suspect_at_a_time_the_others_stay_ripe_and_uncounted(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker, broker_factory("two") as second:
        await gone.publish([job(str(n)) for n in range(4)])
        claims = await gone.claim(10, 0, ())
        for claim in claims:
            ground.ripen(claim, count=ALONE - 1)
        reserved = await recover(broker, ground)
        assert len(reserved) == 1 and reserved[0].suspect
        assert await recover(broker, ground, running=reserved) == []
        others = await recover(second, ground)
        assert len(others) == 1 and others[0].suspect and names(others) != names(reserved)
        assert {ground.deliveries(claim) for claim in claims} == {ALONE - 1}


async def suspects_and_a_job(broker, ground, owner):
    """Two suspects of a dead worker, and a claim that ``owner`` runs; the suspects lie ripe."""
    await broker.publish([job(str(n)) for n in range(3)])
    first, second, mine = await broker.claim(10, 0, ())
    ground.hand_over(mine, owner)
    for claim in (first, second):
        ground.ripen(claim, count=ALONE - 1)
    return mine


async def ripe_suspects(broker, ground, count):
    """Suspects of a dead worker that run apart; they lie ripe."""
    await broker.publish([job(str(n)) for n in range(count)])
    for claim in await broker.claim(count, 0, ()):
        ground.ripen(claim, count=ALONE - 1)


async def eventually_claimed(broker, limit=1):
    deadline = time.monotonic() + 10
    while not (claims := await broker.claim(limit, 0.02, ())):
        assert time.monotonic() < deadline
    return claims


async def first_turn(broker):
    """The turn of new jobs, with which every worker begins, is over: there are none."""
    assert await broker.claim(1, 0, ()) == []


async def until_it_drains(broker, running):
    """Claim until new jobs are left alone."""
    deadline = time.monotonic() + 10
    while not broker._source.draining:
        assert time.monotonic() < deadline
        assert await broker.renew(running) == []
        assert not any(claim.suspect for claim in await broker.claim(1, 0.02, running))


async def test_a_busy_worker_leaves_suspects_to_idle_ones_and_only_then_drains(broker_factory, ground):
    """What it drains for is nobody's meanwhile: whoever is idle first takes it."""
    async with (
        broker_factory("dead", lease=1) as gone,
        broker_factory("busy", lease=1) as busy,
        broker_factory("idle", lease=1) as idle_one,
    ):
        await first_turn(idle_one)
        await first_turn(busy)
        mine = await suspects_and_a_job(gone, ground, "busy")
        assert await recover(busy, ground, running=[mine]) == [] and not busy._source.draining
        await gone.publish([job("new")])
        assert names(await busy.claim(1, 0, [mine])) == ["new"]  # it does not drain at once
        await until_it_drains(busy, [mine])
        await gone.publish([job("newer")])
        assert await busy.claim(1, 0, [mine]) == []
        (taken,) = await recover(idle_one, ground)  # and nothing new beside it, which it would have to wait for
        assert taken.suspect
        assert await settle_one(busy, done(mine)) is Settled.SETTLED
        (other,) = await recover(busy, ground)  # idle at last
        assert other.suspect and names([other]) != names([taken])
        for broker, claim in ((idle_one, taken), (busy, other)):
            counted = await broker.confirm(claim)
            assert counted is not None and await settle_one(broker, done(counted)) is Settled.SETTLED
        assert names(await recover(busy, ground)) == ["newer"] and not busy._source.draining


async def test_only_one_worker_drains_and_another_one_follows_when_it_dies(broker_factory, ground):
    async with (
        broker_factory("dead", lease=1) as gone,
        broker_factory("one", lease=1) as one_,
        broker_factory("two", lease=1) as two,
    ):
        await first_turn(one_)
        await first_turn(two)
        await gone.publish([job("others")])
        other = await one(two)
        mine = await suspects_and_a_job(gone, ground, "one")
        assert await recover(one_, ground, running=[mine]) == []
        await until_it_drains(one_, [mine])
        for part in getattr(two._source, "_parts", [two._source]):
            part._passing_since = [time.monotonic() - 60]
        for _ in range(3):  # both ask, and the first one has the word
            assert await recover(one_, ground, running=[mine]) == [] and one_._source.draining
            assert await recover(two, ground, running=[other]) == [] and not two._source.draining
        await until_it_drains(two, [other])  # "one" asks no more


async def test_nobody_drains_for_what_somebody_else_has_taken(broker_factory, ground):
    async with (
        broker_factory("dead", lease=1) as gone,
        broker_factory("busy", lease=1) as busy,
        broker_factory("idle", lease=1) as idle_one,
        broker_factory("third", lease=1) as third,
    ):
        mine = await suspects_and_a_job(gone, ground, "busy")
        await until_it_drains(busy, [mine])
        for broker in (idle_one, third):
            (taken,) = await recover(broker, ground)
            counted = await broker.confirm(taken)
            assert counted is not None and await settle_one(broker, done(counted)) is Settled.SETTLED
        await gone.publish([job("new")])
        assert names(await recover(busy, ground, running=[mine])) == ["new"]


async def test_an_idle_worker_runs_one_suspect_after_the_other_before_anything_new(broker_factory, ground, monkeypatch):
    monkeypatch.setattr("streamworker.broker.claim.TURN", 60.0)
    async with broker_factory("dead", lease=1) as gone, broker_factory("w", lease=1) as broker:
        await ripe_suspects(gone, ground, 4)
        taken = await recover(broker, ground)
        await gone.publish([job("new")])
        deadline = time.monotonic() + 10
        while len(taken) < 5:
            assert time.monotonic() < deadline
            counted = await broker.confirm(taken[-1])
            assert counted is not None and await settle_one(broker, done(counted)) is Settled.SETTLED
            taken += await eventually_claimed(broker, 10)
        assert sorted(names(taken)[:4]) == ["0", "1", "2", "3"] and names(taken)[4] == "new"


async def test_new_jobs_come_before_the_suspects_of_a_fleet_that_dies_again_and_again(broker_factory, ground):
    """One producer's jobs kill each worker that begins with them: another queue's jobs must not wait for the last one."""
    both = {"queues": ("q", "other"), "lease": 60}
    async with broker_factory("dead", **both) as gone:
        await ripe_suspects(gone, ground, 30)
        await gone.publish([job(f"new {n}", "other") for n in range(10)])
    for life in range(10):
        async with broker_factory(f"w{life}", **both) as broker:
            (first,) = await recover(broker, ground, limit=1)
            assert names([first]) == [f"new {life}"]
            if life == 9:
                assert await settle_one(broker, done(first)) is Settled.SETTLED
                (suspect,) = await eventually_claimed(broker)
                assert suspect.suspect  # without new jobs no turn is kept


async def test_suspects_and_new_jobs_take_turns(broker_factory, ground, monkeypatch):
    """An endless row of suspects does not keep an idle worker for itself."""
    monkeypatch.setattr("streamworker.broker.claim.TURN", 0.1)
    async with broker_factory("dead", lease=60) as gone, broker_factory("w", lease=60) as broker:
        await ripe_suspects(gone, ground, 40)
        turns = [False]  # new jobs begin
        while turns != [False, True, False, True]:
            await gone.publish([job("new")])
            (taken,) = await eventually_claimed(broker)
            if taken.suspect != turns[-1]:
                turns.append(taken.suspect)
            counted = await broker.confirm(taken) if taken.suspect else taken
            await anyio.sleep(0.01)  # it runs
            assert await settle_one(broker, done(counted)) is Settled.SETTLED


async def test_a_pause_ends_the_draining(broker_factory, raw, ground):
    """What is paused is not looked at, and nothing else shall wait for it."""
    async with broker_factory("dead", lease=1) as gone, broker_factory("w", queues=("q", "a"), lease=1) as broker:
        mine = await suspects_and_a_job(gone, ground, "w")
        await until_it_drains(broker, [mine])
        raw.hset("stream:{q}:meta", "paused", "1")
        await gone.publish([job("new", "a")])
        await until(broker, [mine], "new")


async def until(broker, running, name):
    """Claim until this job comes."""
    deadline = time.monotonic() + 10
    while names(await broker.claim(1, 0.02, running)) != [name]:
        assert time.monotonic() < deadline


async def test_a_suspect_beyond_its_deliveries_ends_by_what_was_read(broker_factory, raw, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("poison")])
        ground.ripen(await one(gone), count=5)
        (reserved,) = await recover(broker, ground)
        assert reserved.suspect and reserved.count == 5
        assert await settle_one(broker, dead(reserved, "worker died 5 times")) is Settled.SETTLED
        ((_, letter),) = raw.xrange("stream:{q}:dead")
        assert letter[b"deliveries"] == b"5"


async def test_a_reserved_suspect_may_be_handed_back(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("poison")])
        ground.ripen(await one(gone), count=3)
        (reserved,) = await recover(broker, ground)
        assert await settle_one(broker, release(reserved)) is Settled.SETTLED
        assert await broker.leave()


async def test_a_suspect_that_was_lost_is_not_confirmed(broker_factory, raw, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("poison"), job("deleted")])
        for claim in await gone.claim(10, 0, ()):
            ground.ripen(claim, count=ALONE - 1)
        (reserved,) = await recover(broker, ground)
        ground.hand_over(reserved, "rescuer")
        before = ground.state()
        assert await broker.confirm(reserved) is None
        assert ground.state() == before
        raw.flushall()
        assert await broker.confirm(reserved) is None


# -- replies that were lost


async def test_strays_are_what_is_ours_without_our_knowing(broker_factory, ground):
    async with broker_factory("w", queues=("a", "q")) as broker, broker_factory("other") as other:
        await broker.publish([job("held"), job("lost"), job("gone"), job("low", level="low"), job("a", "a")])
        claims = {names([claim])[0]: claim for claim in await broker.claim(10, 0, ())}
        await other.publish([job("others")])
        await one(other)
        ground.finish(claims["gone"])
        found = await broker.own_pending([claims["held"]])
        assert sorted(names(found)) == ["a", "lost", "low"]
        for claim in found:
            assert claim == claims[names([claim])[0]]
        assert await broker.settle([done(claim) for claim in found]) == [Settled.SETTLED] * 3
        assert await broker.own_pending([claims["held"]]) == []
        assert await settle_one(broker, done(claims["held"])) is Settled.SETTLED
        assert await broker.own_pending(()) == []


@stream_only
async def test_after_a_lost_reply_nothing_stays_behind(broker_factory, raw, ground):
    """The connection is cut while a claim waits and entries arrive: whatever the server gave away is found again."""
    async with broker_factory("w") as broker:
        for round_ in range(20):
            claiming = asyncio.create_task(broker.claim(10, 5, ()))
            await eventually(ground.blocked)
            (reader,) = (client["id"] for client in ground.blocked())
            with raw.pipeline(transaction=False) as pipe:
                ground.push(f'{{"id":"{round_}","payload":{{}}}}', client=pipe)
                pipe.client_kill_filter(_id=reader)
                pipe.execute()
            try:
                claims = await claiming
            except Exception:
                claims = await broker.own_pending(()) or await broker.claim(10, 0, ())
            assert names(claims) == [str(round_)]
            assert await broker.settle([done(claim) for claim in claims]) == [Settled.SETTLED]


# -- coming and going


async def test_leave_deletes_the_consumer_and_its_heartbeat(broker_factory, raw, ground):
    async with broker_factory("w", queues=("a", "q")) as broker:
        await broker.publish([job(), job(queue="a")])
        await broker.beat({"hostname": "h", "pid": 1})
        assert raw.hget("streamworker:worker:w", "hostname") == b"h"
        assert 0 < raw.pttl("streamworker:worker:w") <= 15_000
        claims = await broker.claim(10, 0, ())
        await broker.settle([done(claim) for claim in claims])
        assert await broker.leave()
        assert ground.names() == ground.names("a") == []
        assert not raw.exists("streamworker:worker:w")


@pytest.mark.parametrize("level", ["high", "normal", "low"])
async def test_leave_never_deletes_a_consumer_with_pending_entries(broker_factory, ground, level):
    async with broker_factory("w") as broker:
        await broker.publish([job("x", level=level)])
        claim = await one(broker)
        before = ground.state()
        assert not await broker.leave()
        assert ground.state() == before
        assert await settle_one(broker, done(claim)) is Settled.SETTLED
        assert await broker.leave()


async def test_leaving_what_is_gone_is_no_error(broker_factory, raw):
    async with broker_factory("w") as broker:
        raw.flushall()
        assert await broker.leave()


@stream_only
async def test_the_cursor_of_a_sweep_outlives_its_worker(broker_factory, raw, ground):
    async with broker_factory("w") as broker:
        await broker.publish([job()])
        await recover(broker, ground)
        assert raw.hkeys(META)


# -- what only list mode has to promise


@list_only
async def test_what_a_dead_worker_held_is_back_at_the_right_end_in_order(broker_factory, raw, ground):
    """Whoever looks gives it back, though he has no slot free; it comes before all that waits."""
    async with broker_factory("one") as first, broker_factory("two") as second, broker_factory("w") as broker:
        bodies = [f'{{"id":"{n}","payload":{{}}}}'.encode() for n in range(8)]
        for body in bodies:
            ground.push(body)
        claims = [*await first.claim(2, 0, ()), *await second.claim(2, 0, ()), *await first.claim(2, 0, ())]
        assert names(claims) == ["0", "1", "2", "3", "4", "5"]
        for claim in claims:
            ground.ripen(claim)
        ground.sweep_soon(broker)
        await broker.promote()
        assert ground.held() == 0 and raw.zcard("stream:{q}:leases") == 0
        waiting = list(reversed(raw.lrange("queue:q", 0, -1)))
        assert [codec.read(element).id for element in waiting] == [str(n) for n in range(8)]
        secret = raw.hget(META, "secret")
        assert [unmarked(element, secret)[0] for element in waiting] == bodies
        again = await broker.claim(10, 0, ())
        assert names(again) == [str(n) for n in range(8)]
        assert [claim.entry for claim in again[:6]] == [claim.entry for claim in claims]
        assert [claim.body for claim in again] == bodies
        assert [claim.count for claim in again] == [2] * 6 + [1] * 2


@list_only
@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b" { } ",
        b"",
        b"[]",
        b"no json",
        b"\xff\x00{",
        b'{"a":1',
        b' \n{ "id":"x","payload":{}}',
        b'{"payload":{}}',
    ],
)
async def test_bytes_survive_a_death_whatever_they_are(broker_factory, ground, body):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        ground.push(body)
        claim = await one(gone)
        ground.ripen(claim)
        (again,) = await recover(broker, ground)
        assert again.body == body
        if b'"' in body:
            assert (again.entry, again.count) == (claim.entry, 2)


@list_only
async def test_a_mark_that_is_not_ours_is_bytes_like_any_other(broker_factory, ground):
    odd = [b'{"streamworker":{"id":"x","deliveries":1},"payload":{}}', b'{"streamworker":1,"payload":{}}']
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        for body in odd:
            ground.push(body)
        claims = await gone.claim(10, 0, ())
        assert [(claim.body, claim.count) for claim in claims] == [(body, 1) for body in odd]
        for claim in claims:
            ground.ripen(claim)
        assert [(claim.body, claim.count) for claim in await recover(broker, ground)] == [(body, 2) for body in odd]


@list_only
async def test_copies_of_one_returned_element_run_one_after_the_other(broker_factory, raw, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        ground.push('{"payload":{}}')
        ground.ripen(await one(gone))
        ground.sweep_soon(broker)
        await broker.promote()
        (element,) = raw.lrange("queue:q", 0, -1)
        raw.rpush("queue:q", element)
        claims = await broker.claim(10, 0, ())
        assert len(claims) == 1 and await broker.claim(10, 0.05, claims) == []
        assert await settle_one(broker, done(claims[0])) is Settled.SETTLED
        assert await settle_one(broker, done(await one(broker))) is Settled.SETTLED
        assert ground.left() == 0


@list_only
async def test_what_runs_here_waits_for_others_when_it_was_given_back(broker_factory, raw, ground):
    async with broker_factory("hung") as hung, broker_factory("w") as broker:
        await hung.publish([job("x"), job("y")])
        claim = await one(hung)
        ground.ripen(claim)
        ground.sweep_soon(broker)
        await broker.promote()
        assert names(await hung.claim(10, 0, [claim])) == ["y"]
        assert await hung.claim(10, 0.05, [claim]) == []
        (again,) = await broker.claim(10, 0, ())
        assert (again.entry, again.count) == (claim.entry, 2)
        assert await settle_one(hung, done(claim)) is Settled.LOST
        assert await settle_one(broker, done(again)) is Settled.SETTLED


@list_only
async def test_leases_that_were_deleted_are_made_anew_for_what_is_held(broker_factory, raw, ground):
    async with broker_factory("w") as broker:
        await broker.publish([job("x")])
        claim = await one(broker)
        raw.delete("stream:{q}:leases")
        assert await broker.renew([claim]) == []
        assert ground.idle(claim) < 1000
        raw.delete("queue:q:claimed:w")
        ground.raw.zadd("stream:{q}:leases", {f"{claim.entry.decode()} 1 w": 1})
        assert await recover(broker, ground) == []  # a lease without a job ends
        assert not raw.exists("stream:{q}:leases")


@list_only
async def test_a_thousand_orphans_come_back_in_order(broker_factory, raw, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job(str(n)) for n in range(1203)])
        claims = await gone.claim(2000, 0, ())
        raw.zadd("stream:{q}:leases", dict.fromkeys(raw.zrange("stream:{q}:leases", 0, -1), 1))
        got = await recover(broker, ground, limit=2000)
        assert names(got) == names(claims) and {claim.count for claim in got} == {2}


@list_only
async def test_nothing_new_comes_beside_a_suspect(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await first_turn(broker)
        await gone.publish([job("poison")])
        ground.ripen(await one(gone), count=ALONE - 1)
        await gone.publish([job("new")])
        (reserved,) = await recover(broker, ground)
        assert reserved.suspect and names([reserved]) == ["poison"]
        assert await broker.settle([done(reserved)]) == [Settled.SETTLED]
        assert names(await broker.claim(10, 0, ())) == ["new"]


@list_only
async def test_leases_of_a_future_that_was_taken_back_begin_now(broker_factory, raw, ground):
    """The server's clock was put back: what was renewed before that would not age for an hour."""
    async with broker_factory("dead", lease=1) as gone, broker_factory("w", lease=1) as broker:
        await gone.publish([job("x")])
        claim = await one(gone)
        ground.hand_over(claim, "dead", idle=-3_600_000)
        assert await recover(broker, ground) == []
        assert 0 <= ground.idle(claim) < 1000
        ground.hand_over(claim, "dead", idle=1000)
        assert names(await recover(broker, ground)) == ["x"]


READONLY = "READONLY|not the master any more"
"""What a demoted master is found out by: its own word, or Sentinel's client's."""


@list_only
@pytest.mark.parametrize("forgotten", ["claims", "nothing"])
async def test_a_replica_never_calls_a_claim_of_a_list_lost(broker_factory, raw, ground, forgotten):
    """A demoted master answers from its past, perhaps from somebody else's: that is READONLY, whatever it knows."""
    async with broker_factory("w", lease=30) as broker:
        await broker.publish([job(str(n)) for n in range(5)])
        claims = await broker.claim(4, 0, ())
        if forgotten == "claims":
            raw.delete("queue:q:claimed:w", "stream:{q}:leases")
        raw.replicaof("127.0.0.1", free_port())
        try:
            with pytest.raises(Unreachable, match=READONLY):
                await broker.renew(claims)
            for ending in ENDINGS.values():
                with pytest.raises(Unreachable, match=READONLY):
                    await broker.settle([ending(claim) for claim in claims])
            with pytest.raises(Unreachable, match=READONLY):
                await broker.confirm(claims[0])
            with pytest.raises(Unreachable, match=READONLY):
                await broker.claim(1, 0, claims)
            with pytest.raises(Unreachable, match=READONLY):
                await broker.leave()
        finally:
            raw.replicaof("NO", "ONE")
        lost = await broker.renew(claims)
        assert sorted(map(repr, lost)) == sorted(map(repr, claims if forgotten == "claims" else []))


def halves_of(claims, delivery: int) -> Counter:
    return Counter(half_of(claim.entry, delivery) for claim in claims)


async def test_most_suspects_were_neighbours_and_run_by_halves_in_half_of_the_slots(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job(f"s{n}") for n in range(24)])
        suspects = await gone.claim(24, 0, ())
        for claim in suspects:
            ground.ripen(claim, count=2)
        await gone.publish([job(f"fresh{n}") for n in range(20)])
        taken = await recover(broker, ground, limit=10)
        group = [claim for claim in taken if claim.count == 3]
        ((half, size),) = halves_of(group, 3).items()
        assert len(taken) == 10 and size == min(5, halves_of(suspects, 3)[half])  # fresh jobs go on beside
        assert {name[:5] for name in names([claim for claim in taken if claim.count == 1])} == {"fresh"}
        assert not any(claim.suspect for claim in taken)
        everything, halves = taken, [half]
        while left := [claim for claim in everything if claim.count == 3]:
            assert len(halves_of(left, 3)) == 1 and len(left) <= 5  # never one beside the other
            halves += halves_of(left, 3)
            assert await settle_one(broker, done(left[0])) is Settled.SETTLED
            everything.remove(left[0])
            everything += await recover(broker, ground, limit=10 - len(everything), running=everything)
        assert set(halves) == set(halves_of(suspects, 3))
        assert not [claim for claim in ground.claims() if claim[2] > 1]


async def test_a_suspect_that_runs_for_longer_than_a_lease_keeps_the_other_half_no_longer(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w", groups=(50, 1)) as broker:
        await gone.publish([job(f"s{n}") for n in range(24)])
        for claim in await gone.claim(24, 0, ()):
            ground.ripen(claim, count=2)
        first = await recover(broker, ground)
        assert len(halves_of(first, 3)) == 1 and len(first) < 24
        assert await recover(broker, ground, running=first) == []
        for source in getattr(broker._source, "_parts", [broker._source]):  # of a cluster, one for each slot
            source._half_since = time.monotonic() - 16  # its lease is 15 s
        assert len(await recover(broker, ground, running=first)) == 24 - len(first)


async def test_from_the_fourth_delivery_on_a_small_group_of_one_half_runs_apart(broker_factory, raw, ground):
    async with broker_factory("dead") as gone, broker_factory("w", groups=group_sizes(6, 100)) as broker:
        assert group_sizes(6, 100) == (50, 14, 4, 1)
        await first_turn(broker)
        await gone.publish([job(f"s{n}") for n in range(60)])
        suspects = await gone.claim(60, 0, ())
        for claim in suspects:
            ground.ripen(claim, count=3)
        seen: list = []
        await gone.publish([job("new")])
        while len(seen) < 60:
            group = await recover(broker, ground)
            ((half, size),) = halves_of(group, 4).items()
            waiting = [claim for claim in suspects if claim.entry not in {each.entry for each in seen}]
            assert size == min(14, halves_of(waiting, 4)[half])
            assert all(claim.suspect and claim.count == 3 for claim in group)
            counted = [await broker.confirm(claim) for claim in group]
            strays = {claim.entry: claim for claim in await broker.own_pending(())}  # a reply was lost
            assert [(strays[claim.entry].count, strays[claim.entry].suspect) for claim in group] == [(4, False)] * size
            assert await broker.settle([done(claim) for claim in counted]) == [Settled.SETTLED] * size
            seen += group
        assert names(await recover(broker, ground)) == ["new"]


@pytest.mark.parametrize("deliveries", [5, 10])
async def test_a_poison_job_is_found_by_halving_and_no_innocent_is_charged_to_death(broker_factory, ground, deliveries):
    """Forty innocents, one poison, one worker at a time, which dies with all it holds once the poison starts."""
    groups = group_sizes(deliveries, 100)
    async with broker_factory("producer") as producer:
        await producer.publish([job("poison" if n == 17 else str(n)) for n in range(41)])
    letters, charged, beside, turn = 0, Counter(), {}, 0
    for death in range(deliveries + 1):
        alive = True
        async with broker_factory(f"w{death}", groups=groups) as broker:
            while alive and ground.left():
                turn += 1
                held = await recover(broker, ground)
                assert held or turn < 500
                counted = [await broker.confirm(claim) if claim.suspect else claim for claim in held]
                charged |= Counter({name: claim.count for name, claim in zip(names(held), counted, strict=True)})
                poison = [claim for claim in counted if names([claim]) == ["poison"]]
                if poison and poison[0].count > deliveries:
                    assert len(counted) == 1
                    assert await settle_one(broker, dead(poison[0])) is Settled.SETTLED
                    letters += 1
                elif poison:
                    alive, beside[death + 1] = False, len(counted) - 1
                    for claim in counted:
                        ground.ripen(claim)
                else:
                    assert await broker.settle([done(claim) for claim in counted]) == [Settled.SETTLED] * len(counted)
    assert letters == 1 and not ground.left()
    assert beside[1] == beside[2] == 40 and beside[3] < 40 and beside[deliveries] == 0
    for death in range(4, deliveries + 1):
        assert beside[death] < ([*groups, *[1] * deliveries][death - 3])
    assert max(charged[str(n)] for n in range(41) if n != 17) <= deliveries


async def test_a_worker_with_one_slot_runs_suspects_one_by_one_beside_nothing(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job(f"s{n}") for n in range(3)])
        for claim in await gone.claim(3, 0, ()):
            ground.ripen(claim, count=2)
        for _ in range(3):
            (claim,) = await recover(broker, ground, limit=1)
            assert claim.count == 3
            assert await settle_one(broker, done(claim)) is Settled.SETTLED


async def test_suspects_that_ended_and_cannot_be_settled_keep_no_others_waiting(broker_factory, ground):
    """A queue that refuses what has ended holds it for ever; the suspects of other queues run all the same."""
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job(f"s{n}") for n in range(24)])
        suspects = await gone.claim(24, 0, ())
        for claim in suspects:
            ground.ripen(claim, count=2)
        taken = [claim for claim in await recover(broker, ground, limit=10) if claim.count == 3]
        assert taken
        elsewhere = [msgspec.structs.replace(claim, queue="refuses") for claim in taken] * 5
        assert await recover(broker, ground, limit=10, running=elsewhere + taken) == []
        ground.forget_pace("q")
        ground.sweep_soon(broker)
        more = await broker.claim(10, 0, [*taken, *elsewhere], lambda queue: 500)
        left = [claim for claim in suspects if claim.entry not in {each.entry for each in taken}]
        assert [claim.count for claim in more] == [3] * min(5, halves_of(left, 3)[half_of(more[0].entry, 3)])


async def test_with_three_deliveries_the_third_runs_alone(broker_factory, ground):
    async with broker_factory("dead") as gone, broker_factory("w", groups=group_sizes(3, 10)) as broker:
        await gone.publish([job("s"), job("t")])
        for claim in await gone.claim(2, 0, ()):
            ground.ripen(claim, count=2)
        (claim,) = await recover(broker, ground, limit=10)
        assert claim.suspect and claim.count == 2


# -- the server's clock


@contextmanager
def leaping(ground, tmp_path, **options):
    """A server of its own with a clock that can leap: (clock, what stands on it, where brokers find it)."""
    clock = Clock(tmp_path)
    server = Server(tmp_path, environment=clock.environment)
    try:
        with server.client() as client:
            yield clock, type(ground)(client), {"url": server.url, "lease": 1, **options}
    finally:
        server.kill()


async def test_two_leaps_that_undo_each_other_expire_no_living_lease(broker_factory, ground, tmp_path):
    """A worker that did not look between them sees that another one did: the token of the sweeps has fallen."""
    with leaping(ground, tmp_path) as (clock, theirs, at):
        async with (
            broker_factory("living", **at) as living,
            broker_factory("busy", **at) as busy,
            broker_factory("looks", **at) as looks,
        ):
            await living.publish([job("x")])
            claim = await one(living)
            for broker in (busy, looks):
                theirs.sweep_soon(broker)
                assert await broker.claim(1, 0, ()) == []
            clock.show(-3600)
            tokens: list[float] = []
            while not tokens or max(tokens) > time.time() - 3000:  # until it looked by that clock
                theirs.sweep_soon(looks)
                assert await looks.claim(1, 0, ()) == []
                tokens = [float(t) / 1000 for t in theirs.raw.hmget(META, "sweep", "returns") if t is not None]
            assert await living.renew([claim]) == []
            clock.show(0)
            theirs.sweep_soon(busy)
            assert await busy.claim(1, 0, ()) == []
            assert await living.renew([claim]) == []
            until = time.monotonic() + 1.5  # the rest is over, and the worker lives
            while time.monotonic() < until:
                assert await living.renew([claim]) == []
                assert await busy.claim(1, 0.05, ()) == []
            got: list = []

            async def rescued() -> bool:
                got.extend(await busy.claim(1, 0.05, ()))
                return names(got) == ["x"]

            await eventually(rescued, 3)  # one lease after it died, and no rest before that


async def test_a_leap_back_lets_the_dead_go_in_every_queue(broker_factory, ground, tmp_path):
    """The first queue that is looked at shows the leap; the leases of the others are put right, too."""
    with leaping(ground, tmp_path, queues=("q", "r")) as (clock, theirs, at):
        async with broker_factory("gone", **at) as gone, broker_factory("rescuer", **at) as rescuer:
            theirs.sweep_soon(rescuer)
            assert await rescuer.claim(2, 0, ()) == []
            await gone.publish([job("x"), job("y", "r")])
            assert sorted(names(await gone.claim(2, 0, ()))) == ["x", "y"]
            clock.show(-3600)
            got: list = []

            async def rescued() -> bool:
                got.extend(await rescuer.claim(2, 0, got))  # a read that blocks would wait by that clock
                return sorted(names(got)) == ["x", "y"]

            await eventually(rescued, 10)


async def test_a_leap_ahead_expires_no_living_lease_of_a_queue_that_was_not_due(broker_factory, ground, tmp_path):
    with leaping(ground, tmp_path, queues=("q", "r")) as (clock, theirs, at):
        async with broker_factory("living", **at) as living, broker_factory("looks", **at) as looks:
            await living.publish([job("y", "r")])
            claim = await one(living)
            theirs.sweep_soon(looks)
            assert await looks.claim(2, 0, ()) == []
            clock.show(3600)
            theirs.sweep_soon(looks, 0, 0.2)
            assert await looks.claim(2, 0, ()) == []  # it looks at one queue, which shows the leap
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                assert await looks.claim(2, 0.05, ()) == []
            assert await living.renew([claim]) == [], "its worker lives, and had no time to renew"


# -- workers with different leases


async def test_a_claim_is_judged_by_the_lease_of_who_holds_it(broker_factory, ground):
    async with broker_factory("long", lease=60) as long, broker_factory("short", lease=0.5) as short:
        await long.publish([job(str(n), level=level) for n, level in enumerate(("high", "normal", "low"))])
        claims = await long.claim(10, 0, ())
        for idle in (600, 59_000):
            for claim in claims:
                ground.ripen(claim, idle)
            assert await recover(short, ground) == []
            assert [ground.owner(claim) for claim in claims] == [(b"long", 1)] * 3
        for claim in claims:
            ground.ripen(claim, 60_100)
        assert sorted(names(await recover(short, ground))) == ["0", "1", "2"]


async def test_what_a_worker_of_a_short_lease_held_is_rescued_by_one_of_a_long_lease_in_time(broker_factory, ground):
    async with broker_factory("short", lease=0.5) as short, broker_factory("long", lease=60) as long:
        assert await recover(long, ground) == []  # it says when the next look is due
        await short.publish([job("x")])
        await one(short)
        ground.sweep_soon(long)
        got: list = []

        async def rescued() -> bool:
            got.extend(await long.claim(10, 0.05, got))
            return len(got) == 1

        await eventually(rescued, 3)


async def test_an_orphan_of_a_short_lease_behind_many_claims_of_a_long_one_is_found(broker_factory, ground):
    async with broker_factory("long", lease=60) as long, broker_factory("short", lease=0.5) as short:
        await long.publish([job(str(n)) for n in range(450)])
        held = await long.claim(450, 0, ())
        await long.publish([job("x")])
        ground.ripen_all([*held, await one(short)], 1000)
        assert names(await recover(short, ground, limit=3)) == ["x"]
        assert all(ground.owner(claim) == (b"long", 1) for claim in held[::50])


async def test_a_worker_that_told_no_lease_is_given_the_longest(broker_factory, raw, ground):
    """One of an earlier version; or somebody deleted the meta hash, until that worker renews again."""
    async with (
        broker_factory("old", lease=60) as old,
        broker_factory("long", lease=30) as long,
        broker_factory("short", lease=0.5) as short,
    ):
        await old.publish([job("x")])
        claim = await one(old)
        leases = raw.hget(META, "leases").replace(b"old 60000\n", b"")
        raw.hset(META, "leases", leases)
        ground.ripen(claim, 29_000)
        assert await recover(short, ground) == []
        assert await old.renew([claim]) == []
        assert raw.hget(META, "leases") == leases + b"old 60000\n"
        ground.ripen(claim, 31_000)
        assert await recover(long, ground) == []


async def test_leases_of_workers_that_left_or_died_are_forgotten(broker_factory, raw, ground):
    async with broker_factory("w") as broker, broker_factory("dead", lease=2) as gone, broker_factory("left") as left:
        await broker.publish([job("x")])
        claim = await one(gone)
        assert raw.hget(META, "leases") == b"w 15000\ndead 2000\nleft 15000\n"
        await left.leave()
        await broker.beat({"pid": 1})
        broker._tidy_at = 0.0
        await broker.promote()
        assert raw.hget(META, "leases") == b"w 15000\ndead 2000\n"  # it holds something: its lease counts still
        ground.ripen(claim)
        assert names(await recover(broker, ground)) == ["x"]
        broker._tidy_at = 0.0
        await broker.promote()
        assert raw.hget(META, "leases") == b"w 15000\n"
