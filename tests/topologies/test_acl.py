"""The ACL lines of docs/security.md, as they stand there: enough for what each user does, and for nothing else."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from streamworker import App, Context, Discard, Payload, QueueWorker, Retry, Settings, Snooze
from streamworker.bridge import BridgeLoop
from streamworker.broker.claim import Options, StreamOptions
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.lists import ListBroker
from streamworker.broker.operator import ListOperator, StreamOperator
from streamworker.broker.order import OrderSweeper
from streamworker.broker.redis.client import RedisAddress
from streamworker.errors import ConfigurationError, StreamworkerError
from streamworker.telemetry.run_history import DAY, HOUR, HistoryQuery
from streamworker.views.listing import DEAD, DELAYED, PENDING, Selection
from tests.cli.conftest import JOBS, Program
from tests.conftest import Server, eventually, eventually_blocking
from tests.contract.ground import GROUNDS, GROUP, StreamGround
from tests.contract.helpers import dead, job, names

DOCS = Path(__file__).parents[2] / "docs" / "security.md"
Q = "stream:{q}"


def acl_lines(namespace: str = "") -> list[list[str]]:
    """The words of each line of the docs, with the namespace before its patterns; legacy lists have none."""
    lines = re.findall(r"^ACL SETUSER (.+)$", DOCS.read_text(), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["worker", "producer", "adder", "inspector", "bridge", *BESIDES]
    put = [[re.sub(r"^([~&])", rf"\g<1>{namespace}", word) for word in line.split()] for line in lines]
    lists = f"~{namespace}queue:*"
    return [[*words, "~queue:*"] if namespace and lists in words else words for words in put]


BESIDES = ["worker", "producer", "inspector"]
"""Whose rights in list mode stand in lines of their own, at the end."""


class Users:
    """A server with the users of the docs, and its administrator's client."""

    def __init__(self, server: Server, namespace: str = "", mode: str = "stream") -> None:
        self.server, self.raw, self.namespace = server, server.client(), namespace
        self.ground = GROUNDS[mode](self.raw)
        lines = acl_lines(namespace)
        for line in lines if mode == "list" else lines[: -len(BESIDES)]:
            self.raw.execute_command("ACL SETUSER", *line)

    def url(self, name: str) -> str:
        return f"redis://{name}:SECRET@127.0.0.1:{self.server.port}/0"

    def as_(self, name: str) -> redis.Redis:
        return redis.Redis.from_url(self.url(name), protocol=2)

    def denials(self) -> list[tuple[str, str, str]]:
        """What was denied, to whom, and why; a lost client name is nobody's loss."""
        log = self.raw.acl_log()
        return [(each["username"], each["reason"], each["object"]) for each in log]


@pytest.fixture(params=["", "shop:"])
def users(own_server: Server, request: pytest.FixtureRequest) -> Iterator[Users]:
    made = Users(own_server, request.param)
    yield made
    made.raw.close()


@pytest.fixture(params=[("", "stream"), ("shop:", "stream"), ("", "list"), ("shop:", "list")])
def moded(own_server: Server, request: pytest.FixtureRequest) -> Iterator[Users]:
    made = Users(own_server, *request.param)
    yield made
    made.raw.close()


class Task(Payload, kind="task", queue="q"):
    name: str


async def test_a_worker_does_everything_a_worker_does(moded):
    users, ground, namespace, raw = moded, moded.ground, moded.namespace, moded.raw
    keys = ground.keys("q", namespace)
    ran: list[str] = []
    url = users.url("worker")
    app = App(settings=Settings(redis_url=url, mode=ground.mode, namespace=namespace, lease=0.5, concurrency=5))

    @app.handler(max_attempts=2)
    async def task(payload: Task, ctx: Context) -> None:
        ran.append(payload.name)
        match payload.name:
            case "emits":
                await ctx.emit("said")
            case "retry" if ctx.attempt == 1:
                raise Retry(after=0.05)
            case "snooze" if ran.count("snooze") == 1:
                raise Snooze(0.05)
            case "dead":
                raise Discard("no")
            case "enqueues":
                await app.enqueue_many([Task(name="child"), app.job(Task(name="late child"), delay=0.05, key="k")])

    async with app:
        await app.enqueue_many([Task(name=name) for name in ("plain", "retry", "snooze", "dead", "enqueues")])
        talker = await app.enqueue(Task(name="emits"))
        await app.enqueue(Task(name="delayed"), delay=0.1)
        await app.enqueue(Task(name="high"), priority="high", key="high")
        # What a worker that died left behind: a name, and a job under it.
        raw.execute_command(*keys.adding("normal", b'{"id":"orphan","payload":{"name":"orphan"}}'))
        gone = ground.broker(users.server.url, (("q", None),), namespace=namespace, lease=0.5)
        await gone.open()
        await gone.join("gone")
        assert len(await gone.claim(100, 0, ())) > 1
        await gone.close()
        worker = QueueWorker(app, redis=None, database=None, services=None)
        running = asyncio.create_task(worker.start())
        expected = {"plain", "retry", "snooze", "dead", "enqueues", "child", "late child", "delayed", "high", "orphan"}
        twice = {"retry", "snooze"}
        await eventually(
            lambda: running.done() or (expected <= set(ran) and all(ran.count(name) > 1 for name in twice)), 15
        )
        await eventually(lambda: [c for c in raw.client_list() if c["cmd"] == "subscribe"])

        async def tidied() -> bool:  # once the name has been silent for two leases
            worker._broker._tidy_at = 0.0
            await worker._broker.promote()
            return not [name for name in left_behind(raw, keys) if name == "gone"]

        await eventually(tidied)
        assert [item.chunk async for item in app.output(talker.id)] == ["said"]
        await worker.stop()
        await running
    assert (ran.count("retry"), ran.count("snooze"), ran.count("plain")) == (2, 2, 1)
    assert raw.xlen(keys.dead) == 1
    assert left_behind(raw, keys) == []
    assert not raw.keys("*streamworker:worker:*")
    assert users.denials() == []


def left_behind(raw: redis.Redis, keys: QueueKeys) -> list[str]:
    """Names of workers that lie on the server."""
    if isinstance(keys, ListKeys):
        return [name.decode().partition(":claimed:")[2] for name in raw.keys(f"{keys.namespace}queue:*:claimed:*")]
    return [each["name"].decode() for place in keys.streams for each in raw.xinfo_consumers(place, GROUP)]


async def test_a_producer_and_an_inspector_of_lists(own_server):
    users = Users(own_server, "", "list")
    app = App(settings=Settings(redis_url=users.url("producer"), mode="list"))
    async with app:
        await app.enqueue_many([Task(name="a"), app.job(Task(name="b"), delay=60), app.job(Task(name="c"), key="k")])
        await app.enqueue(Task(name="d"))
    gone = users.ground.broker(users.server.url, (("q", None),))
    await gone.open()
    await gone.join("gone")
    first, *_ = await gone.claim(2, 0, ())
    await gone.settle([dead(first)])
    await gone.close()
    before = contents(users.raw)
    options = Options(queues=(("q", None),))
    operator = ListOperator(RedisAddress(users.url("inspector")), options)
    await operator.open()
    assert await operator.queues() == ["q"]
    everything = Selection(queue="q")
    (pending,) = [entry async for entry in PENDING.chosen(operator, everything)]
    assert b"payload" in (await operator.body(pending) or b"")
    assert len([each async for each in DELAYED.chosen(operator, everything)]) == 1
    assert len([each async for each in DEAD.chosen(operator, everything)]) == 1
    assert [each.worker_id for each in await operator.workers(["q"])] == ["gone"]
    (depth,) = await operator.depth(["q"])
    assert (depth.ready, depth.running, depth.delayed, depth.dead) == (1, 1, 1, 1)
    assert await operator.departed(["q"]) == [1]
    assert await operator.waiting(["q"], 100)
    now = await operator.history.now()
    for queue, kind in ((None, None), ("q", None), ("q", "k")):
        assert not (await operator.history.read(HistoryQuery(HOUR, now - DAY, now, HOUR, queue, kind))).kinds
    assert users.denials() == []
    with pytest.raises(StreamworkerError, match="denies"):
        await operator.drop(pending)
    await operator.close()
    assert contents(users.raw) == before
    users.raw.close()


async def test_a_producer_enqueues_in_every_way_and_does_nothing_else(users, broker_of):
    namespace, raw = users.namespace, users.raw
    app = App(settings=Settings(redis_url=users.url("producer"), namespace=namespace))
    async with app:
        await app.enqueue(Task(name="plain"))
        await app.enqueue(Task(name="low"), priority="low")
        await app.enqueue(Task(name="delayed"), delay=60)
        assert (await app.enqueue(Task(name="keyed"), key="k")).new
        assert not (await app.enqueue(Task(name="keyed"), key="k")).new
        await app.enqueue_many([Task(name=str(n)) for n in range(10)])
    assert (raw.xlen(f"{namespace}{Q}"), raw.xlen(f"{namespace}{Q}:low")) == (12, 1)
    assert raw.zcard(f"{namespace}{Q}:due") == 1
    assert users.denials() == []
    q = namespace + Q
    raw.xgroup_create(q, GROUP, "0")
    with users.as_("producer") as client:
        for command in (
            ("XREADGROUP", "GROUP", GROUP, "me", "STREAMS", q, ">"), ("DEL", q), ("XRANGE", q, "-", "+"),
            ("XDEL", q, "1-1"), ("XACK", q, GROUP, "1-1"), ("HGETALL", f"{q}:bodies"), ("FLUSHALL",), ("KEYS", "*"),
            ("CONFIG", "GET", "*"), ("EVAL", "return redis.call('DEL', KEYS[1])", 1, q), ("SUBSCRIBE", f"{q}:due"),
            ("SET", "other", "x"), ("XADD", "other", "*", "a", "b"), ("PUBLISH", "other", "x"),
            ("EVAL", "return redis.call('SET', 'other', 'x')", 0),
        ):  # fmt: skip
            with pytest.raises(redis.ResponseError, match=r"(?i)permission|ACL failure|NOPERM"):
                client.execute_command(*command)
    assert raw.xlen(q) == 12
    with pytest.raises(ConfigurationError, match="extend the ACL"):
        async with broker_of(users.url("producer"), namespace=namespace):
            pass


class Bill(Payload, kind="bill", queue="billing"):
    n: int


async def test_an_adder_adds_jobs_to_its_queue_and_does_nothing_else(users):
    """XADD alone: what is left of a producer's rights where it is not trusted."""
    namespace, raw = users.namespace, users.raw
    billing = f"{namespace}stream:{{billing}}"
    app = App(settings=Settings(redis_url=users.url("adder"), namespace=namespace))
    async with app:
        await app.enqueue(Bill(n=1))
        await app.enqueue(Bill(n=2), priority="high")
        await app.enqueue(Bill(n=3), priority="low")
        assert [raw.xlen(billing + level) for level in ("", ":high", ":low")] == [1, 1, 1]
        assert users.denials() == []
        for refused in (
            app.enqueue(Bill(n=4), delay=60), app.enqueue(Bill(n=5), key="k"), app.enqueue_many([Bill(n=6), Bill(n=7)]),
            app.enqueue(Task(name="of another queue")),
        ):  # fmt: skip
            with pytest.raises(StreamworkerError, match="denies|permission"):
                await refused
    before = contents(raw)
    with users.as_("adder") as client:
        for command in (
            ("EVAL", "while true do end", 0), ("EVAL", "return redis.call('XADD', KEYS[1], '*', 'a', 'b')", 1, billing),
            ("HSET", f"{billing}:meta", "secret", "x"), ("HGET", f"{billing}:meta", "secret"), ("XRANGE", billing, "-", "+"),
            ("XADD", f"{billing}:dead", "*", "a", "b"), ("XADD", f"{namespace}{Q}", "*", "a", "b"), ("DEL", billing),
            ("SET", billing, "x"), ("XTRIM", billing, "MAXLEN", 0), ("XDEL", billing, "1-1"), ("KEYS", "*"), ("FLUSHALL",),
            ("XREADGROUP", "GROUP", GROUP, "me", "STREAMS", billing, ">"),
        ):  # fmt: skip
            with pytest.raises(redis.ResponseError, match=r"(?i)permission|ACL failure|NOPERM"):
                client.execute_command(*command)
        assert contents(raw) == before
        # What XADD itself can do to the one queue that it reaches, and no ACL forbids.
        client.execute_command("XADD", billing, "MAXLEN", 1, "*", "job", "{}")
        assert raw.xlen(billing) == 1
        client.execute_command("XADD", billing, "18446744073709551615-18446744073709551615", "job", "{}")
        with pytest.raises(redis.ResponseError):
            client.execute_command("XADD", billing, "*", "job", "{}")


def test_who_may_eval_can_hold_the_server_up(own_server):
    users = Users(own_server)
    users.raw.config_set("lua-time-limit", 10)
    stuck = users.as_("producer")
    looping = threading.Thread(target=lambda: suppressed(stuck, "EVAL", "while true do end", 0))
    looping.start()
    try:
        eventually_blocking(lambda: busy(users.raw), 10)
    finally:
        users.raw.script_kill()
        looping.join(10)
        stuck.close()
    assert users.raw.ping()
    users.raw.close()


def suppressed(client: redis.Redis, *command: Any) -> None:
    with suppress(redis.RedisError):
        client.execute_command(*command)


def busy(raw: redis.Redis) -> bool:
    """Whether a script keeps everybody else waiting."""
    try:
        raw.ping()
    except redis.ResponseError as error:
        return "BUSY" in f"{type(error).__name__} {error}".upper()
    return False


async def test_a_worker_reaches_no_key_that_is_not_a_queues(users):
    raw, q = users.raw, users.namespace + Q
    raw.set("other", "x")
    raw.xadd(q, {"job": "{}"})
    with users.as_("worker") as client:
        for command in (
            ("GET", "other"), ("DEL", "other"), ("SET", "other", "y"), ("XADD", "other", "*", "a", "b"),
            ("EVAL", "return redis.call('GET', 'other')", 0), ("PUBLISH", "other", "x"), ("SUBSCRIBE", "other"),
            ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("SCAN", 0), ("ACL", "LIST"), ("MONITOR",), ("SHUTDOWN",),
        ):  # fmt: skip
            with pytest.raises(redis.ResponseError, match=r"(?i)permission|ACL failure|NOPERM"):
                client.execute_command(*command)
        assert client.delete(q) == 1  # what it may do: everything, to what is a queue's
    assert raw.get("other") == b"x"


async def filled(users: Users, broker_of: Any) -> None:
    """Something of everything there is to list."""
    async with broker_of(users.url("worker"), namespace=users.namespace) as broker:
        await broker.publish([job("dead"), job("pending"), job("ready"), job("due", delay=60.0)])
        first, *_ = await broker.claim(2, 0, ())
        await broker.settle([dead(first)])
        await broker.beat({"pid": 1, "queues": "q"})


async def test_an_inspector_lists_everything_and_changes_nothing(users, broker_of):
    await filled(users, broker_of)
    options = StreamOptions(queues=(("q", None),), namespace=users.namespace)
    before = contents(users.raw)
    operator = StreamOperator(RedisAddress(users.url("inspector")), options)
    await operator.open()
    assert await operator.queues() == ["q"]
    everything = Selection(queue="q")
    (pending,) = [entry async for entry in PENDING.chosen(operator, everything)]
    some = Selection(queue="q", worker="w", ids=frozenset({pending.entry_id}))
    assert [entry async for entry in PENDING.chosen(operator, some)]
    assert b"pending" in (await operator.body(pending) or b"")
    (due,) = [each async for each in DELAYED.chosen(operator, everything)]
    (letter,) = [each async for each in DEAD.chosen(operator, everything)]
    assert [each.worker_id for each in await operator.workers(["q"])] == ["w"]
    (depth,) = await operator.depth(["q"])
    assert (depth.ready, depth.running, depth.delayed, depth.dead) == (1, 1, 1, 1)
    assert await operator.departed(["q"]) == [1]
    assert await operator.waiting(["q"], 100)
    now = await operator.history.now()
    for queue, kind in ((None, None), ("q", None), ("q", "k")):
        assert not (await operator.history.read(HistoryQuery(HOUR, now - DAY, now, HOUR, queue, kind))).kinds
    assert users.denials() == []
    findings = {finding.subject: finding for finding in await operator.findings(["q"])}
    assert findings["permissions"].severity == "error"  # it is no worker, and is told so
    assert findings["groups"].severity == findings["keys"].severity == findings["clock"].severity == "ok"
    for change in (
        operator.pause("q", "by me"), operator.resume("q"), operator.purge("q", "ready", 1), operator.release(pending), operator.bury(pending, "why"), operator.drop(pending), operator.run_now(due),
        operator.forget(due), operator.replay(letter), operator.erase(letter), operator.prune(["q"], "nobody"),
    ):  # fmt: skip
        with pytest.raises(StreamworkerError, match=r"denies|refuses|could not"):
            raise StreamworkerError(f"it could not: {await change}")
    await operator.close()
    q = users.namespace + Q
    with users.as_("inspector") as client:
        for command in (
            ("XREADGROUP", "GROUP", GROUP, "me", "STREAMS", q, ">"), ("XADD", q, "*", "a", "b"), ("DEL", q),
            ("EVAL", "return redis.call('XADD', KEYS[1], '*', 'a', 'b')", 1, q), ("FLUSHALL",), ("HGETALL", "other"),
            ("XAUTOCLAIM", q, GROUP, "me", 0, "0-0"), ("XGROUP", "DELCONSUMER", q, GROUP, "w"),
        ):  # fmt: skip
            with pytest.raises(redis.ResponseError, match=r"(?i)permission|ACL failure|NOPERM"):
                client.execute_command(*command)
    assert contents(users.raw) == before


async def test_a_bridge_moves_jobs_and_does_nothing_else(users):
    namespace, raw = users.namespace, users.raw
    raw.lpush("queue:q", "1", "2", "3")
    options = Options(queues=(("q", None),), namespace=namespace, lease=0.5)
    gone = ListBroker(RedisAddress(users.server.url), options)
    await gone.open()
    await gone.join("gone")
    assert len(await gone.claim(1, 0, ())) == 1
    await gone.close()
    settings = Settings(redis_url=users.url("bridge"), namespace=namespace, lease=0.5)
    async with App[Any](settings=settings).bridge(None) as mover:
        bridging = BridgeLoop(mover)
        running = asyncio.create_task(bridging.run())
        await eventually(lambda: raw.xlen(f"{namespace}{Q}") == 3)
        await eventually(lambda: sum("b" in client["flags"] for client in raw.client_list()) == 3)
        raw.lpush("queue:q:low", "3")
        await eventually(lambda: raw.xlen(f"{namespace}{Q}:low") == 1)
        bridging.stop()
        await running
    assert users.denials() == []
    q = namespace + Q
    with users.as_("bridge") as client:
        for command in (
            ("XREADGROUP", "GROUP", GROUP, "me", "STREAMS", q, ">"), ("DEL", q), ("XRANGE", q, "-", "+"), ("XDEL", q, "1-1"),
            ("DEL", "queue:q"), ("LPUSH", "queue:q", "x"), ("FLUSHALL",), ("KEYS", "*"), ("XADD", "other", "*", "a", "b"),
            ("HGETALL", f"{q}:bodies"), ("RPOP", "other"),
        ):  # fmt: skip
            with pytest.raises(redis.ResponseError, match=r"(?i)permission|ACL failure|NOPERM"):
                client.execute_command(*command)


def contents(raw: redis.Redis) -> dict[bytes, bytes]:
    return {key: raw.dump(key) for key in raw.keys("*") if not key.endswith((b":w", b":meta"))}


async def test_what_a_worker_orphans_is_swept_under_the_same_rights(users, broker_of):
    if users.namespace:
        pytest.skip("without a namespace: `ripen` knows no other keys")
    async with broker_of(users.url("worker"), lease=0.5) as broker:
        await broker.publish([job("x")])
        (claim,) = await broker.claim(1, 0, ())
        StreamGround(users.raw).ripen(claim, count=3)
        broker._source._reclaim_at = [0.0]
        (suspect,) = await broker.claim(1, 0, ())
        assert suspect.suspect
        assert (await broker.confirm(suspect)) is not None
        assert names(await broker.own_pending(())) == ["x"]
    assert users.denials() == []


@pytest.mark.parametrize("name", ["worker", "producer", "inspector"])
def test_check_says_what_a_user_lacks(users, tmp_path, name):
    (tmp_path / "jobs.py").write_text(JOBS)
    program = Program(tmp_path, users.url(name))
    program.env["STREAMWORKER_NAMESPACE"] = users.namespace
    done = program("check", "jobs:app")
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if " permissions " in line]
    if name == "worker":
        assert "every command is permitted" in "".join(lines)
        assert "may not SCAN" in done.stdout
    else:
        assert "may not run" in "".join(lines) or "denies" in done.stdout
        assert done.returncode == 1


class InLine(Payload, kind="in.line", queue="q", order_by="of", fair_by="tenant"):
    of: str
    tenant: str
    number: int


async def test_order_and_fairness_need_what_the_docs_say_beside_it(moded):
    users, ground = moded, moded.ground
    both, workers = re.findall(r"need `(\+rpush[^`]+)`.*?\nneed `(\+srandmember[^`]+)`", DOCS.read_text(), re.DOTALL)[0]
    for name, more in (("worker", f"{both} {workers}"), ("producer", both)):
        users.raw.execute_command("ACL SETUSER", name, *more.split())
    users.raw.acl_log_reset()
    ran: list[int] = []
    shared = {"mode": ground.mode, "namespace": users.namespace, "lease": 0.5, "concurrency": 5}
    app = App(settings=Settings(redis_url=users.url("worker"), **shared))

    @app.handler(max_attempts=2)
    async def in_line(payload: InLine, ctx: Context) -> None:
        ran.append(payload.number)
        if payload.number == 3 and ctx.attempt == 1:
            raise Retry(after=0.01)

    async with app, App(settings=Settings(redis_url=users.url("producer"), **shared)) as producer:
        await producer.enqueue_many([InLine(f"k{n % 3}", f"t{n % 2}", n) for n in range(30)])
        worker = QueueWorker(app, redis=None, database=None, services=None)
        running = asyncio.create_task(worker.start())
        await eventually(lambda: running.done() or len(ran) == 31, 15)
        users.raw.hset(ground.keys("q", users.namespace).meta, "waiting", 1)  # so that stuck keys are looked for
        assert await OrderSweeper(worker._broker._session).sweep(ground.keys("q", users.namespace)) == 0
        await worker.stop()
        await running
    denied = {each for each in users.denials() if "setname" not in each[2]}
    assert denied == set()
