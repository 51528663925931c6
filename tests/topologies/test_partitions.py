"""A queue over the slots of a cluster: its partitions are on several nodes, and a worker serves them all."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import anyio
import anyio.to_thread
import pytest

from streamworker import App, Payload, Settings
from streamworker.broker.claim import Options
from streamworker.broker.lists import ListBroker
from streamworker.broker.partitions import partition_of
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.cluster import slot_of
from streamworker.errors import ConfigurationError, Unreachable
from tests.conftest import Server, eventually
from tests.contract.helpers import done, job, working
from tests.topologies.servers import Clustered

pytestmark = pytest.mark.slow

HOMES = ["q", *(f"q#{number}" for number in range(1, 8))]


class Step(Payload, kind="step", queue="q", order_by="key"):
    key: str
    n: int


def app_of(cluster: Clustered, ran: dict[str, list[int]], count: int = 8) -> App:
    app = App(settings=Settings(redis_url=cluster.url, partitions=f"q={count}", lease=1.0, concurrency=20))

    @app.handler
    async def step(payload: Step) -> None:
        ran[payload.key].append(payload.n)

    return app


def spread(cluster: Clustered) -> Counter[int]:
    """How many partitions are on each node."""
    return Counter(cluster.nodes.index(cluster.owner(f"stream:{{{home}}}")) for home in HOMES)


async def test_a_queue_is_served_by_all_nodes(cluster):
    ran: dict[str, list[int]] = defaultdict(list)
    app = app_of(cluster, ran)
    assert len(spread(cluster)) == 3
    async with app, working(app):
        for n in range(6):
            await app.enqueue_many([Step(key=f"k{k}", n=n) for k in range(30)])
        await eventually(lambda: sum(map(len, ran.values())) == 180)
        # One blocking read for each slot: a node refuses a read of keys in several slots.
        await eventually(lambda: blocked(cluster) == len({slot_of(f"stream:{{{home}}}") for home in HOMES}))
        async with app.operator() as operator:
            assert await operator.queues() == ["q"]
            (depth,) = await operator.depth(["q"])
            assert (depth.ready, depth.running, depth.waiting) == (0, 0, 0)
            assert not [each for each in await operator.findings(["q"]) if each.subject == "partitions"]
    assert ran == {f"k{k}": list(range(6)) for k in range(30)}


def blocked(cluster: Clustered) -> int:
    count = 0
    for node in cluster.nodes[:3]:
        with node.client() as client:
            count += sum("b" in each["flags"] for each in client.client_list())
    return count


async def test_a_node_dies_while_the_queue_grows(cluster):
    """Producers of one partition and of eight, a master that dies and its replica that takes over: the order holds."""
    ran: dict[str, list[int]] = defaultdict(list)
    small, large = app_of(cluster, ran, 1), app_of(cluster, ran, 8)
    async with small, large, working(small), working(large):
        sent: Counter[str] = Counter()
        for turn in range(12):
            for k in range(16):
                app = small if k % 2 else large
                await app.enqueue(Step(key=f"k{k}", n=sent[f"k{k}"]), key=f"{k}-{turn}")
                sent[f"k{k}"] += 1
            if turn == 5:
                await fail_over(cluster, "stream:{q#1}")
        await eventually(lambda: all(len(set(ran[key])) == count for key, count in sent.items()), 60)
    # What ran while the node died may run again.
    assert {key: list(dict.fromkeys(numbers)) for key, numbers in ran.items()} == {
        key: list(range(count)) for key, count in sent.items()
    }


async def fail_over(cluster: Clustered, key: str) -> None:
    """Kill the master of a key when its replica has everything, and wait for that to take over."""
    dying = cluster.owner(key)
    other = next(node for node in cluster.nodes[:3] if node is not dying)
    with dying.client() as client:
        client.wait(1, 2000)
    dying.kill()
    await eventually(lambda: cluster.owner(key, via=other) is not dying, 30)


# -- servers by URL


@pytest.fixture
def two_servers(tmp_path):
    made = []
    try:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            made.append(Server(tmp_path / name, aof=True))
        yield made
    finally:
        for server in made:
            server.kill()


def served(servers: list[Server], ran: dict[str, list[int]], count: int = 4, **options: Any) -> App:
    """An app of a queue whose odd partitions are on the second server."""
    urls = [servers[number % 2].url for number in range(1, count)]
    parts = f"q={'|'.join(urls)}" if urls else ""
    app = App(settings=Settings(redis_url=servers[0].url, partitions=parts or (), lease=1.0, concurrency=20, **options))

    @app.handler(result_ttl=60)
    async def step(payload: Step) -> int:
        if payload.n < 0:
            await anyio.sleep(60)
        ran[payload.key].append(payload.n)
        return payload.n

    return app


async def test_a_queue_over_servers_given_by_url(two_servers):
    ran: dict[str, list[int]] = defaultdict(list)
    app = served(two_servers, ran)
    async with app, app.operator() as operator, working(app):
        answers = []
        for n in range(6):
            answers += await app.enqueue_many([Step(key=f"k{k}", n=n) for k in range(30)])
        await eventually(lambda: sum(map(len, ran.values())) == 180)
        assert ran == {f"k{k}": list(range(6)) for k in range(30)}
        # One blocking read for each server, whatever it has of the partitions.
        await eventually(lambda: [reads(server) for server in two_servers] == [1, 1])
        with two_servers[0].client() as first, two_servers[1].client() as second:
            assert not [name for name in first.keys("*") if b"{q#1}" in name or b"{q#3}" in name]
            assert {name for name in second.keys("*") if b"{q#" not in name} == set()
            assert second.exists("stream:{q#1}:meta", "stream:{q#3}:meta") == 2
        assert [await app.result(each.id, queue="q") for each in answers[-4:]] == [5] * 4
        assert await operator.queues() == ["q"]
        # Delayed, paused, cancelled while it runs: notifications arrive from both servers.
        assert await operator.pause("q", "for a test")
        more = [await app.enqueue(Step(key=f"c{k}", n=-1)) for k in range(6)]
        (depth,) = await operator.depth(["q"])
        assert depth.ready + depth.running == 6  # a read that blocked took one more
        assert await operator.resume("q")

        async def running() -> bool:
            (depth,) = await operator.depth(["q"])
            return depth.running == 6

        await eventually(running)
        assert {await app.cancel(each.id, queue="q") for each in more} == {"asked"}

        async def over() -> bool:
            (depth,) = await operator.depth(["q"])
            return depth.running == depth.ready == 0

        await eventually(over)
        assert not [each for each in await operator.findings(["q"]) if each.severity == "error"]


def reads(server: Server) -> int:
    with server.client() as client:
        return sum("b" in each["flags"] for each in client.client_list())


async def test_an_operator_that_does_not_know_the_servers_says_what_to_set(two_servers, caplog):
    app = served(two_servers, defaultdict(list), 2)
    async with app:
        await app.enqueue_many([Step(key=f"k{k}", n=1) for k in range(20)])
    async with App(settings=Settings(redis_url=two_servers[0].url)).operator() as operator:
        (depth,) = await operator.depth(["q"])
    assert 0 < depth.ready < 20
    assert "STREAMWORKER_PARTITIONS=q=URL|URL|... as its workers have it" in caplog.text


async def test_one_server_is_away_and_the_other_goes_on(two_servers):
    ran: dict[str, list[int]] = defaultdict(list)
    app = served(two_servers, ran)
    here = [f"k{k}" for k in range(40) if partition_of(f"k{k}", 4) % 2 == 0]
    there = [f"k{k}" for k in range(40) if partition_of(f"k{k}", 4) % 2]
    async with app, working(app):
        await app.enqueue_many([Step(key=key, n=0) for key in [*here, *there]])
        await eventually(lambda: len(ran) == 40)
        two_servers[1].kill()
        for n in (1, 2):
            await app.enqueue_many([Step(key=key, n=n) for key in here])
        await eventually(lambda: all(ran[key] == [0, 1, 2] for key in here))
        with pytest.raises(Unreachable):
            await app.enqueue(Step(key=there[0], n=9))
        # A worker and a producer that start now serve the server that is there, and the other one when it is back.
        late = served(two_servers, ran)
        async with late, working(late):
            await late.enqueue_many([Step(key=key, n=3) for key in here])
            await eventually(lambda: all(ran[key] == [0, 1, 2, 3] for key in here))
        await anyio.to_thread.run_sync(two_servers[1].start)
        await app.enqueue_many([Step(key=key, n=1) for key in there])
        await eventually(lambda: all(ran[key] == [0, 1] for key in there))


@pytest.mark.parametrize("queues", [("q",), ("q", "z"), ("a", "q"), ("a", "q", "z")])
@pytest.mark.parametrize("weighted", [False, True])
async def test_a_backlog_on_one_server_starves_no_partition_of_another(two_servers, broker_of, queues, weighted):
    """Each partition is the first of as many claims, however many of them a server has, and whatever else it has."""
    parts = (("q", 4, (two_servers[1].url,) * 3),)
    address = RedisAddress(two_servers[0].url).spread_over(parts)
    async with broker_of(address, *queues, partitions=parts, lease=5.0, weighted=weighted) as broker:
        await broker.publish([job(queue="q") for _ in range(800)])
        claimed: Counter[str] = Counter()
        for _ in range(40):
            claims = await broker.claim(10, 0, [])
            claimed.update(claim.place for claim in claims)
            await broker.settle([done(claim) for claim in claims])
        assert claimed == {f"stream:{{{home}}}": 100 for home in HOMES[:4]}


async def test_a_queue_that_is_listed_first_comes_first_on_all_servers(two_servers, broker_of):
    parts = (("q", 2, (two_servers[1].url,)), ("r", 2, (two_servers[1].url,)))
    address = RedisAddress(two_servers[0].url).spread_over(parts)
    async with broker_of(address, "a", "q", "r", "z", partitions=parts, lease=5.0) as broker:
        for queue in ("z", "r", "q", "a"):
            await broker.publish([job(queue=queue) for _ in range(30)])
        claims = []
        for _ in range(24):
            claims += await broker.claim(5, 0, claims)
        assert [claim.queue for claim in claims] == [queue for queue in "aqrz" for _ in range(30)]


@pytest.mark.parametrize("busy", [False, True])
async def test_a_server_that_hangs_does_not_slow_down_the_others(two_servers, busy):
    """It keeps its connections and answers nothing, as a machine that lost its network; jobs of its partitions end meanwhile."""
    ran: dict[str, list[int]] = defaultdict(list)
    ending = anyio.Event()
    app = App(
        settings=Settings(redis_url=two_servers[0].url, partitions=f"q={two_servers[1].url}", lease=15, concurrency=20)
    )

    @app.handler
    async def step(payload: Step) -> None:
        if payload.n < 0:
            await ending.wait()
        ran[payload.key].append(payload.n)

    here = [f"k{k}" for k in range(40) if partition_of(f"k{k}", 2) == 0]
    there = [f"k{k}" for k in range(40) if partition_of(f"k{k}", 2)]
    async with app, working(app):
        await app.enqueue_many([Step(key=key, n=-1) for key in there[:5]])
        await app.enqueue_many([Step(key=key, n=0) for key in here])
        await eventually(lambda: len(ran) == len(here))
        await app.enqueue_many([Step(key=key, n=1) for key in there[5:] for _ in range(100 * busy)])
        two_servers[1].pause()
        try:
            ending.set()
            # Each timeout of a command is 5 s: the first few cost that, and no more.
            with anyio.fail_after(60):
                for n in range(1, 31):
                    await app.enqueue_many([Step(key=key, n=n) for key in here])
                    await eventually(lambda n=n: all(n in ran[key] for key in here), 60)
        finally:
            two_servers[1].resume()
        await eventually(lambda: all(ran[key].count(-1) == 1 for key in there[:5]), 30)
        await app.enqueue_many([Step(key=key, n=2) for key in there])
        await eventually(lambda: all(2 in ran[key] for key in there), 30)


async def test_a_server_that_hangs_costs_no_lease_on_another(two_servers):
    """A lease that is shorter than the timeout of a command."""
    started: Counter[str] = Counter()
    ending = anyio.Event()
    apps = []
    for _ in range(2):
        rules = Settings(redis_url=two_servers[0].url, partitions=f"q={two_servers[1].url}", lease=2, concurrency=20)
        apps.append(App(settings=rules))

        @apps[-1].handler
        async def step(payload: Step) -> None:
            started[payload.key] += 1
            await ending.wait()

    keys = [f"k{k}" for k in range(20)]
    async with apps[0], apps[1], working(apps[0]), working(apps[1]):
        await apps[0].enqueue_many([Step(key=key, n=0) for key in keys])
        await eventually(lambda: len(started) == len(keys))
        two_servers[1].pause()
        try:
            await anyio.sleep(8)  # four leases: what could go wrong did by then
            assert {key: started[key] for key in keys if partition_of(key, 2) == 0} == {
                key: 1 for key in keys if partition_of(key, 2) == 0
            }
        finally:
            two_servers[1].resume()
            ending.set()


async def test_growth_over_servers_that_old_processes_do_not_know(two_servers):
    """Workers and producers of 1, 2 and 4 partitions at once; the old ones cannot reach what is new."""
    ran: dict[str, list[int]] = defaultdict(list)
    apps = [served(two_servers, ran, count) for count in (1, 2, 4)]
    sent: Counter[str] = Counter()
    async with apps[0], apps[1], apps[2], working(apps[0]), working(apps[1]):
        for turn in range(12):
            for k in range(18):
                # Each key has one producer at a time: the old ones first, and the one of four at the end.
                app = apps[2] if turn > 7 else apps[k % 3] if turn > 3 else apps[k % 2]
                await app.enqueue(Step(key=f"k{k}", n=sent[f"k{k}"]))
                sent[f"k{k}"] += 1
        async with working(apps[2]):
            await eventually(lambda: sum(map(len, ran.values())) == sum(sent.values()))
    assert ran == {key: list(range(count)) for key, count in sent.items()}


def test_two_urls_of_one_server_are_one_server():
    """Else a worker has two blocking reads there, and the end of each ends the other one."""
    more = ("redis://h:2", "redis://h", "redis://h:2/0", "redis://h:2/1", "redis://user@h:2", "redis://h:6379?db=0")
    given = RedisAddress("redis://h").spread_over((("q", 7, more),))
    slots = [given.slot(f"stream:{{q#{number}}}:meta") for number in range(1, 7)]
    assert slots == [1, 0, 1, 2, 3, 0]


def test_what_cannot_be_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ConfigurationError, match="a cluster needs a number"):
        Settings(partitions="q=redis+cluster://h:1")
    with pytest.raises(ConfigurationError, match="not URLs"):
        RedisAddress("redis+cluster://h:1").spread_over((("q", 2, ("redis://h:2",)),))
    given = RedisAddress("redis://h:1").spread_over((("q", 2, ("redis://h:2",)),))
    with pytest.raises(ConfigurationError, match="list mode has all partitions"):
        ListBroker(given, Options(queues=(("q", None),)))
    spec = Settings(partitions="q=redis://:secret@h:2/0|redis+sentinel://a:1,b:2/m,b=3")
    assert [(each.name, each.partitions) for each in spec.partitions] == [("q", 3), ("b", 3)]
    assert "secret" not in repr(spec)
