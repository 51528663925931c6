"""The process that renews while its worker cannot: what it renews, when, and that it ends with its worker."""

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import termios
from contextlib import contextmanager

import pytest

from streamworker.broker.claim import Options
from streamworker.broker.keys import QueueKeys
from streamworker.broker.lists_brpop import BrpopBroker
from streamworker.broker.redis.client import RedisAddress
from streamworker.limits import AcquireRequest, Limit
from streamworker.worker import renewer
from tests.conftest import CLUSTER, eventually, eventually_blocking
from tests.contract.helpers import job, list_in_all, names, one, recover


def renew(broker, longest=60.0):
    """One go of the process, in this one."""
    told = json.loads(broker.standby(longest))
    for server in told["servers"]:
        renewer.renew(server, told["scripts"])


@contextmanager
def process(line):
    """The process, whose worker is this one, and has said nothing since ``line``."""
    command = [sys.executable, "-I", "-S", "-B", renewer.__file__, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as started:
        started.stdin.write(line + b"\n")
        started.stdin.flush()
        # It is up when nothing is left to read: on a busy machine that takes longer than a short lease.
        eventually_blocking(lambda: fcntl.ioctl(started.stdin, termios.FIONREAD, bytes(4)) == bytes(4))
        yield started
        started.stdin.close()
        assert started.wait(5) == 0


async def test_everything_a_worker_holds_is_renewed_by_the_process(broker_factory, ground, raw):
    async with broker_factory("w", queues=("q", "b")) as broker:
        await broker.publish([job(f"{queue}{level}", queue, level) for queue in "qb" for level in ("high", "low")])
        await broker.beat({"pid": 1})
        claims = await broker.claim(10, 0, ())
        for claim in claims:
            ground.ripen(claim, 10_000)
        raw.pexpire("streamworker:worker:w", 1000)
        await asyncio.to_thread(renew, broker)
        assert len(claims) == 4 and all(ground.idle(claim) < 5000 for claim in claims)
        assert all(ground.owner(claim) == (b"w", 1) for claim in claims)
        assert raw.pttl("streamworker:worker:w") > 5000


async def test_the_process_takes_nothing_back_and_leaves_what_has_run_out(broker_factory, ground):
    async with broker_factory("w") as broker, broker_factory("other") as other:
        await broker.publish([job("lost"), job("out"), job("kept")])
        lost, out, kept = await broker.claim(10, 0, ())
        ground.ripen(lost)
        (taken,) = await recover(other, ground)
        for claim in (taken, kept):
            ground.ripen(claim, 10_000)
        ground.ripen(out, 20_000)
        await asyncio.to_thread(renew, broker)
        assert ground.owner(taken) == (b"other", 2) and ground.idle(taken) >= 10_000
        assert ground.idle(out) >= 20_000
        assert ground.idle(kept) < 5000
        assert names(await recover(other, ground, running=[taken])) == ["out"]


async def test_places_of_limits_are_renewed_by_the_process_as_long_as_they_have_not_run_out(
    broker_factory, raw, ground
):
    limits = [Limit("q", f"k:{value}", concurrency=1) for value in ("here", "out", "given_back")]
    async with broker_factory("w") as broker, broker_factory("other") as other:
        await broker.publish([job(limit.name) for limit in limits])
        await broker.publish([job("others")])
        claims = await broker.claim(3, 0, ())
        requests = [AcquireRequest(c, limit, limit.name, "mark", "") for c, limit in zip(claims, limits, strict=True)]
        held, out, given_back = [answer.hold for answer in await broker.acquire("q", requests, ())]
        theirs = Limit("q", "theirs", concurrency=1)
        (answer,) = await other.acquire("q", [AcquireRequest(await one(other), theirs, "others", "mark", "")], ())
        await broker.acquire("q", [], [given_back])
        keys = QueueKeys("q", "")
        places = {permit: keys.limit(permit.limit.name)[0] for permit in (held, out, answer.hold)}
        for (permit, place), left in zip(places.items(), (5000, -1, 5000), strict=True):
            raw.zadd(place, {permit.token: int(raw.time()[0]) * 1000 + left})
            raw.pexpire(place, 5000)
        before = raw.zscore(places[answer.hold], answer.hold.token)
        await asyncio.to_thread(renew, broker)
        now = int(raw.time()[0]) * 1000
        assert raw.zscore(places[held], held.token) > now + 10_000 and raw.pttl(places[held]) > 10_000
        assert raw.zscore(places[out], out.token) < now
        assert raw.zscore(places[answer.hold], answer.hold.token) == before
        assert not raw.exists(keys.limit(given_back.limit.name)[0])


@list_in_all
async def test_the_process_renews_while_its_worker_is_silent_and_no_longer_than_jobs_may_run(broker_factory, ground):
    async with broker_factory("w", lease=1) as broker:
        await broker.publish([job("x")])
        with process(broker.standby(2.5)):
            claim = await one(broker)
            before = ground.idle(claim)
            renewed = 0

            async def run_out() -> bool:
                nonlocal before, renewed
                idle = ground.idle(claim)
                renewed, before = renewed + (idle < before), idle
                return idle > 1500

            await eventually(run_out, 10)
        assert renewed >= 3


@pytest.mark.skipif(CLUSTER, reason="list mode refuses a cluster")
async def test_with_brpop_there_is_nothing_to_renew(redis_url):
    broker = BrpopBroker(RedisAddress(redis_url), Options(queues=(("q", None),)))
    assert broker.standby(60) is None
