"""Output of running jobs: appended only by the run that holds the claim, bounded, and followed from any position to the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Literal

import anyio
import pytest

from streamworker import App, Backoff, Context, Discard, Payload, Retry, Settings, results
from streamworker.broker import SettleRequest
from streamworker.broker.base import RedisBroker
from streamworker.errors import ClaimLost, Unreachable, UsageError
from streamworker.job import Claim, Done, Settled
from streamworker.results import LIFE, OutputBatch, OutputEntry, OutputItem, packed
from streamworker.worker.emission import BATCH_CHUNKS, TOGETHER, OutputBuffer, RunOutput
from tests.conftest import eventually
from tests.contract.helpers import job, list_only, names, one, recover, settings, settle_one, working

OUTPUT = "stream:{q}:output:a"


def batch(claim: Claim, *chunks: Any, offset: int = 0, attempt: int = 1) -> OutputBatch:
    run = RunOutput(claim, names([claim])[0], attempt)
    for chunk in chunks:
        run.add(packed(chunk))
    made = run.batch()
    return OutputBatch(claim, made.job_id, attempt, offset, made.count, made.chunks)


async def read(broker: Any, job_id: str = "a", after: int = 0) -> list[OutputItem]:
    """What is there."""
    async with broker.output(["q"], job_id) as reader:
        return [item async for item in results.follow(reader, None, ("q", job_id), after, live=False)]


def chunks(items: list[OutputItem]) -> list[Any]:
    return [item.chunk for item in items]


# -- the broker


async def test_chunks_are_read_in_order_from_any_position(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        claim = await one(broker)
        told = ["text", "", "ünï 🙂", b"\x00\xff", {"token": 1, "more": [None, 1.5]}, None, [1], True]
        assert await broker.emit([batch(claim, *told[:3])]) == [Settled.SETTLED]
        assert await broker.emit([batch(claim, *told[3:], offset=3)]) == [Settled.SETTLED]
        items = await read(broker)
        assert chunks(items) == told
        first = items[0].position
        assert [item.position for item in items] == list(range(first, first + len(told)))
        assert {(item.run, item.attempt, item.restart, item.missed) for item in items} == {(first, 1, False, 0)}
        for item in items:
            rest = await read(broker, after=item.position)
            assert rest == items[items.index(item) + 1 :]
        assert await read(broker, "another") == []
        assert 0 < raw.pttl(OUTPUT) <= LIFE * 1000


async def test_a_batch_that_is_sent_again_is_stored_once(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        claim = await one(broker)
        for _ in range(3):
            assert await broker.emit([batch(claim, "1", "2")]) == [Settled.SETTLED]
        for _ in range(2):
            assert await broker.emit([batch(claim, "3", offset=2)]) == [Settled.SETTLED]
        assert chunks(await read(broker)) == ["1", "2", "3"]


async def test_a_zombie_adds_nothing_to_the_output_of_its_successor(broker_factory, ground):
    async with broker_factory("zombie") as zombie, broker_factory("rescuer") as rescuer:
        await zombie.publish([job("a"), job("mine")])
        claim, mine = await zombie.claim(2, 0, ())
        await zombie.emit([batch(claim, "old 1", "old 2")])
        ground.ripen(claim)
        (taken,) = await recover(rescuer, ground)
        # Refused from the moment the claim is another's, whether that has emitted or not; the zombie's other job goes on.
        late = [batch(claim, "late", offset=2), batch(mine, "mine")]
        assert await zombie.emit(late) == [Settled.LOST, Settled.SETTLED]
        assert await rescuer.emit([batch(taken, "new 1")]) == [Settled.SETTLED]
        assert await zombie.emit(late) == [Settled.LOST, Settled.SETTLED]
        assert await rescuer.emit([batch(taken, "new 2", offset=1)]) == [Settled.SETTLED]
        items = await read(rescuer)
        assert chunks(items) == ["old 1", "old 2", "new 1", "new 2"]
        assert [item.restart for item in items] == [False, False, True, False]
        assert [item.run for item in items] == [items[0].position] * 2 + [items[2].position] * 2
        assert chunks(await read(rescuer, "mine")) == ["mine"]
        # A reader that comes back from the first run starts over; one from the second does not.
        assert [item.restart for item in await read(rescuer, after=items[1].position)] == [True, False]
        assert [item.restart for item in await read(rescuer, after=items[2].position)] == [False]


async def test_nothing_is_added_once_the_job_is_settled(broker_factory):
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        claim = await one(broker)
        await broker.emit([batch(claim, "in time")])
        assert await settle_one(broker, SettleRequest(claim, Done())) is Settled.SETTLED
        assert await broker.emit([batch(claim, "late", offset=1)]) == [Settled.LOST]
        assert chunks(await read(broker)) == ["in time"]


@list_only
async def test_without_the_lease_set_the_claimed_list_decides(broker_factory, ground, raw):
    async with broker_factory("w") as broker, broker_factory("v") as other:
        await broker.publish([job("a")])
        claim = await one(broker)
        raw.delete(ground.keys().leases)
        assert await broker.emit([batch(claim, "held")]) == [Settled.SETTLED]
        assert await other.emit([batch(claim, "not mine")]) == [Settled.LOST]


async def test_an_output_is_bounded_in_chunks_and_bytes_and_says_what_is_missing(broker_factory, raw, monkeypatch):
    monkeypatch.setattr("streamworker.broker.settle.BOUNDS", (60_000, 10, 1000))
    monkeypatch.setattr("streamworker.broker.lists.BOUNDS", (60_000, 10, 1000))
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        claim = await one(broker)
        for number in range(25):
            await broker.emit([batch(claim, str(number), offset=number)])
        items = await read(broker)
        assert chunks(items) == [str(number) for number in range(15, 25)]
        assert [item.missed for item in items] == [15] + [0] * 9
        await broker.emit([batch(claim, "x" * 600, offset=25)])
        await broker.emit([batch(claim, "y" * 600, offset=26)])
        rest = await read(broker, after=items[-1].position)
        assert [(item.chunk[0], item.missed) for item in rest] == [("y", 1)]
        assert raw.xlen(OUTPUT) == 1
        assert 0 < raw.pttl(OUTPUT) <= 60_000


async def test_positions_rise_though_the_output_expired_meanwhile(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        claim = await one(broker)
        await broker.emit([batch(claim, *range(100))])
        (*_, last) = await read(broker)
        raw.delete(OUTPUT)
        await broker.emit([batch(claim, "after", offset=100)])
        assert chunks(await read(broker, after=last.position)) == ["after"]


async def test_an_output_that_cannot_be_stored_harms_no_other(broker_factory, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job("a"), job("b")])
        claims = await broker.claim(2, 0, ())
        raw.set(OUTPUT, "of another program")
        answers = await broker.emit([batch(claim, "x") for claim in claims])
        assert answers == [Settled.REFUSED, Settled.SETTLED]
        assert chunks(await read(broker, "b")) == ["x"]


def test_what_no_chunk_is():
    for bad in (object(), {1, object()}, float("nan"), "\ud800"):
        with pytest.raises(UsageError, match=r"ctx\.emit\(\)"):
            packed(bad)
    with pytest.raises(UsageError, match="split it"):
        packed("x" * 65_536)


# -- workers and readers


class Talk(Payload, kind="talk", queue="q"):
    how: str = "say"
    words: int = 3


class Scene:
    def __init__(self, ground: Any, raw: Any) -> None:
        self.app = App(settings=settings(raw, ground, lease=3.0))
        self.app.handler(max_attempts=2, backoff=Backoff(base=0.01))(self.talk)
        self.go = asyncio.Event()
        self.errors: list[BaseException] = []
        self.contexts: list[Context] = []

    async def talk(self, payload: Talk, ctx: Context) -> str | None:
        self.contexts.append(ctx)
        for number in range(payload.words):
            await ctx.emit(f"{ctx.attempt}.{number}")
        match payload.how:
            case "fail once" if ctx.attempt == 1:
                raise Retry(after=0.01)
            case "die":
                raise Discard("no")
            case "wait":
                await self.go.wait()
                await ctx.emit("gone")
            case "forever":
                await anyio.sleep_forever()
            case "value":
                return "value"
        return None

    async def follow(self, job_id: str, **options: Any) -> list[Any]:
        with anyio.fail_after(20):
            return chunks([item async for item in self.app.output(job_id, **options)])


@pytest.fixture
async def scene(ground, raw):
    scene = Scene(ground, raw)
    async with scene.app:
        yield scene


async def test_a_reader_follows_across_attempts_to_the_end(scene):
    async with anyio.create_task_group() as group:
        got: list[OutputItem] = []
        made = scene.app.job(Talk(how="fail once"))

        async def follow() -> None:
            async for item in scene.app.output(made.id):
                got.append(item)

        group.start_soon(follow)  # before the job is there
        subscriber = scene.app._connection._broker._subscriber
        await eventually(lambda: len(subscriber._confirmed) == 2)
        await scene.app.enqueue(made)
        async with working(scene.app):
            await eventually(lambda: not subscriber._by_channel)  # it has ended
    assert chunks(got) == ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2"]
    assert [(item.attempt, item.restart) for item in got] == [
        (1, False), (1, False), (1, False), (2, True), (2, False), (2, False),
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["say", "die", "fail once"])
async def test_a_reader_that_comes_after_the_end_reads_all_and_ends(scene, how):
    made = await scene.app.enqueue(Talk(how=how))
    async with working(scene.app):
        whole = await scene.follow(made.id)
        assert whole == await scene.follow(made.id)  # from what is kept
        (*_, last) = [item async for item in scene.app.output(made.id)]
        assert await scene.follow(made.id, after=last.position) == []


async def test_a_cancelled_job_ends_its_readers(scene):
    made = await scene.app.enqueue(Talk(how="forever"))
    async with working(scene.app), aclosing(scene.app.output(made.id)) as items:
        assert (await anext(items)).chunk == "1.0"
        await scene.app.cancel(made.id)
        with anyio.fail_after(20):
            assert [item.chunk async for item in items] == ["1.1", "1.2"]


async def test_an_expired_job_ends_its_readers(scene):
    made = await scene.app.enqueue(Talk(), expires_in=0.05)
    await anyio.sleep(0.1)
    async with anyio.create_task_group() as group:
        got: list[Any] = []

        async def follow() -> None:
            got.append(await scene.follow(made.id))

        group.start_soon(follow)
        await eventually(lambda: len(scene.app._connection._broker._subscriber._confirmed) == 2)
        async with working(scene.app):
            await eventually(lambda: got == [[]])


async def test_what_is_there_can_be_read_without_waiting(scene):
    made = await scene.app.enqueue(Talk(how="wait"))
    assert await scene.follow(made.id, follow=False) == []
    async with working(scene.app):
        items = scene.app.output(made.id)
        for word in ("1.0", "1.1", "1.2"):
            assert (await anext(items)).chunk == word
        await items.aclose()
        assert await scene.follow(made.id, follow=False) == ["1.0", "1.1", "1.2"]
        scene.go.set()
        assert (await scene.follow(made.id))[-1] == "gone"
    assert not scene.app._connection._broker._subscriber._by_channel


async def test_chunks_are_sent_together(scene, monkeypatch):
    sent: list[int] = []
    emit = RedisBroker.emit

    async def counted(self: Any, batches: Any) -> Any:
        sent.extend(each.count for each in batches)
        return await emit(self, batches)

    monkeypatch.setattr(RedisBroker, "emit", counted)
    made = await scene.app.enqueue(Talk(words=3 * BATCH_CHUNKS))
    async with working(scene.app):
        assert len(await scene.follow(made.id)) == 3 * BATCH_CHUNKS
    assert sum(sent) == 3 * BATCH_CHUNKS
    assert len(sent) <= 6


async def test_plain_jobs_send_nothing(scene, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(RedisBroker, "emit", lambda *args: calls.append(args))
    made = await scene.app.enqueue(Talk(words=0))
    async with working(scene.app) as (worker,):
        await eventually(lambda: scene.contexts)
        await worker.stop()
        assert worker._in_flight.counts.done == 1
        assert worker._shared.outputs._task is None
    assert calls == []
    assert await scene.follow(made.id, follow=False) == []


async def test_results_are_what_they_were(ground, raw):
    app = App(settings=settings(raw, ground, lease=3.0))

    @app.handler(result_ttl=5)
    async def talk(_: Talk, ctx: Context) -> str:
        await ctx.emit("said")
        return "value"

    async with app, working(app):
        made = await app.enqueue(Talk())
        assert await app.result(made.id, timeout=20) == "value"
        assert [item.chunk async for item in app.output(made.id)] == ["said"]


async def test_a_run_whose_claim_was_lost_is_told(scene, ground, raw):
    made = await scene.app.enqueue(Talk(how="forever"))
    async with working(scene.app) as (worker,):
        await eventually(lambda: scene.contexts)
        await eventually(lambda: raw.xlen(f"stream:{{q}}:output:{made.id}"))
        (claim,) = list(worker._in_flight)
        ground.hand_over(claim, "another", count=claim.count + 1)
        with pytest.raises(ClaimLost, match="runs elsewhere"), anyio.fail_after(20):
            while True:
                await scene.contexts[0].emit("late")
                await anyio.sleep(0.01)
        assert "late" not in await scene.follow(made.id, follow=False)
        await eventually(lambda: not worker._shared.outputs.runs)


async def test_nothing_is_taken_after_the_job_has_ended(scene):
    made = await scene.app.enqueue(Talk())
    async with working(scene.app) as (worker,):
        assert await scene.follow(made.id) == ["1.0", "1.1", "1.2"]
        await eventually(lambda: not worker._in_flight)
        with pytest.raises(ClaimLost, match="had ended"):
            await scene.contexts[0].emit("leaked")


async def test_sync_handlers_emit_from_their_threads(ground, raw):
    app = App(settings=settings(raw, ground, lease=3.0))

    @app.handler
    def talk(payload: Talk, ctx: Context) -> None:
        def half(name: str) -> None:
            for number in range(payload.words):
                ctx.emit_blocking([name, number])

        beside = threading.Thread(target=half, args=("b",))
        beside.start()
        half("a")
        beside.join()

    async with app, working(app):
        made = await app.enqueue(Talk(words=2000))
        with anyio.fail_after(30):
            got = [item.chunk async for item in app.output(made.id)]
    for name in "ab":
        assert [number for each, number in got if each == name] == list(range(2000))


async def test_emit_blocking_refuses_the_event_loop(ground, raw):
    app = App(settings=settings(raw, ground, lease=3.0))
    refused: list[str] = []

    @app.handler
    async def talk(_: Talk, ctx: Context) -> None:
        try:
            ctx.emit_blocking("x")
        except UsageError as error:
            refused.append(str(error))

    async with app, working(app):
        await app.enqueue(Talk())
        await eventually(lambda: refused)
    assert "await ctx.emit" in refused[0]


async def test_where_to_begin(scene):
    for bad in (-1, 2**53, 1.5, "1", True):
        with pytest.raises(UsageError, match="position"):
            await scene.follow("j", after=bad)
    with pytest.raises(UsageError, match="queue="):
        async with App(settings=scene.app.resolve(None)) as other:
            await anext(other.output("j"))
    with pytest.raises(UsageError, match="async with app"):
        await anext(App(settings=Settings(redis_url="redis://127.0.0.1:1")).output("j"))


class Taking:
    """`Outputs` that note what is sent in each call, and may do something meanwhile."""

    def __init__(self, meanwhile: Callable[[int], None]) -> None:
        self.calls: list[dict[str, int]] = []
        self.meanwhile = meanwhile

    async def emit(self, batches: Any) -> list[Settled | None]:
        self.calls.append({each.job_id: each.count for each in batches})
        self.meanwhile(len(self.calls))
        return [Settled.SETTLED] * len(batches)

    def output(self, queues: Any, job_id: str, *, log: bool = False) -> Any:
        return self


def some_runs(buffer: OutputBuffer, count: int) -> list[RunOutput]:
    claims = [Claim("q", "normal", "stream:{q}", f"1-{number}".encode(), 1, b"", b"") for number in range(count)]
    return [buffer.begin(claim, str(number), 1) for number, claim in enumerate(claims)]


async def test_what_is_emitted_while_others_are_sent_goes_with_its_own_turn():
    """A chunk waits for one round of all jobs at most, not for what is left of one and all of the next."""
    outputs = Taking(lambda call: runs[-1].add(packed("late")) if call == 1 else None)
    buffer = OutputBuffer(outputs)
    runs = some_runs(buffer, 3 * TOGETHER)
    for run in runs:
        await buffer.add(run, packed("x"))
    await buffer.flush()
    assert [len(call) for call in outputs.calls] == [TOGETHER] * 3
    assert outputs.calls[-1][runs[-1].job_id] == 2
    assert not any(run.waiting for run in runs)
    await buffer.close()


async def test_a_job_that_ends_sends_its_own_output_alone():
    outputs = Taking(lambda _: None)
    buffer = OutputBuffer(outputs)
    runs = some_runs(buffer, 5)
    for run in runs:
        await buffer.add(run, packed("x"))
    await buffer.flush_of([runs[3].claim])
    assert outputs.calls == [{"3": 1}]
    await buffer.flush()
    assert outputs.calls[1:] == [{"0": 1, "1": 1, "2": 1, "4": 1}]
    await buffer.close()


async def test_what_could_not_be_sent_is_sent_again_and_in_order():
    def fail_once(call: int) -> None:
        if call == 2:
            raise Unreachable("away")

    outputs = Taking(fail_once)
    buffer = OutputBuffer(outputs)
    runs = some_runs(buffer, 2 * TOGETHER)
    for run in runs:
        await buffer.add(run, packed("x"))
    with pytest.raises(Unreachable):
        await buffer.flush()
    runs[-1].add(packed("y"))  # not in the batch that may have been stored
    await buffer.flush()
    assert outputs.calls[1] == outputs.calls[2]
    await buffer.flush()
    assert outputs.calls[3:] == [{runs[-1].job_id: 1}]
    await buffer.close()


class Told:
    """An `OutputReader` of three batches, each of which is notified when it is stored."""

    def __init__(self) -> None:
        self.stored, self.reads = 0, list[int]()

    async def kept(self) -> bytes | None:
        return None

    async def heard(self, timeout: float) -> bytes | None:
        return None

    async def read(self, after: int) -> list[OutputEntry]:
        self.reads.append(after)
        return [OutputEntry(n, 1, 1, n, b"\x91\xa1x") for n in range(after + 1, self.stored + 1)]

    async def heard_of(self, timeout: float) -> Literal["output", "end", "look"]:
        self.stored += 1
        return "output" if self.stored <= 3 else "end"


async def test_a_reader_asks_once_for_each_notification_and_reads_all_after_the_end():
    reader = Told()
    items = [item.position async for item in results.follow(reader, None, ("q", "a"), 0)]
    assert items == [1, 2, 3, 4]
    assert reader.reads == [0, 0, 1, 2, 3, 4]  # at the start, of each notification, and to the end
