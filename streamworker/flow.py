"""Flow: a graph of jobs, each of which runs when those before it have ended. Written here, kept in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from typing_extensions import Unpack

from streamworker import codec
from streamworker.errors import UsageError
from streamworker.job import IF_FAILED, WHENS, FlowGraph, FlowNode, IfFailed, Job, When, topological_order
from streamworker.payload import AnyPayload
from streamworker.producer import JobOptions, job_of

MAX_NODES: Final = 250_000
MAX_EDGES: Final = 1_000_000
MAX_NAME: Final = 200
"""Bytes of a name or a key."""
DEEPEST: Final = 100
"""Flows inside each other."""


class Node:
    """A node of a `Flow`: a job, or a flow in it.

    Attributes:
        name: within its flow; a node's result is found by it.
        flow: that it is part of.
        job: its job; ``None`` for a flow.
    """

    __slots__ = ("_inner", "flow", "if_failed", "job", "name")

    def __init__(self, flow: Flow, name: str, job: Job | None, inner: Flow | None, if_failed: IfFailed) -> None:
        self.flow = flow
        self.name = name
        self.job = job
        self._inner = inner
        self.if_failed = if_failed

    @property
    def id(self) -> str:
        """The id of its job, for `App.find` and `App.result`.

        Raises:
            UsageError: it is a flow.
        """
        if self.job is None:
            raise UsageError(f"the node {self.name!r} is a flow and has no job of its own")
        return self.job.id

    @property
    def inner(self) -> Flow | None:
        """The flow that it is; ``None`` for a job."""
        return self._inner

    def __repr__(self) -> str:
        return f"<Node {self.name}>"


After: TypeAlias = Node | Iterable[Node] | Mapping[Node, When]


class Flow:
    """A graph of jobs. It exists when `App.start` has written it, in your transaction.

    Args:
        name: what it is, for people: ``order``.
        key: of the flows of this name with this key only one is started, until it is cancelled or forgotten.

    Raises:
        UsageError: the name or the key is none.
    """

    def __init__(self, name: str, *, key: str | None = None) -> None:
        for what, value in (("name", name), ("key", key)):
            if value is not None or what == "name":
                _check_text(what, value)
        self.name: Final = name
        self.key: Final = key
        self._nodes: dict[str, Node] = {}
        self._edges: dict[tuple[Node, Node], When] = {}
        self._counts: dict[str, int] = {}

    @property
    def nodes(self) -> list[Node]:
        """Its nodes, in the order in which they were added."""
        return list(self._nodes.values())

    def add(
        self,
        what: AnyPayload | Job | Flow,
        /,
        *,
        after: After = (),
        when: When = "ok",
        if_failed: IfFailed = "fail",
        name: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Node:
        """Add a node.

        Args:
            what: a payload, a job made with `App.job`, or a flow, which is started and ends inside of this one.
            after: the nodes before it, each of which has to have ended; as a mapping, each with its own ``when``.
            when: how they have to have ended: ``ok``, ``failed`` (dead, expired or cancelled), or ``always``.
            if_failed: what its failure means to those after it with ``when="ok"``: they ``fail``, too; they are left
                out (``skip``), and the flow may be completed all the same; or they ``hold`` until it is replayed.
            name: within the flow; its kind unless given.
            options: of the job; ``delay`` and ``expires_in`` count from when it may run. Keys are the flow's.

        Raises:
            UsageError: an option makes no sense, or a node is not of this flow.
            InvalidJob: the payload does not fit its own type, or cannot be written as JSON.
        """
        if if_failed not in IF_FAILED:
            raise UsageError(f"if_failed={if_failed!r} must be one of {', '.join(IF_FAILED)}")
        inner = what if isinstance(what, Flow) else None
        job = None if isinstance(what, Flow) else _job(what, **options)
        if inner is not None and any(value is not None for value in options.values()):
            raise UsageError("options are those of a job: give them to the nodes of the flow that you add")
        node = Node(self, self._name(name, what, job), job, inner, if_failed)
        edges = [(each, _when(how)) for each, how in _pairs(after, when)]
        for before, _ in edges:
            self._check(before)
        self._nodes[node.name] = node
        for before, how in edges:
            self._edges[node, before] = how
        return node

    def link(self, before: Node, node: Node, *, when: When = "ok") -> None:
        """Put a node after another one, both of which were added before.

        Args:
            before: has to have ended.
            node: runs then.
            when: how it has to have ended.

        Raises:
            UsageError: a node is not of this flow. Cycles are found at the start.
        """
        self._check(before)
        self._check(node)
        self._edges[node, before] = _when(when)

    def _check(self, node: Any) -> None:
        if not isinstance(node, Node) or self._nodes.get(node.name) is not node:
            raise UsageError(f"{node!r} is no node of the flow {self.name!r}: after= takes what its add() returned")

    def _name(self, given: str | None, what: Any, job: Job | None) -> str:
        if given is not None:
            _check_text("name", given)
            if given in self._nodes:
                raise UsageError(f"the flow {self.name!r} has a node {given!r} already")
            return given
        base = what.name if job is None else job.kind or "job"
        count = self._counts.get(base, 0)
        while True:
            count += 1
            name = base if count == 1 else f"{base}-{count}"
            if name not in self._nodes:
                self._counts[base] = count
                return name

    def graph(self) -> FlowGraph:
        """The flow as it is stored, with the flows in it unfolded.

        Raises:
            UsageError: it is empty, too large, has a cycle, or a job twice.
        """
        made = _Unfolded()
        made.unfold(self, None, "", ())
        if len(made.nodes) > MAX_NODES or len(made.edges) > MAX_EDGES:
            raise UsageError(
                f"the flow {self.name!r} has {len(made.nodes)} nodes and {len(made.edges)} edges; {MAX_NODES} and "
                f"{MAX_EDGES} are allowed: put a flow between two large groups, or let a node add others as it runs"
            )
        ids = {(node.job.queue, node.job.id) for node in made.nodes if node.job is not None}
        if len(ids) != sum(node.job is not None for node in made.nodes):
            raise UsageError(f"the flow {self.name!r} has a job twice: make one for each node")
        return FlowGraph(codec.new_id(), self.name, self.key, made.nodes, made.edges)

    def ordered(self) -> list[Node]:
        """Its nodes, each behind those before it.

        Raises:
            UsageError: there is a cycle.
        """
        waits = dict.fromkeys(self._nodes.values(), 0)
        follow: dict[Node, list[Node]] = {}
        for node, before in self._edges:
            waits[node] += 1
            follow.setdefault(before, []).append(node)
        ready = topological_order(waits, follow)
        if len(ready) < len(waits):
            around = ", ".join(node.name for node, count in waits.items() if count)[:200]
            raise UsageError(f"the flow {self.name!r} has a cycle: each of these nodes waits for another ({around})")
        return ready

    def edges(self) -> list[tuple[Node, Node, When]]:
        """(node, one before it, how that has to have ended)."""
        return [(node, before, when) for (node, before), when in self._edges.items()]


class _Unfolded:
    """The nodes and edges of a flow and of all flows in it."""

    def __init__(self) -> None:
        self.nodes: list[FlowNode] = []
        self.edges: list[tuple[int, int, str]] = []

    def unfold(
        self, flow: Flow, outer: tuple[int, IfFailed] | None, path: str, above: tuple[Flow, ...]
    ) -> tuple[int, list[int]]:
        """Add a flow; returns the place of its gate, and the places of the jobs that come first in it.

        Args:
            flow: to be added.
            outer: place of the gate of the flow around it, and what its failure means there.
            path: names of the flows around it.
            above: these flows.
        """
        if flow in above:
            raise UsageError(f"the flow {flow.name!r} is inside of itself")
        if len(above) > DEEPEST:
            raise UsageError(f"more than {DEEPEST} flows are inside of each other")
        if not flow.nodes:
            raise UsageError(f"the flow {flow.name!r} has no nodes")
        gate = len(self.nodes)
        name = path.removesuffix("/") or flow.name
        self.nodes.append(FlowNode(name, None, None) if outer is None else FlowNode(name, None, *outer))
        ends: dict[Node, int] = {}
        firsts: dict[Node, list[int]] = {}
        for node in flow.ordered():
            if node.inner is not None:
                ends[node], firsts[node] = self.unfold(
                    node.inner, (gate, node.if_failed), f"{path}{node.name}/", (*above, flow)
                )
            else:
                ends[node], firsts[node] = len(self.nodes), [len(self.nodes)]
                self.nodes.append(FlowNode(path + node.name, node.job, gate, node.if_failed))
        waiting: set[Node] = set()
        followed: set[Node] = set()
        for node, before, when in flow.edges():
            waiting.add(node)
            followed.add(before)
            self.edges += [(first, ends[before], when) for first in firsts[node]]
            if len(self.edges) > MAX_EDGES:
                break
        self.edges += [(gate, ends[node], "end") for node in ends if node not in followed]
        return gate, [first for node in ends if node not in waiting for first in firsts[node]]


def chain(*parts: AnyPayload | Job | Flow, name: str = "chain", key: str | None = None) -> Flow:
    """A flow in which each part runs after the one before it.

    Args:
        parts: payloads, jobs, or flows such as a `group`.
        name: of the flow.
        key: of the flow.
    """
    flow = Flow(name, key=key)
    before: tuple[Node, ...] = ()
    for part in parts:
        before = (flow.add(part, after=before),)
    return flow


def group(*parts: AnyPayload | Job | Flow, name: str = "group", key: str | None = None) -> Flow:
    """A flow whose parts wait for nothing.

    Args:
        parts: payloads, jobs or flows.
        name: of the flow.
        key: of the flow.
    """
    flow = Flow(name, key=key)
    for part in parts:
        flow.add(part)
    return flow


def _check_text(what: str, value: Any) -> None:
    if not isinstance(value, str) or not value or "\x00" in value or len(value.encode()) > MAX_NAME:
        raise UsageError(f"{what}={value!r} must be a text of 1 to {MAX_NAME} bytes")


def _pairs(after: After, when: When) -> Iterable[tuple[Node, When]]:
    if isinstance(after, Mapping):
        return after.items()
    if isinstance(after, Node):
        return [(after, when)]
    return [(node, when) for node in after]


def _when(given: Any) -> When:
    if given not in WHENS:
        raise UsageError(f"when={given!r} must be one of {', '.join(WHENS)}")
    return given  # type: ignore[no-any-return]


def _job(what: AnyPayload | Job, **options: Unpack[JobOptions]) -> Job:
    job = job_of(what, **options)
    if job.key is not None or job.debounce is not None or job.replace:
        raise UsageError("a node has no key: give one to the flow, Flow(name, key=...)")
    return job
