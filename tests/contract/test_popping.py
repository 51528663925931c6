"""LIST_POP=brpop: the literal loop. At most once under a crash; everything short of a crash loses nothing."""

import asyncio
import json
import time
from contextlib import asynccontextmanager, suppress
from uuid import UUID

import pytest

from streamworker import codec
from streamworker.broker.claim import Options
from streamworker.broker.lists_brpop import BrpopBroker
from streamworker.broker.redis.client import RedisAddress
from streamworker.errors import StreamworkerError, Unreachable
from streamworker.job import Settled
from tests.conftest import eventually
from tests.contract.ground import out_of_memory
from tests.contract.helpers import DEAD, DUE, dead, done, job, list_only, names, one, release, retry, settle_one

pytestmark = list_only


@pytest.fixture
def popping(redis_url, ground):
    """``async with popping("worker-1", "billing") as broker``: open and joined."""

    @asynccontextmanager
    async def make(name: str, *queues: str, lease: float = 15.0, **options):
        broker = BrpopBroker(
            RedisAddress(redis_url), Options(queues=tuple((q, None) for q in queues or ("q",)), lease=lease, **options)
        )
        try:
            await broker.open()
            await broker.join(name)
            ground.sweep_soon(broker)
            yield broker
        finally:
            await broker.close()

    return make


async def test_one_job_at_a_time_from_the_right_in_order_of_keys(popping, raw):
    async with popping("w", "a", "q") as broker:
        for queue in ("q", "a"):
            for level in ("low", "normal", "high"):
                await broker.publish([job(f"{queue}{level}{n}", queue, level) for n in range(2)])
        got = []
        for _ in range(12):
            got += names(await broker.claim(100, 0, ()))
        assert got == [f"{q}{level}{n}" for q in "aq" for level in ("high", "normal", "low") for n in range(2)]
        started = time.monotonic()
        assert await broker.claim(100, 0, ()) == []
        assert time.monotonic() - started < 1
        assert raw.keys("*claimed*") == []


async def test_nothing_is_popped_while_something_is_in_hand(popping, raw):
    async with popping("w") as broker:
        await broker.publish([job("a"), job("b")])
        held = [await one(broker)]
        assert await broker.claim(1, 0, held) == await broker.claim(1, 0.05, held) == []
        claiming = asyncio.create_task(broker.claim(1, 5, held))
        await asyncio.sleep(0.05)
        assert raw.llen("queue:q") == 1
        held.clear()
        assert names(await claiming) == ["b"]


async def test_it_waits_with_brpop_and_wakes_at_once(popping, raw, ground):
    async with popping("w") as broker:
        claiming = asyncio.create_task(broker.claim(10, 5, ()))
        (client,) = await eventually(ground.blocked)
        assert client["cmd"] == "brpop"
        raw.lpush("queue:q", '{"payload":{}}')
        (claim,) = await claiming
        assert (claim.body, claim.count, claim.place) == (b'{"payload":{}}', 1, "queue:q")
        assert UUID(codec.job_id(codec.read(claim.body), claim)).version == 7


async def test_an_interrupted_wait_loses_nothing_though_a_reply_is_on_its_way(popping, raw, ground):
    """The push and the unblocking reach the server together: whichever comes first, the job is here or there."""
    for n in range(50):
        async with popping("w") as broker:
            claiming = asyncio.create_task(broker.claim(10, 5, ()))
            await eventually(ground.blocked)
            with ThreadedPush(raw, n) as push:
                await broker.interrupt()
                claims = await claiming
                push.join()
            assert len(claims) + raw.llen("queue:q") == 1
            assert await broker.settle([release(claim, body=None) for claim in claims]) == [Settled.SETTLED] * len(
                claims
            )
            assert json.loads(raw.lpop("queue:q"))["id"] == str(n)
            assert await broker.leave()


class ThreadedPush:
    """A producer that pushes at the same moment."""

    def __init__(self, raw, n):
        import threading

        self._thread = threading.Thread(target=raw.lpush, args=("queue:q", f'{{"id":"{n}","payload":{{}}}}'))

    def __enter__(self):
        self._thread.start()
        return self._thread

    def __exit__(self, *_):
        self._thread.join()


async def test_endings_are_those_of_every_mode(popping, raw, ground):
    async with popping("w") as broker:
        await broker.publish([job(str(n)) for n in range(4)])
        claims = [await one(broker) for _ in range(4)]
        at = time.time() + 60
        endings = [done(claims[0]), retry(claims[1], at), release(claims[2]), dead(claims[3], job_id="3")]
        assert await broker.settle(endings) == [Settled.SETTLED] * 4
        assert raw.zcard(DUE) == raw.llen("queue:q") == raw.xlen(DEAD) == 1
        ((_, letter),) = raw.xrange(DEAD)
        assert (letter[b"id"], letter[b"job"], letter[b"worker"]) == (b"3", claims[3].body, b"w")
        # A reply that was lost: the same is sent again, and is not done again.
        assert await broker.settle(endings[1:]) == [Settled.LOST] * 3
        assert raw.zcard(DUE) == raw.llen("queue:q") == raw.xlen(DEAD) == 1
        assert await broker.renew(claims) == [] and await broker.own_pending(()) == []
        assert await broker.leave() and not raw.exists("streamworker:worker:w")


async def test_what_memory_refused_is_offered_again_beside_what_was_stored(popping, raw):
    async with popping("w") as broker:
        await broker.publish([job("a"), job("b")])
        first, second = await one(broker), await one(broker)
        assert await settle_one(broker, release(first)) is Settled.SETTLED
        with out_of_memory(raw):
            answers = await broker.settle([release(first), release(second)])
        assert answers[0] is Settled.LOST
        if answers[1] is Settled.REFUSED:
            assert await broker.settle([release(first), release(second)]) == [Settled.LOST, Settled.SETTLED]
        assert raw.llen("queue:q") == 2


async def test_paused_queues_are_passed_over(popping, raw):
    async with popping("w", "a", "q") as broker:
        raw.hset("stream:{a}:meta", "paused", "1")
        await broker.publish([job("a", "a"), job("q", "q")])
        assert names(await broker.claim(1, 0, ())) == ["q"]
        raw.hset("stream:{q}:meta", "inactive", "1")
        assert await broker.claim(1, 0.05, ()) == []
        raw.hdel("stream:{a}:meta", "paused")
        assert names(await broker.claim(1, 5, ())) == ["a"]


async def test_weighted_order_leaves_low_its_tenth(popping):
    async with popping("w", weighted=True) as broker:
        await broker.publish([job(level=level) for level in ("high", "low") for _ in range(50)])
        levels = [(await one(broker)).level for _ in range(50)]
        assert 3 <= levels.count("low") <= 10


async def test_what_others_left_behind_is_given_back_and_keeps_id_and_count(popping, broker_factory, ground):
    async with broker_factory("dead") as gone, popping("w") as broker:
        ground.push('{"payload":{}}')
        claim = await one(gone)
        ground.ripen(claim, count=2)
        ground.sweep_soon(broker)
        again = await one(broker)
        assert (again.entry, again.count, again.body) == (claim.entry, 3, b'{"payload":{}}')


async def test_it_says_so_at_the_start(popping, caplog, capsys):
    async with popping("w"):
        pass
    assert "list_pop_brpop" in caplog.text + "".join(capsys.readouterr())


async def test_a_broken_connection_costs_at_most_the_job_on_it(popping, raw, ground):
    async with popping("w") as broker:
        got = 0
        for n in range(10):
            claiming = asyncio.create_task(broker.claim(10, 5, ()))
            (client,) = await eventually(ground.blocked)
            raw.client_kill_filter(_id=client["id"])
            with suppress(Unreachable, StreamworkerError):
                await claiming
            raw.lpush("queue:q", f'{{"id":"{n}","payload":{{}}}}')
            while not (claims := await broker.claim(10, 1, ())):
                pass
            got += len(claims)
        assert got == 10
