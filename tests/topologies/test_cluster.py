"""Queues on several masters: found, moved, lost, found again; one worker waits for all of them at once."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
import redis.asyncio as aioredis
import structlog
from redis.crc import key_slot

from streamworker import App, Context, QueueWorker, Settings
from streamworker.broker.claim import StreamOptions
from streamworker.broker.operator import StreamOperator
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.cluster import key_of, slot_of
from streamworker.errors import ConfigurationError, Unreachable
from streamworker.integrations.file_store import FileStore
from streamworker.job import Settled
from streamworker.telemetry import logs
from streamworker.worker import renewer
from tests.conftest import eventually
from tests.contract.ground import GROUP, StreamGround
from tests.contract.helpers import done, job, names
from tests.topologies.conftest import Count, Other, Producer, working
from tests.topologies.servers import Clustered
from tests.topologies.test_acl import acl_lines

pytestmark = pytest.mark.slow

SPREAD = ("a", "q", "b", "c")
"""Queues of which at least two lie on different masters."""


def blocked(cluster: Clustered) -> int:
    with cluster.client() as client:
        return sum("b" in each["flags"] for each in client.client_list())


async def test_a_master_dies_under_a_running_worker(cluster):
    dying = cluster.owner("stream:{q}")
    surviving = next(node for node in cluster.nodes[:3] if node is not dying)
    assert cluster.owner("stream:{b}") is not dying
    async with working(cluster.url) as ran:
        with Producer(lambda: cluster.owner_client("stream:{q}")) as producer:
            await eventually(lambda: sum(ran.values()) > 100)
            dying.kill()
            await eventually(lambda: cluster.owner("stream:{q}", via=surviving) is not dying, 30)
            producer.replicas = 0  # there is none left
            before = len(producer.acknowledged)
            await eventually(lambda: len(producer.acknowledged) > before + 100, 30)
        await eventually(lambda: set(producer.acknowledged) <= ran.keys(), 30)
        async with App(settings=Settings(redis_url=cluster.url)) as app:
            await app.enqueue(Other(name="elsewhere"))
            await app.enqueue(Count(name="here"))
        await eventually(lambda: {"elsewhere", "here"} <= ran.keys())
    with cluster.owner_client("stream:{q}") as client:
        assert client.xlen("stream:{q}") == 0
        assert client.xinfo_consumers("stream:{q}", GROUP) == []


@pytest.mark.parametrize("how", ["killed", "hangs"])
async def test_queues_of_living_nodes_go_on_while_a_node_is_away(tmp_path, how):
    cluster = Clustered(tmp_path)
    try:
        for node in cluster.nodes:
            with node.client() as client:
                client.config_set("cluster-require-full-coverage", "no")
        away = cluster.owner("stream:{q}")
        assert cluster.owner("stream:{b}") is not away
        async with working(cluster.url) as ran:
            async with App(settings=Settings(redis_url=cluster.url)) as app:
                await app.enqueue(Count(name="before"))
                await eventually(lambda: ran["before"])
                away.kill() if how == "killed" else away.pause()
                for n in range(20):
                    await app.enqueue(Other(name=f"during {n}"))
                await app.enqueue(Other(name="delayed"), delay=0.5)
                await eventually(lambda: sum(name.startswith("during") for name in ran) == 20 and ran["delayed"], 30)
            if how == "hangs":
                away.resume()
                async with App(settings=Settings(redis_url=cluster.url)) as app:
                    await app.enqueue(Count(name="after"))
                await eventually(lambda: ran["after"], 30)
            else:
                # Another worker starts with the node away, and stops in order; whatever waits for the node waits.
                async with working(cluster.url) as second:
                    async with App(settings=Settings(redis_url=cluster.url)) as app:
                        for n in range(20):
                            await app.enqueue(Other(name=f"later {n}"))
                    await eventually(lambda: sum(name.startswith("later") for name in {*ran, *second}) == 20, 30)
                away.start()
    finally:
        cluster.kill()


async def test_listings_and_pauses_of_living_nodes_go_on_while_a_node_is_away(tmp_path, broker_of, capsys):
    logs.configure("info", "json")
    cluster = Clustered(tmp_path)
    try:
        for node in cluster.nodes:
            with node.client() as client:
                client.config_set("cluster-require-full-coverage", "no")
        away = cluster.owner("stream:{q}")
        async with broker_of(cluster.url, "b", "q") as broker:
            await broker.publish([job("x", "b"), job("y", "q")])
            (claim, *_) = await broker.claim(1, 0, ())
            away.kill()
            operator = StreamOperator(RedisAddress(cluster.url), StreamOptions(queues=()))
            await operator.open()
            there = await operator.queues()
            assert "b" in there and "q" not in there
            assert [depth.queue for depth in await operator.depth(there)] == there
            assert [each.worker_id for each in await operator.workers(there)] == ["w"]
            assert await operator.pause("b", "for a test") and await operator.resume("b")
            assert (await operator.dead("b")).rows == []
            assert claim.queue == "b"
            await operator.close()
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
        assert [line for line in lines if line["event"] == "node_away"]
    finally:
        cluster.kill()
        structlog.reset_defaults()


async def test_a_node_that_is_away_is_said_once_by_the_renewals_and_once_when_it_is_back(tmp_path, broker_of, capsys):
    logs.configure("info", "json")
    cluster = Clustered(tmp_path)

    def said(event: str) -> int:
        said.lines += [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
        return sum(line["event"] == event for line in said.lines)

    said.lines = []
    try:
        away = cluster.owner("stream:{q}")
        async with broker_of(cluster.url, "b", "q") as broker:
            await broker.publish([job("x", "b"), job("y", "q")])
            claims = await broker.claim(2, 0, ())
            assert len(claims) == 2
            away.kill()
            for _ in range(4):
                assert await broker.renew(claims) == []
            assert (said("renewal_failed"), said("renewal_back")) == (1, 0)
            away.start()

            async def back() -> bool:
                await broker.renew(claims)
                return said("renewal_back") == 1

            await eventually(back, 20)
            await broker.renew(claims)
            assert (said("renewal_failed"), said("renewal_back")) == (1, 1)
    finally:
        cluster.kill()
        structlog.reset_defaults()


async def test_a_slot_moves_under_a_running_worker(cluster):
    key = "stream:{q}"
    source = cluster.owner(key)
    target = next(node for node in cluster.nodes[:3] if node is not source)
    async with working(cluster.url) as ran:
        enqueued = set()
        async with App(settings=Settings(redis_url=cluster.url)) as app:
            for round_ in range(3):
                for n in range(50):
                    name = f"{round_}-{n}"
                    await app.enqueue(Count(name=name))
                    await app.enqueue(Other(name=f"other {name}"), delay=0.01)
                    enqueued |= {name, f"other {name}"}
                moving = asyncio.create_task(asyncio.to_thread(cluster.migrate, key, source, target))
                while not moving.done():  # MOVED, ASK and TRYAGAIN are met here
                    try:
                        await app.enqueue(Count(name=f"during {round_}"), key=f"k{round_}")
                    except Unreachable:
                        continue
                    enqueued.add(f"during {round_}")
                    await asyncio.sleep(0)
                await moving
                assert cluster.owner(key) is target
                source, target = target, source
        await eventually(lambda: enqueued <= ran.keys(), 20)
        assert not [name for name, times in ran.items() if times > 1]
    with cluster.client() as client:
        assert client.xlen(key) == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    servers = Clustered(tmp_path_factory.mktemp("cluster"))
    yield servers
    servers.kill()


@pytest.fixture
def masters(shared):
    """Three masters, empty."""
    with shared.client() as client:
        client.flushall()
    return shared


async def test_one_claim_waits_for_queues_on_all_masters(masters, broker_of):
    assert len({masters.owner(f"stream:{{{queue}}}").port for queue in SPREAD}) > 1
    async with broker_of(masters.url, *SPREAD) as broker, broker_of(masters.url, *SPREAD) as producer:
        for queue in SPREAD * 3:
            claiming = asyncio.create_task(broker.claim(10, 5, ()))
            await eventually(lambda: blocked(masters) == len(SPREAD))
            started = time.monotonic()
            await producer.publish([job(queue, queue)])
            claims = await claiming
            assert time.monotonic() - started < 0.2
            assert names(claims) == [queue]
            assert blocked(masters) == 0
        assert [len(part._session._branches) for part in broker._source._parts] == [0] * len(SPREAD)


async def test_the_renewing_process_finds_every_node_and_follows_a_slot_that_moved(masters, broker_of):
    async with broker_of(masters.url, *SPREAD) as broker:
        await broker.publish([job(queue, queue) for queue in SPREAD])
        claims = await broker.claim(10, 0, ())
        assert len(claims) == len(SPREAD)
        told = json.loads(broker.standby(60))
        assert len(told["servers"]) > 1
        for wrong in (False, True):
            for claim in claims:
                with masters.owner_client(claim.place) as client:
                    StreamGround(client).ripen(claim, 10_000)
            servers = told["servers"]
            if wrong:  # what was told is out of date
                homes = [(each["host"], each["port"]) for each in servers]
                for server, (host, port) in zip(servers, homes[1:] + homes[:1], strict=True):
                    server["host"], server["port"] = host, port
            for server in servers:
                await asyncio.to_thread(renewer.renew, server, told["scripts"])
            for claim in claims:
                with masters.owner_client(claim.place) as client:
                    (pending,) = client.xpending_range(claim.place, GROUP, "-", "+", 1)
                    assert pending["consumer"] == b"w" and pending["time_since_delivered"] < 5000


async def test_what_several_reads_bring_at_once_is_kept(masters, broker_of):
    async with broker_of(masters.url, *SPREAD) as broker, broker_of(masters.url) as producer:
        for round_ in range(30):
            claiming = asyncio.create_task(broker.claim(1, 5, ()))
            await eventually(lambda: blocked(masters) == len(SPREAD))
            wanted = [f"{queue}{round_}" for queue in SPREAD]
            await asyncio.gather(*(producer.publish([job(f"{queue}{round_}", queue)]) for queue in SPREAD))
            claims = await claiming
            assert 1 <= len(claims) <= len(SPREAD)
            while len(claims) < len(SPREAD):
                claims += await broker.claim(10, 1, claims)
            assert sorted(names(claims)) == sorted(wanted)
            assert await broker.own_pending(claims) == []
            await broker.settle([done(claim) for claim in claims])


async def test_order_of_queues_holds_while_jobs_are_ready(masters, broker_of):
    async with broker_of(masters.url, *SPREAD) as broker:
        await broker.publish([job(f"{queue}{n}", queue) for n in range(5) for queue in reversed(SPREAD)])
        assert names(await broker.claim(12, 0, ())) == [f"{queue}{n}" for queue in SPREAD for n in range(5)][:12]


async def test_a_node_that_hangs_holds_nobody_up_for_long(masters, broker_of):
    hanging = masters.owner("stream:{q}")
    other = next(queue for queue in SPREAD if masters.owner(f"stream:{{{queue}}}") is not hanging)
    async with broker_of(masters.url, "q", other) as broker, broker_of(masters.url, other) as producer:
        claiming = asyncio.create_task(broker.claim(10, 5, ()))
        await eventually(lambda: blocked(masters) == 2)
        hanging.pause()
        try:
            started = time.monotonic()
            await producer.publish([job("x", other)])
            assert names(await claiming) == ["x"]
            assert time.monotonic() - started < 3
        finally:
            hanging.resume()
        await producer.publish([job("late", "q")])
        claims: list = []
        while not claims:
            claims = await broker.claim(10, 5, ())
        assert names(claims) == ["late"]


async def test_operators_see_all_masters(masters, broker_of):
    async with broker_of(masters.url, *SPREAD) as broker:
        await broker.publish([job(queue, queue) for queue in SPREAD])
        await broker.beat({"pid": 1, "queues": ",".join(SPREAD)})
        operator = StreamOperator(RedisAddress(masters.url), StreamOptions(queues=()))
        await operator.open()
        assert await operator.queues() == sorted(SPREAD)
        assert [depth.ready for depth in await operator.depth(SPREAD)] == [1] * len(SPREAD)
        assert [each.worker_id for each in await operator.workers(SPREAD)] == ["w"]
        subjects = [finding.subject for finding in await operator.findings(SPREAD)]
        assert subjects.count("server") == 1
        assert len(await operator.waiting(SPREAD, 100)) == len(SPREAD)
        await operator.close()
        assert await broker.leave()


async def test_a_slot_halfway_on_its_way_is_asked_for(masters, broker_of):
    """Everything has gone, but the slot is still the old node's: ASK, for commands, the reader and the lease thread."""
    key = "stream:{q}"
    source = masters.owner(key)
    target = next(node for node in masters.nodes if node is not source)
    async with broker_of(masters.url) as broker:
        await broker.publish([job("before")])
        with masters.halfway(key, source, target):
            await broker.publish([job("during")])
            claims = await broker.claim(10, 0, ())
            assert names(claims) == ["before", "during"]
            assert await broker.renew(claims) == []
            with target.client() as client:
                client.execute_command("ASKING")
                assert client.xlen(key) == 2
        assert masters.owner(key) is target
        assert await broker.renew(claims) == []
        assert await broker.settle([done(claim) for claim in claims]) == [Settled.SETTLED] * 2


async def test_a_slot_that_nobody_serves_is_no_answer_and_nothing_was_sent(masters, broker_of):
    key = "stream:{q}"
    owner = masters.owner(key)
    async with broker_of(masters.url) as broker:
        for node in masters.nodes:
            with node.client() as client:
                client.execute_command("CLUSTER", "DELSLOTS", key_slot(key.encode()))
        with pytest.raises(Unreachable, match=r"CLUSTERDOWN|no node serves slot \d+"):
            await broker.publish([job("x")])
        with owner.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTS", key_slot(key.encode()))
        for node in masters.nodes:
            with node.client() as client:
                await eventually(lambda client=client: client.cluster("INFO")["cluster_state"] == "ok")
        await broker.publish([job("y")])
        assert names(await broker.claim(10, 0, ())) == ["y"]


@pytest.mark.parametrize("name", ["worker", "producer", "inspector"])
async def test_the_acl_lines_of_the_docs_with_what_a_cluster_adds(masters, name):
    for node in masters.nodes:
        with node.client() as client:
            client.execute_command("ACL LOG", "RESET")
            for line in acl_lines():
                client.execute_command("ACL SETUSER", *line, "+cluster|slots", "+asking")
    url = masters.url.replace("//", f"//{name}:SECRET@")
    if name == "inspector":
        operator = StreamOperator(RedisAddress(url), StreamOptions(queues=()))
        await operator.open()
        assert await operator.queues() == []
        await operator.close()
    else:
        app = App(settings=Settings(redis_url=url, lease=0.5))
        ran = []

        @app.handler
        async def count(payload: Count) -> None:
            ran.append(payload.name)

        async with app:
            await app.enqueue(Count(name="x"))
            await app.enqueue(Count(name="late"), delay=0.05, key="k")
            if name == "worker":
                worker = QueueWorker(app, redis=None, database=None, services=None)
                running = asyncio.create_task(worker.start())
                await eventually(lambda: running.done() or sorted(ran) == ["late", "x"])
                await worker.stop()
                await running
    for node in masters.nodes:
        with node.client() as client:
            assert client.acl_log() == []


async def test_wrong_forms_are_said_in_one_sentence(masters, broker_of, redis_url):
    plain = f"redis://127.0.0.1:{masters.nodes[0].port}/0"
    with pytest.raises(ConfigurationError, match=r"is a node of a cluster: write redis\+cluster://") as caught:
        async with broker_of(plain):
            pass
    assert caught.value.exit_code == 78
    operator = StreamOperator(RedisAddress(plain), StreamOptions(queues=()))
    with pytest.raises(ConfigurationError, match="is a node of a cluster"):
        await operator.open()
    await operator.close()
    with pytest.raises(ConfigurationError, match="is no cluster: write redis://"):
        async with broker_of(redis_url.replace("redis://", "redis+cluster://")):
            pass
    with pytest.raises(Unreachable, match="no node of the cluster answers"):
        async with broker_of("redis+cluster://:secret@127.0.0.1:1,127.0.0.1:2"):
            pass


@pytest.mark.parametrize("form", ["redis+cluster", "redis"])
async def test_the_bridge_refuses_a_cluster_in_one_sentence(masters, form):
    """Whether the URL says so or not: a list and its stream lie on different nodes."""
    url = masters.url if form == "redis+cluster" else f"redis://127.0.0.1:{masters.nodes[0].port}/0"
    with pytest.raises(ConfigurationError, match="not for a Redis Cluster"):
        async with App(settings=Settings(redis_url=url)).bridge(["q"]):
            pass


async def test_handlers_get_a_client_for_clusters_and_users_may_bring_one(masters):
    app = App(settings=Settings(redis_url=masters.url))

    @app.handler
    async def count(payload: Count, ctx: Context) -> None:
        for key in ("queue:x", "queue:y", "queue:z"):
            await ctx.redis.set(key, payload.name)

    async with app:
        await app.enqueue(Count(name="one"))
    await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
    own = aioredis.RedisCluster(host="127.0.0.1", port=masters.nodes[1].port)
    assert await own.get("queue:y") == b"one"
    async with app:
        await app.enqueue(Count(name="two"))
    await QueueWorker(app, redis=own, database=None, services=None).run(burst=True)
    assert await own.get("queue:z") == b"two"
    await own.aclose()


def test_keys_of_commands():
    assert key_of(("EVALSHA", "x", 2, "k", "l", "a")) == "k"
    assert key_of(("EVAL", "x", 0)) is None
    assert key_of(("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "STREAMS", "k", ">")) == "k"
    assert key_of(("XINFO CONSUMERS", "k", "g")) == key_of(("XINFO", "CONSUMERS", "k", "g")) == "k"
    assert key_of(("XGROUP", "CREATE", b"k", "g")) == key_of(("DEL", "k")) == "k"
    assert [
        key_of(command) for command in (("PING",), ("INFO", "server"), ("CLIENT UNBLOCK", 1), ("ACL DRYRUN", "u"))
    ] == [None] * 4
    assert slot_of("stream:{q}") == slot_of("stream:{q}:due") == slot_of("{q}")


@pytest.mark.parametrize("pop", ["move", "brpop"])
@pytest.mark.parametrize("form", ["redis+cluster", "redis"])
async def test_list_mode_refuses_a_cluster_in_one_sentence(masters, form, pop):
    """Workers, producers and people: the lists of a queue lie on different nodes."""
    url = masters.url if form == "redis+cluster" else f"redis://127.0.0.1:{masters.nodes[0].port}/0"
    app = App(settings=Settings(redis_url=url, mode="list", list_pop=pop))

    @app.handler
    async def count(payload: Count) -> None: ...

    sentence = "list mode cannot use the Redis Cluster at .* set STREAMWORKER_MODE=stream"
    with pytest.raises(ConfigurationError, match=sentence) as caught:
        async with app:
            pass
    assert caught.value.exit_code == 78
    with pytest.raises(ConfigurationError, match=sentence):
        await QueueWorker(app, redis=None, database=None, services=None).start()
    with pytest.raises(ConfigurationError, match=sentence):
        async with app.operator():
            pass


async def test_stored_payloads_of_deleted_jobs_are_deleted_whichever_master_had_them(masters, tmp_path):
    app = App(settings=Settings(redis_url=masters.url, offload_bytes=1024), store=FileStore(tmp_path))

    @app.handler
    async def count(payload: Count) -> None: ...

    @app.handler
    async def other(payload: Other) -> None: ...

    async with app, app.operator() as operator:
        for payload in (Count(name="x" * 2000), Other(name="y" * 2000)):
            await app.enqueue(payload, delay=3600)
        assert len(list(tmp_path.iterdir())) == 2
        for queue in ("q", "b"):
            assert await operator.purge(queue, "delayed", 10) == 1
        worker = QueueWorker(app, redis=None, database=None, services=None)
        life = asyncio.create_task(worker.start())
        await eventually(lambda: not list(tmp_path.iterdir()))
        await app.cancel((await app.enqueue(Other(name="z" * 2000), delay=3600)).id, queue="b")
        await eventually(lambda: not list(tmp_path.iterdir()))
        await worker.stop()
        await life
