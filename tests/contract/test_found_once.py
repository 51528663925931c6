"""What testing once found in the core, kept found: each of these failed before it was mended."""

import asyncio
import json
import time
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest

from streamworker import App, Payload, QueueWorker, Settings
from streamworker.errors import StreamworkerError
from tests.conftest import eventually
from tests.contract import helpers as h
from tests.contract.helpers import job, names, one, recover, stream_only


@pytest.fixture(params=["asyncio"])
def anyio_backend(request):
    return request.param


class Work(Payload, kind="work", queue="q"):
    what: str = ""


@pytest.fixture
def settings(ground, redis_url):
    return Settings(redis_url=redis_url, mode=ground.mode, lease=1, grace=0.2, concurrency=4)


@asynccontextmanager
async def working(app, settings, **changes):
    settings = msgspec.structs.replace(settings, **changes)
    worker = QueueWorker(app, redis=None, database=None, services=None, settings=settings)
    task = asyncio.create_task(worker.start())
    try:
        yield worker
    finally:
        stop = asyncio.create_task(worker.stop())
        await asyncio.wait([task], timeout=15)
        task.cancel()
        stop.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)


async def jam(ground, settings, error):
    """One job ends oddly; the jobs beside and after it must still be settled."""
    app = App(settings=settings)

    @app.handler
    async def work(payload: Work):
        if payload.what == "odd":
            raise error

    async with app, working(app, settings):
        if True:
            await app.enqueue(Work("odd"))
            await asyncio.sleep(0.3)
            await app.enqueue_many([Work("fine") for _ in range(10)])
            await eventually(lambda: ground.left() <= 0, 5)


async def test_tick_of_one_queue_with_a_wrong_key_blinds_no_other(raw, broker_factory):
    async with broker_factory("w", queues=("a", "q")) as b:
        raw.set("stream:{a}:due", "x")
        await b.publish([job("x", delay=0.001)])
        await asyncio.sleep(0.05)
        with suppress(StreamworkerError):
            await b.promote()
        assert names(await b.claim(1, 0, ())) == ["x"]


async def test_promote_with_a_target_of_a_wrong_type_blinds_no_other_level(raw, broker_factory, ground):
    async with broker_factory("w", queues=("q",)) as b:
        raw.delete(ground.place("high"))
        raw.set(ground.place("high"), "x")
        await b.publish([job("h", level="high", delay=0.001)])
        await asyncio.sleep(0.05)
        await b.publish([job("x", delay=0.001)])
        await asyncio.sleep(0.05)
        for _ in range(2):
            with suppress(StreamworkerError):
                await b.promote()
        assert names(await b.claim(1, 0, ())) == ["x"]


async def test_meta_of_a_wrong_type_blinds_no_other_queue(raw, broker_factory):
    async with broker_factory("w", queues=("a", "q")) as b:
        raw.delete("stream:{a}:meta")
        raw.set("stream:{a}:meta", "x")
        await b.publish([job("x")])
        got = []
        for _ in range(3):
            with suppress(StreamworkerError):
                got += await b.claim(5, 0, got)
        assert names(got) == ["x"]
    async with broker_factory("w", queues=("q",)) as b:
        ...


async def test_a_wrong_type_beside_a_missing_group_blinds_nothing(raw, broker_factory, ground):
    async with broker_factory("w", queues=("q", "b")) as b:
        raw.flushall()
        raw.set(ground.place("high"), "x")
        await b.publish([job("x"), job("b", "b")])
        got = []
        for _ in range(4):
            with suppress(StreamworkerError):
                got += await b.claim(5, 0, got)
        assert sorted(names(got)) == ["b", "x"]


async def test_a_hung_handlers_own_sweep_does_not_renew_its_lease(ground, broker_factory):
    """The holder no longer renews (past its deadline), but its own sweep resets the idle time for a whole lease."""
    async with broker_factory("holder") as holder, broker_factory("other") as other:
        await holder.publish([job("hung")])
        claim = await one(holder)
        ground.ripen(claim)
        assert await recover(holder, ground, running=[claim]) == []
        assert names(await recover(other, ground)) == ["hung"]


async def test_put_back_suspects_are_no_strays_that_run_with_others(ground, broker_factory):
    async with broker_factory("dead") as gone, broker_factory("w") as b:
        await gone.publish([job("p1"), job("p2")])
        for c in await gone.claim(5, 0, ()):
            ground.ripen(c, count=3)
        reserved = await recover(b, ground)
        strays = await b.own_pending(reserved)
        # p2 killed two workers already: handed out, it must be a suspect (its next run is its third)
        assert all(c.suspect or c.count >= 3 for c in strays), strays


async def test_a_reserved_suspect_found_as_a_stray_is_still_a_suspect(ground, broker_factory):
    async with broker_factory("dead") as gone, broker_factory("w") as b:
        await gone.publish([job("p1")])
        ground.ripen(await one(gone), count=3)
        (_reserved,) = await recover(b, ground)
        (stray,) = await b.own_pending(())  # e.g. confirm()'s connection broke
        assert stray.suspect and stray.count == 3


async def test_a_confirmed_suspect_found_as_a_stray_is_not_counted_twice(ground, broker_factory):
    async with broker_factory("dead") as gone, broker_factory("w") as b:
        await gone.publish([job("p1")])
        ground.ripen(await one(gone), count=3)
        (reserved,) = await recover(b, ground)
        await b.confirm(reserved)
        (stray,) = await b.own_pending(())
        assert stray.count + stray.suspect == 4


@stream_only
async def test_epoch_made_by_another_worker_reaches_a_waiting_one(raw, broker_factory, ground):
    async with broker_factory("one") as a, broker_factory("two") as b:
        raw.flushall()
        assert await b.claim(1, 0, ()) == []  # b heals, new epoch
        task = asyncio.create_task(a.claim(1, 5, ()))
        await eventually(ground.blocked)
        await b.publish([job("x")])
        (claim,) = await task
        assert claim.epoch == raw.hget(h.META, "id:2") == raw.hget("stream:{q}:ids", "id:2")


@pytest.mark.mode_free
async def test_a_handler_that_cancels_its_own_task_ends_its_job(settings, ground):
    app = App(settings=settings)

    @app.handler
    async def work(payload: Work):
        if payload.what == "odd":
            asyncio.current_task().cancel()
            await asyncio.sleep(1)

    async with app, working(app, settings, concurrency=1):
        if True:
            await app.enqueue(Work("odd"))
            await asyncio.sleep(0.3)
            await app.enqueue(Work("fine"))
            await eventually(lambda: ground.left() == 0, 5)


@pytest.mark.mode_free
async def test_a_handler_that_raises_generator_exit_ends_its_job(ground, settings):
    await jam(ground, settings, GeneratorExit())


@pytest.mark.mode_free
async def test_a_sync_handler_that_returns_a_coroutine_is_not_done(settings, ground):
    """`app.handler(lambda-like wrapper)` without functools.wraps: the body never ran, yet the job is deleted."""
    ran = []

    async def real(p):
        ran.append(p)

    def deco(f):
        def wrapper(payload: Work):
            return f(payload)

        return wrapper

    app = App(settings=settings)
    app.handler(deco(real))
    async with app, working(app, settings):
        if True:
            await app.enqueue(Work("x"))
            await eventually(lambda: ground.left() == 0, 5)
            assert ran


async def test_headers_json_cannot_hold_are_our_error(settings):
    app = App(settings=settings)
    async with app:
        with pytest.raises(StreamworkerError):
            await app.enqueue(Work("x"), headers={"a": object()})


@pytest.mark.mode_free
async def test_refused_jobs_are_offered_again_under_load(monkeypatch):
    """Refused runs wait for a moment without finished ones: under load that moment never comes."""
    from streamworker import codec
    from streamworker.execution import OK
    from streamworker.job import Claim, Interrupted, Settled
    from streamworker.policy import Facts, Limits
    from streamworker.worker.inflight import InFlight
    from streamworker.worker.settler import Settler

    monkeypatch.setattr("streamworker.worker.settler.REFUSED_PAUSE", 0.2)
    offered = []

    class Fake:
        def __init__(self):
            self.refusals = {}

        async def settle(self, items):
            offered.append([i.job_id for i in items])
            await asyncio.sleep(0.01)
            return [Settled.REFUSED if i.job_id else Settled.SETTLED for i in items]

    in_flight = InFlight()
    settler = Settler(Fake(), in_flight, parked=lambda at: None)
    n = 0

    def add(outcome, name):
        nonlocal n
        n += 1
        body = json.dumps({"id": name, "payload": {}}).encode()
        (run,) = in_flight.admit([Claim("q", "normal", "s", b"%d-0" % n, 1, body, b"e")])
        run.reading = codec.read(body)
        run.facts = Facts(0, Limits(), 1)
        run.outcome = outcome
        settler.add(run)

    task = asyncio.create_task(settler.run())
    add(Interrupted("x"), "refused")
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        add(OK, "d")
        await asyncio.sleep(0.002)
    count = sum("refused" in o for o in offered)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert count >= 2, count


@pytest.mark.mode_free
async def test_one_broken_ending_holds_up_nobody_else(settings, ground, monkeypatch):
    """The jam behind the fixed triggers: whatever ending()/settle() raises for ONE run, the others must be settled."""
    from streamworker.worker import settler

    real = settler.ending

    def ending(run, **kw):
        if run.reading and b'"odd"' in run.claim.body:
            raise RuntimeError("one bad run")
        return real(run, **kw)

    monkeypatch.setattr(settler, "ending", ending)
    app = App(settings=settings)

    @app.handler
    async def work(payload: Work): ...

    async with app, working(app, settings):
        await app.enqueue(Work("odd"))
        await asyncio.sleep(0.3)
        await app.enqueue_many([Work("fine") for _ in range(10)])
        await eventually(lambda: ground.left() <= 1, 5)


async def test_entering_an_app_twice_at_once_leaks_nothing(settings, raw):
    def connected():
        return sum(client["name"] == "streamworker" for client in raw.client_list())

    before = connected()
    app = App(settings=settings)
    await asyncio.gather(app.__aenter__(), app.__aenter__())
    await app.enqueue(Work("x"))
    assert connected() > before
    await app.__aexit__()
    await app.__aexit__()
    await eventually(lambda: connected() == before, 5)
