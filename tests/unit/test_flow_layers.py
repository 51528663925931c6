"""The graph of a flow as the dashboard shows it: layers, and one box for nodes that are alike."""

from __future__ import annotations

import random

import pytest

from streamworker import Flow, Payload, chain, group
from streamworker.job import NodeRecord
from streamworker.views.flows import layers


class Step(Payload, kind="step", queue="q"):
    pass


class Save(Payload, kind="save", queue="q"):
    pass


def rows(flow: Flow) -> list[NodeRecord]:
    """The nodes as the ledger has them after the start."""
    graph = flow.graph()
    after: dict[int, list[tuple[int, str]]] = {}
    for node, before, condition in graph.edges:
        after.setdefault(node, []).append((before, condition))
    return [
        NodeRecord(
            number=place, name=node.name, state="blocked", gate=node.gate, after=after.get(place, []),
            job_id=node.job and node.job.id, queue=node.job and node.job.queue, kind=(node.job.kind or "") if node.job else "",
            attempts=0, started_at=None, finished_at=None, error=None,
        )
        for place, node in enumerate(graph.nodes)
    ]  # fmt: skip


def shapes(flow: Flow) -> list[list[tuple[str, int]]]:
    return [[(box.form, len(box.nodes)) for box in layer] for layer in layers(rows(flow))]


def pipelines(count: int) -> Flow:
    flow = Flow("pages")
    first = flow.add(Step())
    flow.add(Step(), after=[flow.add(Save(), after=flow.add(Step(), after=first)) for _ in range(count)])
    return flow


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        (chain(Step(), Step(), Step()), [[("one", 1)], [("one", 1)], [("one", 1)]]),
        (chain(*(Step() for _ in range(50))), [[("chain", 50)]]),
        (chain(Step(), group(*(Step() for _ in range(3))), Save()), [[("one", 1)], [("one", 1)] * 3, [("one", 1)]]),
        (chain(Step(), group(*(Step() for _ in range(498))), Save()), [[("one", 1)], [("many", 498)], [("one", 1)]]),
        (pipelines(100), [[("one", 1)], [("many", 100)], [("many", 100)], [("one", 1)]]),
        (group(*(chain(*(Step() for _ in range(20))) for _ in range(5))), [[("chain", 20)] * 5]),
        (
            chain(group(*(Step() for _ in range(90)), name="a"), group(*(Save() for _ in range(90)), name="b")),
            [[("many", 90)], [("gate", 1)], [("many", 90)]],
        ),
    ],
    ids=["short", "long", "few", "fan", "pipelines", "lines", "gate"],
)
def test_nodes_that_are_alike_share_a_box(flow, expected):
    assert shapes(flow) == expected


def test_what_differs_is_told_apart():
    flow = Flow("order")
    first = flow.add(Step())
    for n in range(8):
        flow.add(Step(), after=first, when="ok" if n % 2 else "failed")
    found = layers(rows(flow))[1]
    assert [(box.form, len(box.nodes)) for box in found] == [("many", 4), ("many", 4)]
    assert sorted(how for box in found for _, how in box.after) == ["failed", "ok"]


@pytest.mark.parametrize("seed", range(20))
def test_each_node_is_in_one_box_and_each_box_below_those_before_it(seed):
    chance, flow, nodes = random.Random(seed), Flow("drawn"), []
    for _ in range(chance.randint(1, 200)):
        what = chance.choice([Step(), Save(), group(Step(), Save(), Step(), Step(), Step())])
        after = chance.sample(nodes, min(len(nodes), chance.choice([0, 1, 1, 2, 3])))
        nodes.append(flow.add(what, after=after, when=chance.choice(["ok", "failed", "always"])))
    known = rows(flow)
    found = layers(known)
    inside = [node.number for layer in found for box in layer for node in box.nodes if node.job_id is not None]
    assert sorted(inside) == [node.number for node in known if node.job_id is not None]
    level = {box.number: at for at, layer in enumerate(found) for box in layer}
    for layer in found:
        for box in layer:
            assert all(level[each] < level[box.number] for each, _ in box.after)
            assert level[box.number] == 0 or max(level[each] for each, _ in box.after) == level[box.number] - 1
            assert sum(count for _, count in box.states) == len(box.nodes)


def test_nodes_of_which_the_others_are_not_known_are_drawn_without_them():
    known = rows(chain(Step(), Step(), Step(), Step()))[:3]
    assert [len(layer) for layer in layers(known[2:])] == [1]
    assert layers([]) == []
