"""Order and fairness against a model of a few lines, and together with what else decides when a job starts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import anyio
from hypothesis import HealthCheck, given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from streamworker import App, Payload
from streamworker.broker import SettleRequest
from streamworker.job import Dead, Done, Drop, PackedJob, ReleaseAt, RetryAt
from tests.conftest import eventually
from tests.contract.helpers import names, settings, working

KEYS, TENANTS = ("", "a", "b", "c"), ("", "t", "u")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(KEYS), st.sampled_from(TENANTS), st.sampled_from(("high", "low"))),
        st.tuples(st.just("claim"), st.integers(1, 5)),
        st.tuples(st.just("end"), st.integers(0, 20), st.sampled_from(("done", "drop", "dead", "halt", "retry", "back"))),
    ),
    max_size=40,
)  # fmt: skip


class Model:
    """What order promises: per key the jobs in the order of acceptance; the first one alone may be claimed."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = defaultdict(list)
        self.running: dict[str, Any] = {}
        self.stored: dict[str, str] = {}
        self.halted: set[str] = set()

    def publish(self, job: str, key: str) -> None:
        self.stored[job] = key
        if key:
            self.lines[key].append(job)

    def may_start(self) -> set[str]:
        """Jobs that a worker may get: all without a key, and the first of each line that does not halt."""
        free = {job for job, key in self.stored.items() if not key}
        free |= {line[0] for key, line in self.lines.items() if line and key not in self.halted}
        return free - set(self.running)

    def end(self, job: str, how: str) -> None:
        del self.running[job]
        if how in ("retry", "back"):
            return
        key = self.stored.pop(job)
        if key and how == "halt":
            self.halted.add(key)
        elif key:
            self.lines[key].remove(job)


@bounded(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_the_broker_does_as_the_model(steps, redis_url, ground, raw):
    raw.flushall()
    anyio.run(_play, steps, ground.broker(redis_url, (("q", None),), lease=15.0))


async def _play(steps: Any, broker: Any) -> None:
    model, number = Model(), 0
    await broker.open()
    await broker.join("w")
    try:
        for step in [*steps, ("claim", 50)]:
            if step[0] == "publish":
                number += 1
                job, (_, key, tenant, level) = f"j{number}", step
                body = {"id": job, "payload": {}, "order_key": key or None, "fair_key": tenant or None, "hop": 1}
                lined = bool(key or tenant)
                await broker.publish([PackedJob(job, "q", level, json.dumps(body).encode(), lined=lined)])
                model.publish(job, key)
            elif step[0] == "claim":
                claims = await broker.claim(step[1], 0, list(model.running.values()))
                free, found = model.may_start(), names(claims)
                assert set(found) <= free, f"{found} started, and only {free} may"
                assert len(found) == min(step[1], len(free)), f"{found} started of {free}: slots stay idle"
                model.running.update(zip(found, claims, strict=True))
            elif model.running:
                job = sorted(model.running)[step[1] % len(model.running)]
                await broker.settle([_request(model.running[job], job, model.stored[job], step[2])])
                await broker.promote()
                model.end(job, step[2])
        assert (await broker.depth())[0].waiting == sum(
            len(line) - 1 for line in model.lines.values() if line
        )  # behind the first of each key, which is ready, runs or is dead
    finally:
        await broker.close()


def _request(claim: Any, job: str, key: str, how: str) -> SettleRequest:
    told = json.loads(claim.body)
    body = json.dumps({**told, "hop": told["hop"] + 1}).encode()
    if how == "retry":
        return SettleRequest(claim, RetryAt(0, "why"), body, job)
    if how == "back":
        return SettleRequest(claim, ReleaseAt(), body, job)
    if how == "done":
        return SettleRequest(claim, Done(), job_id=job, order=key)
    if how == "drop":
        return SettleRequest(claim, Drop(), job_id=job, order=key)
    return SettleRequest(claim, Dead("why"), job_id=job, order=key, halts=how == "halt")


class Step(Payload, kind="step", queue="q", order_by="key"):
    key: str
    number: int


async def test_order_and_a_limit(raw, ground):
    """A job that waits for a permit keeps its key."""
    ran: dict[str, list[int]] = defaultdict(list)
    app = App(settings=settings(raw, ground))

    @app.handler(concurrency=2)
    async def step(payload: Step) -> None:
        await anyio.sleep(0.005)
        ran[payload.key].append(payload.number)

    async with app, working(app):
        await app.enqueue_many([Step(key, number) for number in range(5) for key in "abcd"])
        await eventually(lambda: sum(map(len, ran.values())) == 20, timeout=20)
    assert all(numbers == list(range(5)) for numbers in ran.values())


async def test_order_and_batches(raw, ground):
    """Jobs of one key never share a batch."""
    ran: dict[str, list[int]] = defaultdict(list)
    shared = 0
    app = App(settings=settings(raw, ground))

    @app.handler(batch=4, linger=0.01)
    async def step(payloads: list[Step]) -> None:
        nonlocal shared
        shared += max(Counter(payload.key for payload in payloads).values()) > 1
        for payload in payloads:
            ran[payload.key].append(payload.number)

    async with app, working(app):
        await app.enqueue_many([Step(key, number) for number in range(5) for key in "abcd"])
        await eventually(lambda: sum(map(len, ran.values())) == 20, timeout=20)
    assert not shared and all(numbers == list(range(5)) for numbers in ran.values())


async def test_order_and_expiry(raw, ground):
    """An expired job passes its key on."""
    ran: list[int] = []
    app = App(settings=settings(raw, ground))

    @app.handler
    async def step(payload: Step) -> None:
        await anyio.sleep(0.3 if payload.number == 0 else 0)
        ran.append(payload.number)

    async with app, working(app):
        jobs = [app.job(Step("k", 0)), app.job(Step("k", 1), expires_in=0.1), app.job(Step("k", 2))]
        await app.enqueue_many(jobs)
        await eventually(lambda: 2 in ran)
    assert ran == [0, 2]
