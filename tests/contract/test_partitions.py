"""One queue over several partitions: what holds for a queue holds for all of it, and what is held by a partition says so."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from typing import Any

import anyio
import pytest
from msgspec import structs

from streamworker import App, Discard, Payload, Settings, codec
from streamworker.broker import SettleRequest, scripts
from streamworker.broker.keys import of_line
from streamworker.broker.partitions import partition_of
from streamworker.job import Claim, Done, Drop, Held, PackedJob, ReleaseAt, Settled
from tests.conftest import eventually
from tests.contract.helpers import dead, document, done, job, names, recover, retry, settings, working

N = 4
FOUR: dict[str, Any] = {"partitions": (("q", N, ()),)}
IDS = [f"job-{number}" for number in range(40)]


class Item(Payload, kind="item", queue="q"):
    n: int


class Step(Payload, kind="step", queue="q", order_by="key"):
    key: str
    n: int


def home(value: str, count: int = N) -> str:
    """The documented hash, said once more."""
    number = int.from_bytes(hashlib.sha1(value.encode()).digest()[:4]) % count
    return f"q#{number}" if number else "q"


def homes(claims: list[Claim]) -> dict[str, str]:
    return {name: claim.home for name, claim in zip(names(claims), claims, strict=True)}


def ordered(name: str, key: str, **fields: Any) -> PackedJob:
    body = json.dumps({"id": name, "order_key": key, "payload": {}, **fields}).encode()
    return PackedJob(name, "q", "normal", body, key_ttl=60.0, lined=True)


def in_order(claim: Claim) -> SettleRequest:
    told = json.loads(claim.body or b"{}")
    return SettleRequest(claim, Done(), note=b"{}", job_id=told["id"], kind="k", order=told["order_key"])


def a_key(number: int, count: int = N, other: int | None = None, before: int = 1) -> str:
    """A value whose home is this partition, and was another one before."""
    return next(
        f"k{n}" for n in range(10_000)
        if partition_of(f"k{n}", count) == number and (other is None or partition_of(f"k{n}", before) == other)
    )  # fmt: skip


async def everything(broker: Any, limit: int = 100) -> list[Claim]:
    claims: list[Claim] = []
    while found := await broker.claim(limit, 0, claims):
        claims += found
    return claims


# -- where jobs are


def test_the_hash_is_the_documented_one():
    assert [partition_of(value, 8) for value in ("customer-17", "", "Zürich", "invoice:1")] == [1, 6, 2, 2]
    assert all(home(value) == f"q#{partition_of(value, N)}".removesuffix("#0") for value in IDS)


async def test_jobs_are_in_the_partitions_of_their_ids_and_come_out_as_of_one_queue(broker_factory, ground):
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([job(name) for name in IDS])
        claims = await everything(broker)
        assert homes(claims) == {name: home(name) for name in IDS}
        assert {claim.queue for claim in claims} == {"q"}
        assert await broker.settle([done(claim) for claim in claims]) == [Settled.SETTLED] * len(IDS)
        assert all(ground.empty(each) for each in ("q", "q#1", "q#2", "q#3"))


async def test_order_key_then_fair_key_then_deduplication_key_say_where(broker_factory):
    def made(name: str, **fields: Any) -> PackedJob:
        body = json.dumps({"id": name, "payload": {}, "hop": 1, **fields}).encode()
        lined = "order_key" in fields or "fair_key" in fields
        return PackedJob(name, "q", "normal", body, key=fields.get("key"), key_ttl=60.0, lined=lined)

    async with broker_factory("w", **FOUR) as broker:
        for n in range(12):
            await broker.publish([
                made(f"o{n}", order_key=f"order-{n}", fair_key=f"fair-{n}", key=f"key-o-{n}"),
                made(f"f{n}", fair_key=f"fair-{n}", key=f"key-f-{n}"), made(f"k{n}", key=f"key-k-{n}"), made(f"i{n}"),
            ])  # fmt: skip
        claims = []
        while found := await broker.claim(100, 0, claims):
            claims += found
            await broker.settle(
                [in_order(each) if "order_key" in json.loads(each.body) else done(each) for each in found]
            )
    by = {"o": "order-{}", "f": "fair-{}", "k": "key-k-{}", "i": "i{}"}
    assert homes(claims) == {f"{c}{n}": home(by[c].format(n)) for c in by for n in range(12)}


async def test_what_other_producers_put_into_any_partition_runs(broker_factory, ground):
    async with broker_factory("w", **FOUR) as broker:
        for number, where in enumerate(("q", "q#1", "q#2", "q#3")):
            ground.push(document(f"there-{number}"), queue=where)
        assert sorted(names(await everything(broker))) == [f"there-{number}" for number in range(4)]


async def test_partition_zero_is_the_queue_as_it_was(broker_factory, ground):
    """What is there when a queue gets partitions stays where it is, and runs."""
    async with broker_factory("before") as broker:
        await broker.publish([job("old"), job("older", delay=0.05), job("dies")])
        claims = await broker.claim(10, 0, ())
        await broker.settle([dead(claim) for claim in claims if names([claim]) == ["dies"]])
        await broker.settle([retry(claim, 0) for claim in claims if names([claim]) == ["old"]])
        assert await broker.leave()
    async with broker_factory("after", **FOUR) as broker:
        await anyio.sleep(0.06)
        await broker.promote()
        assert sorted(names(await everything(broker))) == ["next", "older"]
        assert (await broker.depth())[0].dead == 1


# -- claims


async def test_claims_rotate(broker_factory):
    """A partition with many jobs holds up none of the others."""
    async with broker_factory("w", **FOUR) as broker:
        many = [codec.new_id() for _ in range(400)]
        await broker.publish([job(name) for name in many if home(name) == "q"])
        few = [name for name in IDS if home(name) != "q"][:6]
        await broker.publish([job(name) for name in few])
        seen: set[str] = set()
        for _ in range(8):
            claims = await broker.claim(2, 0, ())
            seen |= set(names(claims))
            await broker.settle([done(claim) for claim in claims])
        assert seen >= set(few)


async def test_a_higher_level_of_any_partition_comes_first_on_one_server(broker_factory, server):
    if hasattr(server, "nodes"):
        pytest.skip("priority holds on each node of a cluster")
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish(
            [job(name, level="low") for name in IDS[:20]] + [job(name, level="high") for name in IDS[20:]]
        )
        assert set(names(await broker.claim(20, 0, ()))) == set(IDS[20:])


async def test_a_cap_counts_all_partitions(broker_factory):
    async with broker_factory("w", queues=(("q", 3),), **FOUR) as broker:
        await broker.publish([job(name) for name in IDS])
        claims = await everything(broker)
        assert len(claims) == 3
        await broker.settle([done(claims[0])])
        assert len(await broker.claim(100, 0, claims[1:])) == 1


async def test_a_paused_partition_does_not_pause_the_others(broker_factory, raw, ground):
    async with broker_factory("w", queues=(("q", 30),), **FOUR) as broker:
        await broker.publish([job(name) for name in IDS])
        raw.hset(ground.keys("q").meta, "paused", "by hand")
        claims = await everything(broker)
        assert sorted(names(claims)) == sorted(name for name in IDS if home(name) != "q")


async def test_expired_leases_of_all_partitions_are_reclaimed(broker_factory, ground):
    async with broker_factory("dies", **FOUR) as one, broker_factory("w", **FOUR) as other:
        await one.publish([job(name) for name in IDS])
        claims = await everything(one)
        for claim in claims:
            ground.hand_over(structs.replace(claim, queue=claim.home), "dies", idle=10_000_000)
        for number in range(N):
            ground.forget_pace(f"q#{number}" if number else "q")
        found = await recover(other, ground)
        while more := await other.claim(100, 0, found):
            found += more
        assert sorted(names(found)) == sorted(IDS)
        assert {claim.count for claim in found} == {2}


async def test_what_a_lost_reply_claimed_is_found(broker_factory):
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([job(name) for name in IDS])
        claims = await everything(broker)
        assert sorted(names(await broker.own_pending(claims[:5]))) == sorted(names(claims[5:]))


async def test_a_worker_starts_while_the_server_is_out_of_memory(broker_factory, raw):
    async with broker_factory("first", **FOUR):
        pass
    raw.config_set("maxmemory", 1)
    try:
        async with broker_factory("w", **FOUR) as broker:
            assert await broker.claim(10, 0, ()) == []
    finally:
        raw.config_set("maxmemory", 0)


# -- delay, deduplication, cancellation


async def test_delayed_and_retried_jobs_stay_in_their_partitions(broker_factory):
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([job(name, delay=0.02) for name in IDS])
        await anyio.sleep(0.03)
        await broker.promote()
        claims = await everything(broker)
        assert homes(claims) == {name: home(name) for name in IDS}
        await broker.settle([retry(claim, 0, body=claim.body) for claim in claims])
        await broker.promote()
        assert homes(await everything(broker)) == {name: home(name) for name in IDS}


@pytest.mark.parametrize("kept", ["for a time", "until it ends"])
async def test_a_deduplication_key_counts_in_all_of_the_queue(broker_factory, kept):
    held = Held(60.0, False, 0.0, 0.0) if kept == "until it ends" else None

    def keyed(name: str, key: str) -> PackedJob:
        body = json.dumps({"id": name, "payload": {}, "key": key, "unique": "done" if held else None}).encode()
        return PackedJob(name, "q", "normal", body, key=key, key_ttl=60.0, held=held)

    async with broker_factory("w", **FOUR) as broker:
        first = await broker.publish([keyed(f"a{n}", f"key-{n}") for n in range(20)])
        second = await broker.publish([keyed(f"b{n}", f"key-{n}") for n in range(20)])
        assert all(answer.new for answer in first)
        assert [(answer.id, answer.new) for answer in second] == [(f"a{n}", False) for n in range(20)]
        assert len(await everything(broker)) == 20


async def test_cancelled_jobs_are_found_wherever_they_are(broker_factory, raw):
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([job(name, delay=60) for name in IDS[:20]] + [job(name) for name in IDS[20:]])
        for name in IDS[:20]:
            assert await broker.cancel("q", name)
        assert not any(raw.exists(f"stream:{{{each}}}:cancelled") for each in ("q", "q#1", "q#2", "q#3"))
        running = await broker.claim(5, 0, ())
        for name in IDS[20:]:
            assert not await broker.cancel("q", name)
        claims = await everything(broker)
        assert all(claim.cancelled for claim in claims if claim not in running)
        assert sorted(names(await broker.cancelled(running))) == sorted(names(running))
        ends = [SettleRequest(claim, Drop(), None, names([claim])[0], "k") for claim in claims]
        assert set(await broker.settle(ends)) == {Settled.SETTLED}
        await broker.settle([SettleRequest(claim, Drop(), None, names([claim])[0], "k") for claim in running])
        assert not any(raw.exists(f"stream:{{{each}}}:cancelled") for each in ("q", "q#1", "q#2", "q#3"))


# -- order keys, and growth


async def test_order_holds_wherever_producers_put_jobs(broker_factory, ground):
    """Jobs of a key that were put into other partitions move to the key's own, and wait for their turn there."""
    key = a_key(2)
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([ordered("a", key)])
        for number, where in enumerate(("q", "q#1", "q#3")):
            ground.push(ordered(f"x{number}", key).body, queue=where)
        ran: list[str] = []
        with anyio.fail_after(20):
            while len(ran) < 4:
                broker._move_at = 0.0
                await broker.promote()
                claims = await broker.claim(10, 0, ())
                for claim in claims:
                    told = json.loads(claim.body)
                    if (await broker.turns(claim.home, [(key, told["id"])]))[0]:
                        assert claim.home == "q#2"
                        ran.append(told["id"])
                        await broker.settle([in_order(claim)])
                    else:
                        await broker.settle(
                            [SettleRequest(claim, ReleaseAt(None, "turn"), claim.body, told["id"], "k")]
                        )
        assert ran[0] == "a"
        assert sorted(ran) == ["a", "x0", "x1", "x2"]
        for number in range(N):
            keys = ground.keys(f"q#{number}" if number else "q")
            assert not ground.raw.exists(keys.moving)
            assert not ground.raw.exists(keys.lines)


@pytest.mark.parametrize(("before", "at"), [(1, "q"), (2, "q#1")])
async def test_growth_keeps_the_order_of_a_key_that_is_held(broker_factory, before, at):
    key = a_key(3, other=before - 1, before=before)
    old = {"partitions": (("q", before, ()),)}
    async with broker_factory("old", **old) as broker:
        await broker.publish([ordered("first", key), ordered("second", key)])
        (first,) = await broker.claim(10, 0, ())
        async with broker_factory("new", **FOUR) as grown:
            await grown.publish([ordered("third", key)])
            await broker.publish([ordered("fourth", key)])
            assert await grown.claim(10, 0, ()) == []
            ran = names([first])
            await broker.settle([in_order(first)])
            for _ in range(3):
                (claim,) = await grown.claim(10, 0, ())
                ran += names([claim])
                assert claim.home == at
                await grown.settle([in_order(claim)])
            assert ran == ["first", "second", "third", "fourth"]
            await grown.publish([ordered("fifth", key)])
            (claim,) = await grown.claim(10, 0, ())
            assert claim.home == "q#3"
            # A producer that knows nothing of the growth adds to the old home, where the key cannot be taken any more.
            await broker.publish([ordered("sixth", key), ordered("seventh", key)])
            await grown.publish([ordered("eighth", key)])
            assert await grown.claim(10, 0, [claim]) == []
            grown._move_at = 0.0
            await grown.promote()
            ran = names([claim])
            while claim is not None:
                await grown.settle([in_order(claim)])
                found = await grown.claim(10, 0, ())
                claim = found[0] if found else None
                ran += names(found)
                assert {each.home for each in found} <= {"q#3"}
            assert ran == ["fifth", "sixth", "seventh", "eighth"]


async def test_a_delayed_job_of_an_old_home_waits_for_its_turn_in_the_new_one(broker_factory):
    key = a_key(1, other=0, before=1)
    async with broker_factory("old") as broker, broker_factory("new", **FOUR) as grown:
        await broker.publish([structs.replace(ordered("later", key), delay=0.02)])
        await grown.publish([ordered("now", key)])
        await anyio.sleep(0.03)
        await broker.promote()
        (claim,) = await grown.claim(10, 0, ())
        assert (names([claim]), claim.home) == (["now"], "q#1")
        grown._move_at = 0.0
        await grown.promote()
        assert await grown.claim(10, 0, [claim]) == []
        await grown.settle([in_order(claim)])
        (claim,) = await grown.claim(10, 0, ())
        assert (names([claim]), claim.home) == (["later"], "q#1")


async def test_a_moved_job_is_stored_once_whoever_moves_it_and_wherever_he_dies(broker_factory, ground):
    """Two workers that move the same jobs, and one that died after it had stored the first."""
    key = a_key(2)
    async with broker_factory("w", **FOUR) as one, broker_factory("v", **FOUR) as other:
        shape = ground.keys("q").shape
        for n in range(30):
            await one._session.run(
                scripts.ARRIVE, [ground.keys("q").meta, ground.keys("q").arrived],
                [shape, f"t{n}", "normal", ordered(f"m{n}", key).body, 60_000],
            )  # fmt: skip
        token, element = await one._session.run(scripts.DEPART, [ground.keys("q").meta], [key, b""])
        target = ground.keys("q#2")
        origin = b" ".join((b"q", key.encode(), token))
        await one._session.run(
            scripts.ARRIVE, [target.meta, target.arrived], [shape, origin, "normal", of_line(element)[2], 60_000]
        )
        await one.publish([ordered("behind", key)])
        async with anyio.create_task_group() as group:
            for broker in (one, other):
                broker._mover._next = 3
                group.start_soon(broker._mover.move)
        ran: list[str] = []
        while claims := await one.claim(10, 0, ()):
            assert len(claims) == 1
            ran += names(claims)
            await one.settle([in_order(claims[0])])
        assert sorted(ran) == sorted([*(f"m{n}" for n in range(30)), "behind"])
        assert [name for name in ran if name != "behind"] == [f"m{n}" for n in range(30)]


async def test_growth_keeps_deduplication_keys(broker_factory):
    keys = [f"key-{n}" for n in range(20)]

    def keyed(name: str, key: str) -> PackedJob:
        return job(name, key=key)

    async with broker_factory("old", partitions=(("q", 2, ()),)) as broker, broker_factory("new", **FOUR) as grown:
        await broker.publish([keyed(f"a{key}", key) for key in keys])
        answers = await grown.publish([keyed(f"b{key}", key) for key in keys])
        assert [(answer.id, answer.new) for answer in answers] == [(f"a{key}", False) for key in keys]


# -- a fleet


class Log:
    """What ran, by order key, and how many at once."""

    def __init__(self) -> None:
        self.ran: dict[str, list[int]] = defaultdict(list)
        self.at_once: Counter[str] = Counter()
        self.most = 0


def app_of(chosen: Settings, log: Log) -> App:
    app = App(settings=chosen)

    @app.handler(timeout=30)
    async def step(payload: Step) -> None:
        log.at_once[payload.key] += 1
        log.most = max(log.most, log.at_once[payload.key])
        await anyio.sleep(0.002)
        log.ran[payload.key].append(payload.n)
        log.at_once[payload.key] -= 1

    @app.handler(timeout=30)
    async def item(payload: Item) -> None:
        if payload.n < 0:
            raise Discard("as asked")
        log.ran["items"].append(payload.n)

    return app


async def test_a_fleet_grows_under_load(raw, ground):
    """Producers and workers of 1, 2 and 4 partitions at once: all runs, and each key in the order of its producer."""
    log, keys = Log(), 24
    apps = [app_of(settings(raw, ground, lease=2, concurrency=20, partitions=f"q={n}"), log) for n in (1, 2, 4)]
    sent: dict[str, int] = Counter()

    async def produce(app: App, mine: range, times: int) -> None:
        for _ in range(times):
            for number in mine:
                key = f"k{number}"
                await app.enqueue(Step(key=key, n=sent[key]))
                sent[key] += 1
            await app.enqueue(Item(n=sum(sent.values())))

    async with apps[0], apps[1], apps[2], working(apps[0]):
        await produce(apps[0], range(keys), 3)
        async with working(apps[1]):
            await produce(apps[1], range(keys), 3)
            async with working(apps[2]):
                # Each producer has keys of its own: between processes there is no order.
                async with anyio.create_task_group() as group:
                    for number, app in enumerate(apps):
                        group.start_soon(produce, app, range(number, keys, 3), 5)
                await produce(apps[2], range(keys), 3)
                total = sum(sent.values())
                await eventually(lambda: sum(len(ran) for key, ran in log.ran.items() if key != "items") >= total)
    assert log.most == 1
    assert {key: ran for key, ran in log.ran.items() if key != "items"} == {
        key: list(range(count)) for key, count in sent.items()
    }
    assert len(log.ran["items"]) == 3 + 3 + 15 + 3


# -- operators


@pytest.fixture
async def operator(ground, raw):
    async with App(settings=settings(raw, ground, partitions="q=4")).operator() as operator:
        yield operator


async def rows(listing: Any, *args: Any, **options: Any) -> list[Any]:
    found, after = [], ""
    while after is not None:
        page = await listing(*args, after, **options)
        found, after = found + page.rows, page.after
    return found


async def test_operators_see_one_queue(broker_factory, operator):
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([job(name) for name in IDS])
        claims = await everything(broker)
        await broker.settle([dead(claim, job_id=names([claim])[0]) for claim in claims[:10]])
        await broker.settle([retry(claim, 4e9, job_id=names([claim])[0], body=claim.body) for claim in claims[10:20]])
        await broker.settle([done(claim) for claim in claims[20:30]])
        await broker.publish([job(f"ready-{n}") for n in range(10)])
        assert await operator.queues() == ["q"]
        (depth,) = await operator.depth(["q"])
        assert (depth.queue, depth.ready, depth.running, depth.delayed, depth.dead) == ("q", 10, 10, 10, 10)
        pending = await rows(operator.pending, "q")
        assert sorted(row.job_id for row in pending) == sorted(names(claims[30:]))
        assert {row.queue for row in pending} == {"q"}
        assert len({row.entry_id for row in pending}) == 10
        for row in pending:
            (again,) = await rows(operator.pending, "q", only=row.entry_id)
            assert again.job_id == row.job_id
        letters = await rows(operator.dead, "q")
        assert sorted(row.job_id for row in letters) == sorted(names(claims[:10]))
        assert len(await operator.errors("q")) == 10
        assert sorted(row.job_id for row in await rows(operator.delayed, "q")) == sorted(names(claims[10:20]))
        assert sorted(row.job_id for row in await rows(operator.ready, "q")) == sorted(f"ready-{n}" for n in range(10))
        (worker,) = await operator.workers(["q"])
        assert (worker.worker_id, worker.pending, worker.queues) == ("w", 10, ["q"])
        assert {each.queue for each in await operator.waiting(["q"], 1000)} == {"q"}


async def test_operators_act_on_jobs_of_any_partition(broker_factory, operator):
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([job(name) for name in IDS])
        claims = await everything(broker)
        await broker.settle([dead(claim, job_id=names([claim])[0]) for claim in claims[:20]])
        letters = await rows(operator.dead, "q")
        assert all([await operator.replay(row) for row in letters[:10]])
        assert all([await operator.erase(row) for row in letters[10:]])
        assert not any([await operator.erase(row) for row in letters])
        pending = await rows(operator.pending, "q")
        assert all([await operator.release(row) for row in pending[:7]])
        assert all([await operator.bury(row, "by hand") for row in pending[7:14]])
        assert all([await operator.drop(row) for row in pending[14:]])
        (depth,) = await operator.depth(["q"])
        assert (depth.ready, depth.running, depth.dead) == (17, 0, 7)
        await broker.publish([job(f"later-{n}", delay=900) for n in range(12)])
        parked = await rows(operator.delayed, "q")
        assert all([(await operator.delayed_job("q", row.handle)).job_id == row.job_id for row in parked])
        assert all([await operator.run_now(row) for row in parked[:6]])
        assert all([await operator.forget(row) for row in parked[6:]])
        assert await operator.purge("q", "ready", 20) == 20
        (depth,) = await operator.depth(["q"])
        assert (depth.ready, depth.delayed) == (3, 0)


async def test_operators_need_no_settings_of_partitions(broker_factory, raw, ground):
    """They find out from Redis, also that a queue has grown beyond their settings; `check` is about the settings."""
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([job(name) for name in IDS])
        claims = await everything(broker)
        await broker.settle([dead(claim, job_id=names([claim])[0]) for claim in claims[::2]])
        for told in ("", "q=2"):
            async with App(
                settings=settings(raw, ground, **({"partitions": told} if told else {}))
            ).operator() as found:
                (depth,) = await found.depth(["q"])
                assert (depth.running, depth.dead) == (20, 20) if not told else (10, 10)
                letters = await rows(found.dead, "q")
                assert told or len({row.handle.partition("#")[2] for row in letters}) == N
                assert all([await found.replay(row) for row in letters[:10]])
                assert all([await found.drop(row) for row in (await rows(found.pending, "q"))[:10]])
                (finding,) = [each for each in await found.findings(["q"]) if each.subject == "partitions"]
                assert f"q has 4 partitions, of which {told[2:] or 1} are served here" in finding.sentence


async def test_pause_and_check_are_about_all_of_the_queue(broker_factory, operator, raw, ground):
    async with broker_factory("w", **FOUR) as broker:
        await broker.publish([job(name) for name in IDS])
        assert await operator.pause("q", "for a test")
        assert not await operator.pause("q", "again")
        assert await operator.paused("q") == "for a test"
        assert await broker.claim(100, 0, ()) == []
        assert await operator.resume("q")
        assert len(await everything(broker)) == len(IDS)
        assert not [each for each in await operator.findings(["q"]) if each.subject == "partitions"]
        async with App(settings=settings(raw, ground, partitions="q=2")).operator() as behind:
            (found,) = [each for each in await behind.findings(["q"]) if each.subject == "partitions"]
        assert found.severity == "error"
        assert "q has 4 partitions, of which 2 are served here" in found.sentence
        assert "STREAMWORKER_PARTITIONS=q=4" in found.sentence
