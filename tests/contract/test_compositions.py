"""What decides when a job starts, two at a time: which wins is in the table of docs/order.md.

The pairs that stand elsewhere: order with levels, delays, expiry, limits, batches and fairness, and fairness with levels, in
test_order_keys, test_line_model and test_fairness; limits with batches and expiry, batches with expiry and with keys that
are held, delays with expiry and with such keys, in test_batches, test_limits, test_expiry and test_unique.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from streamworker import App, Payload
from tests.conftest import eventually
from tests.contract.helpers import settings, working


class Plain(Payload, kind="plain", queue="q"):
    name: str


class Ordered(Payload, kind="ordered", queue="q", order_by="of"):
    name: str
    of: str = "k"


class Fair(Payload, kind="fair", queue="q", fair_by="of"):
    name: str
    of: str = "t"


class Gate:
    """Handlers of all kinds, which note what they start; those of a name with an exclamation mark wait until `open`.

    Args:
        raw: the server.
        ground: the mode.
        slots: of the worker.
        limits: options of all handlers.
    """

    def __init__(self, raw: Any, ground: Any, slots: int = 10, **limits: Any) -> None:
        self.app = App(settings=settings(raw, ground, concurrency=slots))
        self.ran: list[str] = []
        self.at_once = self.most = 0
        self.gate = anyio.Event()
        self.raw = raw
        for kind in (Plain, Ordered, Fair):
            self._handle(kind, limits)

    def _handle(self, kind: Any, limits: dict[str, Any]) -> None:
        async def run(payload: Any) -> None:
            self.ran.append(payload.name)
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            if payload.name.endswith("!"):
                await self.gate.wait()
            await anyio.sleep(0.002)
            self.at_once -= 1

        run.__annotations__["payload"] = kind
        self.app.handler(**limits)(run)

    def delayed(self) -> int:
        count: int = self.raw.zcard("stream:{q}:due")
        return count

    async def until(self, *names: str) -> None:
        await eventually(lambda: set(names) <= set(self.ran), timeout=20)


@pytest.fixture
async def batches(raw, ground) -> AsyncIterator[tuple[App[Any], list[list[str]]]]:
    """An app with a batched handler of each kind, and the names in its batches."""
    app, called = App(settings=settings(raw, ground)), []

    @app.handler(batch=4, linger=0.05)
    async def plain(payloads: list[Plain]) -> None:
        called.append([payload.name for payload in payloads])

    @app.handler(batch=4, linger=0.05)
    async def fair(payloads: list[Fair]) -> None:
        called.append([payload.name for payload in payloads])

    async with app:
        yield app, called


async def test_order_and_a_held_key(raw, ground):
    """What is replaced in the line of its order key passes its place on, and the new one stands behind the others."""
    gate = Gate(raw, ground)
    async with gate.app as app, working(app):
        await app.enqueue(Ordered("first!"))
        await gate.until("first!")
        old = await app.enqueue(Ordered("old"), key="u", unique="done")
        await app.enqueue(Ordered("between"))
        new = await app.enqueue(Ordered("new"), key="u", unique="done", replace=True)
        assert (new.new, new.replaced) == (True, old.id)
        gate.gate.set()
        await gate.until("new")
        assert gate.ran == ["first!", "between", "new"]
        await eventually(lambda: not raw.exists("stream:{q}:key:u", "stream:{q}:order"))


async def test_fairness_and_a_limit(raw, ground):
    """Jobs have had their turn when they wait for a permit: the quiet tenant's are among the first that ask for one."""
    gate = Gate(raw, ground, 4, concurrency=1)
    async with gate.app as app:
        await app.enqueue_many([Fair(f"large{number}", "large") for number in range(40)])
        await app.enqueue_many([Fair(f"small{number}", "small") for number in range(3)])
        async with working(app):
            await gate.until("small0", "small1", "small2")
            assert len(gate.ran) <= 16, gate.ran
            await eventually(lambda: len(gate.ran) == 43, timeout=20)
    assert gate.most == 1


async def test_fairness_and_a_delay(raw, ground):
    """A delayed job joins its tenant's line when it is due, and starts soon after."""
    gate = Gate(raw, ground, 1)
    async with gate.app as app:
        await app.enqueue_many(
            [Fair("large0!", "large"), *(Fair(f"large{number}", "large") for number in range(1, 40))]
        )
        async with working(app):
            await gate.until("large0!")
            await app.enqueue(Fair("small", "small"), delay=0.05)
            await eventually(lambda: not gate.delayed())
            gate.gate.set()
            await gate.until("small")
            assert len(gate.ran) <= 6, gate.ran
            await eventually(lambda: len(gate.ran) == 41, timeout=20)


async def test_fairness_and_batches(batches):
    """A batch takes what is claimed: jobs of several tenants, each in its share."""
    app, called = batches
    await app.enqueue_many([Fair("large", "large") for _ in range(40)])
    await app.enqueue_many([Fair("small", "small") for _ in range(4)])
    async with working(app):
        await eventually(lambda: sum(map(len, called)) == 44, timeout=20)
    assert sum(batch.count("small") for batch in called[:5]) == 4, called


async def test_fairness_and_expiry(raw, ground):
    """What expired in its tenant's line never starts, and holds up nothing."""
    gate = Gate(raw, ground)
    async with gate.app as app:
        jobs = [app.job(Fair("late", "large"), expires_in=0.05) for _ in range(30)]
        await app.enqueue_many([*jobs, Fair("small", "small"), Fair("last", "large")])
        await anyio.sleep(0.06)
        async with working(app):
            await gate.until("small", "last")
            await eventually(ground.empty)
    assert sorted(gate.ran) == ["last", "small"]
    assert not raw.keys("stream:{q}:fair:*")


async def test_fairness_and_a_held_key(raw, ground):
    """What is replaced in its tenant's line does not start; the new one takes its turn."""
    gate = Gate(raw, ground, 1)
    async with gate.app as app:
        await app.enqueue_many([Fair("large0!", "large"), *(Fair(f"large{number}", "large") for number in range(1, 5))])
        async with working(app):
            await gate.until("large0!")
            old = await app.enqueue(Fair("old", "small"), key="u", unique="done")
            new = await app.enqueue(Fair("new", "small"), key="u", unique="done", replace=True)
            assert new.replaced == old.id
            gate.gate.set()
            await eventually(lambda: len(gate.ran) == 6, timeout=20)
    assert "old" not in gate.ran and "new" in gate.ran
    assert not raw.exists("stream:{q}:key:u")


async def test_a_limit_and_levels(raw, ground):
    """Permits go by arrival: a high job that asks later does not overtake those that wait."""
    gate = Gate(raw, ground, concurrency=1)
    async with gate.app as app, working(app):
        await app.enqueue(Plain("first!"))
        await gate.until("first!")
        for number, (name, level) in enumerate((("low", "low"), ("normal", "normal"), ("high", "high")), 1):
            await app.enqueue(Plain(name), priority=level)
            await eventually(lambda number=number: gate.delayed() == number)
        gate.gate.set()
        await gate.until("high")
    assert gate.ran == ["first!", "low", "normal", "high"]


async def test_a_limit_and_a_delay(raw, ground):
    """A delayed job asks for its permit when it is due, and not before."""
    gate = Gate(raw, ground, concurrency=1)
    async with gate.app as app, working(app):
        await app.enqueue(Plain("later"), delay=0.3)
        await app.enqueue(Plain("first!"))
        await gate.until("first!")
        await app.enqueue(Plain("second"))
        await eventually(lambda: gate.delayed() == 2)
        gate.gate.set()
        await gate.until("later")
    assert gate.ran == ["first!", "second", "later"] and gate.most == 1


async def test_a_limit_and_a_held_key(raw, ground):
    """A job that waits for a permit has not started: it can be replaced."""
    gate = Gate(raw, ground, concurrency=1)
    async with gate.app as app, working(app):
        await app.enqueue(Plain("first!"))
        await gate.until("first!")
        old = await app.enqueue(Plain("old"), key="u", unique="started")
        await eventually(lambda: gate.delayed() == 1)
        new = await app.enqueue(Plain("new"), key="u", unique="started", replace=True)
        assert new.replaced == old.id
        gate.gate.set()
        await gate.until("new")
        await eventually(lambda: ground.empty() and not raw.exists("stream:{q}:key:u"))
    assert gate.ran == ["first!", "new"]


async def test_levels_and_a_delay(raw, ground):
    """A delayed job is ready at its level: a high one overtakes what waits."""
    gate = Gate(raw, ground, 1)
    async with gate.app as app:
        await app.enqueue_many([Plain("first!"), *(Plain(f"normal{number}") for number in range(10))])
        async with working(app):
            await gate.until("first!")
            await app.enqueue(Plain("high"), delay=0.05, priority="high")
            await eventually(lambda: not gate.delayed())
            gate.gate.set()
            await eventually(lambda: len(gate.ran) == 12, timeout=20)
    assert gate.ran[:2] == ["first!", "high"]


async def test_levels_and_batches(batches):
    """The first batch is of the high jobs, whenever they came."""
    app, called = batches
    await app.enqueue_many([Plain("low") for _ in range(8)])
    await app.enqueue_many([app.job(Plain("high"), priority="high") for _ in range(4)])
    async with working(app):
        await eventually(lambda: sum(map(len, called)) == 12, timeout=20)
    assert called[0] == ["high"] * 4


async def test_levels_and_expiry(raw, ground):
    """A job that had to wait behind a higher level ends when its time is over."""
    gate = Gate(raw, ground, 1)
    async with gate.app as app:
        await app.enqueue(Plain("low"), priority="low", expires_in=0.1)
        await app.enqueue(Plain("high!"), priority="high")
        async with working(app):
            await gate.until("high!")
            await anyio.sleep(0.12)
            gate.gate.set()
            await eventually(ground.empty)
    assert gate.ran == ["high!"]


async def test_levels_and_a_held_key(raw, ground):
    """A job takes the place of another one at its own level."""
    gate = Gate(raw, ground, 1)
    async with gate.app as app, working(app):
        await app.enqueue(Plain("first!"))
        await gate.until("first!")
        await app.enqueue(Plain("normal"))
        await app.enqueue(Plain("old"), key="u", unique="done", priority="low")
        await app.enqueue(Plain("new"), key="u", unique="done", priority="high", replace=True)
        gate.gate.set()
        await eventually(lambda: len(gate.ran) == 3, timeout=20)
        await eventually(ground.empty)
    assert gate.ran == ["first!", "new", "normal"]


async def test_a_delay_and_batches(batches):
    """Delayed jobs join a batch when they are due."""
    app, called = batches
    await app.enqueue_many([app.job(Plain("later"), delay=0.1) for _ in range(3)])
    async with working(app):
        await eventually(lambda: sum(map(len, called)) == 3, timeout=20)
    assert max(map(len, called)) > 1, called


async def test_a_held_key_and_expiry(raw, ground):
    """A job that expires while it waits, is delayed, or would be retried too late frees its key."""
    app = App(settings=settings(raw, ground))
    attempts: list[str] = []

    @app.handler(max_attempts=3)
    async def plain(payload: Plain) -> None:
        attempts.append(payload.name)
        if payload.name == "fails":
            raise ValueError("as planned")

    async with app:
        waits = await app.enqueue(Plain("waits"), key="u", unique="done", expires_in=0.05)
        assert (await app.enqueue(Plain("again"), key="u", unique="done")).id == waits.id
        await app.enqueue(Plain("fails"), key="v", unique="done", expires_in=0.8)
        await anyio.sleep(0.06)
        async with working(app):
            await eventually(ground.empty)
            await eventually(lambda: not raw.exists("stream:{q}:key:u", "stream:{q}:key:v"))
            assert (await app.enqueue(Plain("free"), key="u", unique="done")).new
            assert (await app.enqueue(Plain("free"), key="v", unique="done")).new
            await eventually(lambda: attempts.count("free") == 2)
    assert "waits" not in attempts and "fails" in attempts
