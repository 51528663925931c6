"""A queue over the slots of a cluster: its partitions are on several nodes, and a worker serves them all."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from streamworker import App, Payload, Settings
from streamworker.broker.redis.cluster import slot_of
from tests.conftest import eventually
from tests.contract.helpers import working
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
