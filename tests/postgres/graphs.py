"""Random flows, and what must come of them: a model that knows nothing of the SQL."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from streamworker import Flow, Payload
from streamworker.flow import Node


class Act(Payload, kind="act", queue="acts"):
    """A node: writes one row in its transaction, or dies; ``grow`` adds so many nodes to its flow as it does."""

    flow: str
    n: int
    dies: bool = False
    grow: int = 0


class Spec(msgspec.Struct):
    """One node of a random graph; ``before`` is node to condition."""

    n: int
    dies: bool
    grow: int
    if_failed: str
    before: dict[int, str]


def draw(chance: random.Random, most: int, *, held: bool = True) -> list[Spec]:
    """A graph of up to ``most`` nodes."""
    size = chance.randint(1, most)
    shape = chance.choice(["sparse", "dense", "wide", "line"])
    specs = []
    for n in range(size):
        before: dict[int, str] = {}
        if n:
            if shape == "line":
                before = {n - 1: "ok"}
            elif shape == "wide":
                before = (
                    dict.fromkeys(range(n), "ok") if n == size - 1 else ({0: "ok"} if chance.random() < 0.5 else {})
                )
            else:
                count = min(n, chance.randint(0, 2 if shape == "sparse" else 6))
                before = dict.fromkeys(chance.sample(range(n), count), "ok")
        for each in before:
            draw_ = chance.random()
            before[each] = "ok" if draw_ < 0.75 else "always" if draw_ < 0.92 else "failed"
        policy = chance.choice(["fail", "skip", "hold"] if held else ["fail", "skip"])
        specs.append(
            Spec(n, chance.random() < 0.06, chance.randint(1, 3) if chance.random() < 0.05 else 0, policy, before)
        )
    return specs


def flow_of(name: str, specs: list[Spec]) -> Flow:
    flow = Flow("drawn", key=name)
    nodes: list[Node] = []
    for spec in specs:
        payload = Act(flow=name, n=spec.n, dies=spec.dies, grow=spec.grow)
        after: Any = {nodes[n]: when for n, when in spec.before.items()}
        nodes.append(flow.add(payload, after=after, if_failed=spec.if_failed, name=str(spec.n)))  # type: ignore[arg-type]
    return flow


def grown(payload: Act) -> Flow:
    """What a node adds as it runs: a line of nodes."""
    flow = Flow("grown")
    before: tuple[Node, ...] = ()
    for k in range(1, payload.grow + 1):
        before = (flow.add(Act(flow=payload.flow, n=payload.n * 1000 + 1_000_000 + k), after=before),)
    return flow


def extras(spec: Spec) -> set[int]:
    return {spec.n * 1000 + 1_000_000 + k for k in range(1, spec.grow + 1)}


def foretell(specs: list[Spec], known: dict[int, str] | None = None) -> dict[int, str]:
    """The outcome of each node: ok, failed, held, skipped, unrun (failed and never ran), or blocked.

    Args:
        specs: the graph.
        known: outcomes of an earlier time: what ran stays so, and what died then now succeeds.
    """
    found: dict[int, str] = {}
    for spec in specs:
        states = [_state(found[n], when, specs[n].if_failed) for n, when in spec.before.items()]
        if known is not None and known[spec.n] == "ok":
            found[spec.n] = "ok"
        elif "open" in states:
            found[spec.n] = "blocked"
        elif "failing" in states:
            found[spec.n] = "unrun"
        elif "unmet" in states:
            found[spec.n] = "skipped"
        elif spec.dies and known is None:
            found[spec.n] = "held" if spec.if_failed == "hold" else "failed"
        else:
            found[spec.n] = "ok"
    return found


def _state(outcome: str, when: str, policy: str) -> str:
    """Of the edge from a node with this outcome."""
    failed = outcome in ("failed", "held", "unrun")
    if outcome == "blocked":
        return "open"
    if when == "always" or (outcome == "ok" and when == "ok") or (failed and when == "failed"):
        return "met"
    if not failed or when == "failed":
        return "unmet"
    if outcome == "held":
        return "open"
    return "unmet" if policy == "skip" else "failing"


def effects(specs: list[Spec], outcomes: dict[int, str]) -> set[int]:
    """The rows that must be there, each once."""
    done: set[int] = set()
    for spec in specs:
        if outcomes[spec.n] == "ok":
            done |= {spec.n} | extras(spec)
    return done


def status(specs: list[Spec], outcomes: dict[int, str]) -> str:
    """Of the flow."""
    followed = {n for spec in specs for n in spec.before}
    if any(outcomes[spec.n] == "blocked" or (outcomes[spec.n] == "held" and spec.n not in followed) for spec in specs):
        return "running"
    failed = any(outcomes[spec.n] in ("failed", "held", "unrun") and spec.if_failed != "skip" for spec in specs)
    return "failed" if failed else "completed"
