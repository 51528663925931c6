"""Leases: who keeps a claim, who gets it after a death, and what a job that kills its workers may still do."""

import asyncio
import time

import pytest

from streamworker.job import Settled
from streamworker.policy import SUSPECT_DELIVERIES
from tests.conftest import eventually
from tests.contract.helpers import (
    GROUP,
    HIGH,
    LOW,
    META,
    NORMAL,
    dead,
    done,
    hand_over,
    job,
    names,
    one,
    recover,
    release,
    ripen,
    settle_one,
    state,
    sweep_soon,
)


def idle(raw, claim) -> int:
    return raw.xpending_range(claim.place, GROUP, claim.entry, claim.entry, 1)[0]["time_since_delivered"]


def counted(raw, claim) -> tuple[bytes, int]:
    (entry,) = raw.xpending_range(claim.place, GROUP, claim.entry, claim.entry, 1)
    return entry["consumer"], entry["times_delivered"]


async def test_renewing_resets_the_lease_and_counts_no_delivery(broker_factory, raw):
    async with broker_factory("w", queues=("a", "q")) as broker:
        await broker.publish([job(level=level) for level in ("high", "normal", "low")] + [job(queue="a")])
        claims = await broker.claim(10, 0, ())
        for claim in claims:
            ripen(raw, claim, 100_000)
            assert idle(raw, claim) >= 100_000
        assert await asyncio.to_thread(broker.renew, claims) == []
        for claim in claims:
            assert idle(raw, claim) < 1000
            assert counted(raw, claim) == (b"w", 1)
        assert broker.renew([]) == []


async def test_renewing_never_steals_and_names_what_is_lost(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job(str(n)) for n in range(5)])
        mine, stolen, recounted, finished, deleted = claims = await broker.claim(10, 0, ())
        hand_over(raw, stolen, "rescuer", "IDLE", 5000)
        hand_over(raw, recounted, "w", "RETRYCOUNT", 2)
        raw.xack(NORMAL, GROUP, finished.entry)
        raw.xdel(NORMAL, deleted.entry)
        lost = await asyncio.to_thread(broker.renew, claims)
        assert {claim.entry for claim in lost} - {deleted.entry} == {stolen.entry, recounted.entry, finished.entry}
        assert counted(raw, stolen)[0] == b"rescuer" and idle(raw, stolen) >= 5000
        assert counted(raw, mine) == (b"w", 1)


async def test_renewing_many_and_after_everything_was_flushed(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job() for _ in range(1200)])
        claims = await broker.claim(2000, 0, ())
        assert await asyncio.to_thread(broker.renew, claims) == []
        raw.flushall()
        assert len(await asyncio.to_thread(broker.renew, claims)) == 1200


async def test_a_dead_workers_jobs_come_after_the_lease_and_not_before(broker_factory, raw):
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
        assert {(claim.level, claim.place) for claim in got} == {("high", HIGH), ("normal", NORMAL), ("low", LOW)}
        assert [claim.body for claim in sorted(got, key=lambda c: names([c]))] == [
            c.body for c in sorted(claims, key=lambda c: names([c]))
        ]
        assert await gone.settle([done(claim) for claim in claims]) == [Settled.LOST] * 3
        assert await broker.settle([done(claim) for claim in got]) == [Settled.SETTLED] * 3


async def test_a_renewed_claim_is_nobodys_orphan(broker_factory, raw):
    async with broker_factory("slow", lease=0.3) as slow, broker_factory("w", lease=0.3) as broker:
        await slow.publish([job("x")])
        claim = await one(slow)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert await asyncio.to_thread(slow.renew, [claim]) == []
            assert await broker.claim(10, 0.02, ()) == []
        assert await settle_one(slow, done(claim)) is Settled.SETTLED


async def test_what_runs_here_is_never_claimed_again(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job(str(n), level=level) for n in range(5) for level in ("high", "low")])
        claims = await broker.claim(100, 0, ())
        for claim in claims:
            ripen(raw, claim)
        assert await recover(broker, raw, running=claims) == []
        assert all(counted(raw, claim) == (b"w", 1) for claim in claims)
        for claim in claims:
            ripen(raw, claim)
        again = await recover(broker, raw, running=claims[:4])
        assert sorted(names(again)) == sorted(names(claims[4:]))


async def test_no_more_orphans_than_slots(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job(str(n)) for n in range(20)])
        for claim in await gone.claim(100, 0, ()):
            ripen(raw, claim)
        got: list = []
        for _ in range(7):
            new = await recover(broker, raw, limit=3, running=got)
            assert len(new) <= 3
            got += new
        assert sorted(names(got), key=int) == [str(n) for n in range(20)]


async def test_caps_hold_for_orphans(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("w", queues=(("q", 2),)) as broker:
        await gone.publish([job() for _ in range(5)])
        for claim in await gone.claim(100, 0, ()):
            ripen(raw, claim)
        got = await recover(broker, raw)
        assert len(got) == 2
        assert await recover(broker, raw, running=got) == []


async def test_one_sweep_at_a_time_for_the_whole_fleet(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("one") as first, broker_factory("two") as second:
        await gone.publish([job("x")])
        claim = await one(gone)
        assert await recover(first, raw) == []  # takes the token: nothing is ripe for a while
        hand_over(raw, claim, "dead", "IDLE", 10_000_000)
        sweep_soon(second)
        assert await second.claim(10, 0, ()) == []
        assert names(await recover(second, raw)) == ["x"]


async def test_an_orphan_deep_in_a_long_list_of_busy_ones_is_found(broker_factory, raw):
    async with broker_factory("busy") as busy, broker_factory("w") as broker:
        await busy.publish([job(str(n)) for n in range(5000)])
        claims: list = []
        while new := await busy.claim(1000, 0, claims):
            claims += new
        assert len(claims) == 5000
        orphans = [claims[0], claims[2500], claims[4999]]
        for claim in orphans:
            hand_over(raw, claim, "dead", "IDLE", 10_000_000)
        got: list = []
        for _ in range(60):
            got += await recover(broker, raw, limit=2, running=got)
            if len(got) == 3:
                break
        assert sorted(names(got), key=int) == ["0", "2500", "4999"]
        assert all(counted(raw, claim) == (b"busy", 1) for claim in claims[1:50])


async def test_an_orphan_deleted_underneath_is_acknowledged(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("x"), job("y")])
        first, second = await gone.claim(10, 0, ())
        ripen(raw, first)
        ripen(raw, second)
        raw.xdel(NORMAL, first.entry)
        assert names(await recover(broker, raw)) == ["y"]
        assert [entry["message_id"] for entry in raw.xpending_range(NORMAL, GROUP, "-", "+", 10)] == [second.entry]


async def test_an_orphan_keeps_the_id_it_had(broker_factory, raw):
    from streamworker import codec

    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        raw.xadd(NORMAL, {"job": '{"payload":{}}'})
        claim = await one(gone)
        ripen(raw, claim)
        (again,) = await recover(broker, raw)
        reading = codec.read(b'{"payload":{}}')
        assert codec.job_id(reading, again) == codec.job_id(reading, claim)


# -- jobs that kill their workers


async def test_a_suspect_is_reserved_counted_when_confirmed_and_alone(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("poison"), job("innocent")])
        poison, innocent = await gone.claim(10, 0, ())
        ripen(raw, poison, count=SUSPECT_DELIVERIES - 1)
        ripen(raw, innocent)
        got = {name: claim for claim in await recover(broker, raw) for name in names([claim])}
        assert got["innocent"].count == 2 and not got["innocent"].suspect
        reserved = got["poison"]
        assert reserved.suspect and reserved.count == SUSPECT_DELIVERIES - 1
        assert counted(raw, reserved) == (b"w", SUSPECT_DELIVERIES - 1)
        assert await asyncio.to_thread(broker.renew, [reserved]) == []
        confirmed = await broker.confirm(reserved)
        assert confirmed is not None and not confirmed.suspect and confirmed.count == SUSPECT_DELIVERIES
        assert counted(raw, confirmed) == (b"w", SUSPECT_DELIVERIES)
        assert await broker.confirm(reserved) is None  # once
        assert await settle_one(broker, done(reserved)) is Settled.LOST
        assert await settle_one(broker, done(confirmed)) is Settled.SETTLED


async def test_one_suspect_at_a_time_the_others_stay_ripe_and_uncounted(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("w") as broker, broker_factory("two") as second:
        await gone.publish([job(str(n)) for n in range(4)])
        claims = await gone.claim(10, 0, ())
        for claim in claims:
            ripen(raw, claim, count=SUSPECT_DELIVERIES - 1)
        reserved = await recover(broker, raw)
        assert len(reserved) == 1 and reserved[0].suspect
        assert await recover(broker, raw, running=reserved) == []
        others = await recover(second, raw)
        assert len(others) == 1 and others[0].suspect and names(others) != names(reserved)
        assert {counted(raw, claim)[1] for claim in claims} == {SUSPECT_DELIVERIES - 1}


async def test_a_suspect_beyond_its_deliveries_ends_by_what_was_read(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("poison")])
        ripen(raw, await one(gone), count=5)
        (reserved,) = await recover(broker, raw)
        assert reserved.suspect and reserved.count == 5
        assert await settle_one(broker, dead(reserved, "worker died 5 times")) is Settled.SETTLED
        ((_, letter),) = raw.xrange("stream:{q}:dead")
        assert letter[b"deliveries"] == b"5"


async def test_a_reserved_suspect_may_be_handed_back(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("poison")])
        ripen(raw, await one(gone), count=3)
        (reserved,) = await recover(broker, raw)
        assert await settle_one(broker, release(reserved)) is Settled.SETTLED
        assert await broker.leave()


async def test_a_suspect_that_was_lost_is_not_confirmed(broker_factory, raw):
    async with broker_factory("dead") as gone, broker_factory("w") as broker:
        await gone.publish([job("poison"), job("deleted")])
        for claim in await gone.claim(10, 0, ()):
            ripen(raw, claim, count=2)
        (reserved,) = await recover(broker, raw)
        hand_over(raw, reserved, "rescuer")
        before = state(raw)
        assert await broker.confirm(reserved) is None
        assert state(raw) == before
        raw.flushall()
        assert await broker.confirm(reserved) is None


# -- replies that were lost


async def test_strays_are_what_is_ours_without_our_knowing(broker_factory, raw):
    async with broker_factory("w", queues=("a", "q")) as broker, broker_factory("other") as other:
        await broker.publish([job("held"), job("lost"), job("deleted"), job("low", level="low"), job("a", "a")])
        claims = {names([claim])[0]: claim for claim in await broker.claim(10, 0, ())}
        await other.publish([job("others")])
        await one(other)
        raw.xdel(NORMAL, claims["deleted"].entry)
        found = await broker.strays([claims["held"]])
        assert sorted(names(found)) == ["a", "lost", "low"]
        for claim in found:
            assert claim == claims[names([claim])[0]]
        assert await broker.settle([done(claim) for claim in found]) == [Settled.SETTLED] * 3
        assert await broker.strays([claims["held"]]) == []
        assert await settle_one(broker, done(claims["held"])) is Settled.SETTLED
        assert await broker.strays(()) == []


async def test_after_a_lost_reply_nothing_stays_behind(broker_factory, raw):
    """The connection is cut while a claim waits and entries arrive: whatever the server gave away is found again."""
    async with broker_factory("w") as broker:
        for round_ in range(20):
            claiming = asyncio.create_task(broker.claim(10, 5, ()))
            await eventually(lambda: any("b" in client["flags"] for client in raw.client_list()))
            (reader,) = (client["id"] for client in raw.client_list() if "b" in client["flags"])
            with raw.pipeline(transaction=False) as pipe:
                pipe.xadd(NORMAL, {"job": f'{{"id":"{round_}","payload":{{}}}}'})
                pipe.client_kill_filter(_id=reader)
                pipe.execute()
            try:
                claims = await claiming
            except Exception:
                claims = await broker.strays(()) or await broker.claim(10, 0, ())
            assert names(claims) == [str(round_)]
            assert await broker.settle([done(claim) for claim in claims]) == [Settled.SETTLED]


# -- coming and going


async def test_leave_deletes_the_consumer_and_its_heartbeat(broker_factory, raw):
    async with broker_factory("w", queues=("a", "q")) as broker:
        await broker.publish([job(), job(queue="a")])
        await asyncio.to_thread(broker.beat, {"hostname": "h", "pid": 1})
        assert raw.hget("streamworker:worker:w", "hostname") == b"h"
        assert 0 < raw.pttl("streamworker:worker:w") <= 15_000
        claims = await broker.claim(10, 0, ())
        await broker.settle([done(claim) for claim in claims])
        assert await broker.leave()
        for stream in (NORMAL, "stream:{a}"):
            assert raw.xinfo_consumers(stream, GROUP) == []
        assert not raw.exists("streamworker:worker:w")


@pytest.mark.parametrize("level", ["high", "normal", "low"])
async def test_leave_never_deletes_a_consumer_with_pending_entries(broker_factory, raw, level):
    async with broker_factory("w") as broker:
        await broker.publish([job("x", level=level)])
        claim = await one(broker)
        before = state(raw)
        assert not await broker.leave()
        assert state(raw) == before
        assert await settle_one(broker, done(claim)) is Settled.SETTLED
        assert await broker.leave()


async def test_leaving_what_is_gone_is_no_error(broker_factory, raw):
    async with broker_factory("w") as broker:
        raw.flushall()
        assert await broker.leave()


async def test_the_cursor_of_a_sweep_outlives_its_worker(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job()])
        await recover(broker, raw)
        assert raw.hkeys(META)
