"""A flow to look at: its nodes in layers, those that are alike in one box; and rows of flows for listings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

import msgspec

from streamworker.job import FlowRecord, NodeRecord, NodeState, topological_order

STATES: Final[tuple[NodeState, ...]] = (
    "ok", "failed", "held", "skipped", "running", "retrying", "queued", "waiting", "blocked",
)  # fmt: skip
"""In the order in which they are shown."""
MOVING: Final = frozenset({"running", "retrying", "queued", "waiting"})
"""States of nodes that go on by themselves."""
ALIKE: Final = 4
"""Nodes with the same ones before and after them that share a box, at least."""
LONG: Final = 6
"""Nodes one after the other that share a box, at least."""
THROUGH: Final = 2_000
"""Edges that stand for the gate of a flow in a flow; above, the gate is shown."""

Edges: TypeAlias = dict[int, dict[int, str]]
"""For each node those before it, with the condition."""


class FlowRow(msgspec.Struct, frozen=True):
    """A flow of a listing.

    Attributes:
        id, name, key, status: of the flow.
        created_at: when it was started, in ISO 8601.
        took_s: seconds until its end, or until now.
        nodes: (state, how many, share from, share of all) of its jobs; shares in percent.
        total: how many jobs these are.
        still: it runs, and no job of it moves: dead jobs hold it.
    """

    id: str
    name: str
    key: str | None
    status: str
    created_at: str
    took_s: float
    nodes: list[tuple[str, int, float, float]]
    total: int
    still: bool


class FlowBox(msgspec.Struct, frozen=True):
    """One node, or several that are alike, as the graph shows them.

    Attributes:
        number: of its first node.
        form: ``one`` node; ``many`` side by side; a ``chain``, one after the other; the ``gate`` of a flow in the flow.
        nodes: what is in it.
        after: the boxes before it, by their numbers, with the condition.
        states: its nodes by state.
    """

    number: int
    form: Literal["one", "many", "chain", "gate"]
    nodes: list[NodeRecord]
    after: list[tuple[int, str]]
    states: list[tuple[str, int]]

    @property
    def kind(self) -> str:
        """What its nodes are called: their kind, if they have one, else the name of the first."""
        kinds = {node.kind for node in self.nodes}
        return self.nodes[0].kind if len(kinds) == 1 and self.nodes[0].kind else self.nodes[0].name


def flow_row(flow: FlowRecord, now: float) -> FlowRow:
    """The row of a flow.

    Args:
        flow: the flow.
        now: epoch seconds.
    """
    total, shares, start = sum(flow.nodes.values()), [], 0.0
    for state, count in in_states(flow.nodes):
        share = 100 * count / total
        shares.append((state, count, start, share))
        start += share
    end = datetime.fromtimestamp(now, UTC) if flow.finished_at is None else flow.finished_at
    return FlowRow(
        flow.id,
        flow.name,
        flow.key,
        flow.status,
        flow.created_at.isoformat(timespec="milliseconds"),
        max(0.0, (end - flow.created_at).total_seconds()),
        shares,
        total,
        flow.status == "running" and bool(flow.nodes.get("held")) and not MOVING & flow.nodes.keys(),
    )


def in_states(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Counts by state, in the order in which states are shown."""
    return [(state, counts[state]) for state in STATES if counts.get(state)]


def took(node: NodeRecord, now: float) -> float | None:
    """Seconds that the last run of a node took, or has taken; ``None`` if it has not run."""
    if node.started_at is None:
        return None
    if node.finished_at is not None and node.finished_at >= node.started_at:
        return (node.finished_at - node.started_at).total_seconds()
    return max(0.0, now - node.started_at.timestamp()) if node.state == "running" else None


# -- the graph


def before(nodes: Sequence[NodeRecord], gates: Iterable[int] = ()) -> Edges:
    """The nodes before each job; a gate that is not among ``gates`` stands for the last jobs of its flow."""
    known = {node.number: node for node in nodes}
    kept = frozenset(gates)
    ends: dict[int, list[int]] = {}

    def seen(number: int) -> list[int]:
        node = known.get(number)
        if node is None:
            return []
        if node.job_id is not None or number in kept:
            return [number]
        if number not in ends:
            ends[number] = []
            ends[number] = [each for other, _ in node.after for each in seen(other)]
        return ends[number]

    return {
        node.number: {each: condition for other, condition in node.after for each in seen(other)}
        for node in nodes
        if node.job_id is not None or node.number in kept
    }


def in_order(edges: Mapping[int, Mapping[int, str]]) -> list[int]:
    """Each node behind those before it."""
    return topological_order({number: len(others) for number, others in edges.items()}, _followers(edges))


def layers(nodes: Sequence[NodeRecord]) -> list[list[FlowBox]]:
    """The graph of a flow: each box in a layer below those before it.

    Args:
        nodes: of the flow, gates among them; edges from others are left out.
    """
    edges = before(nodes, _wide_gates(nodes))
    known = {node.number: node for node in nodes if node.number in edges}
    groups = _groups(known, edges)
    home = {number: numbers[0] for _, numbers in groups for number in numbers}
    boxes: dict[int, FlowBox] = {}
    for form, numbers in groups:
        after = {(home[each], how) for number in numbers for each, how in edges[number].items() if each in home}
        inside = [known[number] for number in numbers]
        states = in_states(Counter(node.state for node in inside))
        after_others = sorted(pair for pair in after if pair[0] != numbers[0])
        boxes[numbers[0]] = FlowBox(numbers[0], form, inside, after_others, states)
    found: list[list[FlowBox]] = []
    depth: dict[int, int] = {}
    for number in in_order({number: dict(box.after) for number, box in boxes.items()}):
        level = depth[number] = 1 + max((depth[each] for each, _ in boxes[number].after), default=-1)
        if level == len(found):
            found.append([])
        found[level].append(boxes[number])
    return _untangled(found)


def _wide_gates(nodes: Sequence[NodeRecord]) -> list[int]:
    """The gates of flows in the flow through which too many edges would lead."""
    ends = {node.number: len(node.after) for node in nodes if node.job_id is None and node.gate is not None}
    uses = Counter(each for node in nodes for each, _ in node.after if each in ends)
    return [number for number, count in ends.items() if count * uses[number] > THROUGH]


Form: TypeAlias = Literal["one", "many", "chain", "gate"]


def _groups(known: Mapping[int, NodeRecord], edges: Edges) -> list[tuple[Form, list[int]]]:
    """The nodes of each box: alike are chains of the same kinds after and before the same nodes."""
    follow = _followers(edges)
    alike: dict[object, list[list[int]]] = {}
    groups: list[tuple[Form, list[int]]] = []
    for chain in _chains(known, edges, follow):
        head, tail = chain[0], chain[-1]
        if known[head].job_id is None:
            groups.append(("gate", chain))
            continue
        way = tuple((known[each].kind, *(edges[each].values() if each != head else ())) for each in chain)
        ends = frozenset((each, edges[each][tail]) for each in follow.get(tail, ()))
        alike.setdefault((frozenset(edges[head].items()), ends, way), []).append(chain)
    for chains in alike.values():
        length = len(chains[0])
        if len(chains) >= ALIKE and length <= max(LONG, len(chains)):
            groups += [("many", [chain[at] for chain in chains]) for at in range(length)]
        elif length >= LONG:
            groups += [("chain", chain) for chain in chains]
        else:
            groups += [("one", [each]) for chain in chains for each in chain]
    return groups


def _chains(known: Mapping[int, NodeRecord], edges: Edges, follow: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """The nodes in chains, as long as nothing else is before or after a node within."""
    found: dict[int, list[int]] = {}
    for number in in_order(edges):
        last = next(iter(edges[number]), None)
        goes_on = (
            last is not None
            and len(edges[number]) == 1
            and len(follow[last]) == 1
            and known[number].job_id is not None
            and known[last].job_id is not None
        )
        chain = found[last] if goes_on and last is not None else []
        chain.append(number)
        found[number] = chain
    return [chain for number, chain in found.items() if chain[0] == number]


def _followers(edges: Mapping[int, Mapping[int, str]]) -> dict[int, list[int]]:
    follow: dict[int, list[int]] = {}
    for number, others in edges.items():
        for each in others:
            follow.setdefault(each, []).append(number)
    return follow


def _untangled(found: list[list[FlowBox]]) -> list[list[FlowBox]]:
    """The boxes of each layer below the middle of those before them."""
    place: dict[int, float] = {}

    def middle(box: FlowBox) -> float:
        return sum(place[each] for each, _ in box.after) / len(box.after) if box.after else float(box.number)

    for layer in found:
        layer.sort(key=middle)
        for at, box in enumerate(layer):
            place[box.number] = (at + 0.5) / len(layer)
    return found
