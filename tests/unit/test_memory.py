"""`testing.context` and `testing.run` for handlers with steps, waits, a cursor and parents: no server is there."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from streamworker import App, Context, Payload
from streamworker.errors import ConfigurationError, Parked, ResultNotKept, SignalTimeout, StepsChanged, UsageError
from streamworker.testing import JobMemory, Raised, context, run

pytestmark = pytest.mark.anyio


class Place(Payload, kind="place", queue="q"):
    amount: int = 5


class Receipt(msgspec.Struct):
    number: str


app: App[Any] = App()
calls: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def charge(amount: int) -> Receipt:
    calls.append(f"charge {amount}")
    return Receipt(f"R-{amount}")


async def ship() -> str:
    calls.append("ship")
    return "parcel 7"


@app.handler
async def place(payload: Place, ctx: Context[Any]) -> str:
    receipt = await ctx.step("charge", charge, payload.amount, result=Receipt)
    approval = await ctx.wait_for("approved", timeout=7 * 86400)
    await ctx.sleep(3600)
    parcel = await ctx.step("ship", ship)
    return f"{receipt.number} {approval['by']} {parcel}"


async def test_a_handler_goes_through_its_waits_run_by_run():
    payload, memory = Place(), JobMemory()
    with pytest.raises(Parked) as parked:
        await place(payload, context(payload, memory=memory))
    assert parked.value.signal == "approved"
    assert memory.steps == {"charge": {"number": "R-5"}}
    memory.signals["approved"] = {"by": "ann"}
    with pytest.raises(Parked):  # it sleeps
        await place(payload, context(payload, memory=memory))
    with pytest.raises(Parked):
        await place(payload, context(payload, memory=memory))
    memory.pass_time(3600)
    assert await place(payload, context(payload, memory=memory)) == "R-5 ann parcel 7"
    assert calls == ["charge 5", "ship"]  # each once, in all these runs
    assert memory.steps == {"charge": {"number": "R-5"}, "ship": "parcel 7"}


async def test_without_a_memory_each_context_is_a_first_run():
    for _ in range(2):
        with pytest.raises(Parked):
            await place(Place(), context(Place()))
    assert calls == ["charge 5", "charge 5"]


async def test_a_signal_may_be_late_and_counts_no_more_then():
    memory = JobMemory()
    with pytest.raises(Parked):
        await place(Place(), context(Place(), memory=memory))
    memory.pass_time(8 * 86400)
    with pytest.raises(SignalTimeout, match="approved"):
        await place(Place(), context(Place(), memory=memory))
    memory.signals["approved"] = {"by": "late"}
    with pytest.raises(SignalTimeout):
        await place(Place(), context(Place(), memory=memory))


async def test_run_takes_the_memory_too_and_parking_is_an_outcome():
    memory = JobMemory(signals={"approved": {"by": "ann"}})
    outcome = await run(app, Place(), memory=memory)
    assert isinstance(outcome, Raised) and isinstance(outcome.error, Parked)
    memory.pass_time(3600)
    assert (await run(app, Place(), memory=memory)).value == "R-5 ann parcel 7"  # type: ignore[union-attr]


class Sync(Payload, kind="sync", queue="q"):
    pass


@app.handler
def in_a_thread(payload: Sync, ctx: Context[Any]) -> Any:
    receipt = ctx.step_blocking("charge", charge, 1)
    done = ctx.cursor.read_blocking(0)
    ctx.cursor.set_blocking(done + 1)
    return receipt, ctx.wait_for_blocking("go"), done, ctx.parents.results_blocking()


async def test_sync_handlers_bare_in_a_test_with_a_loop_and_in_run():
    memory = JobMemory(parents={"first": {"number": "R-1"}})
    with pytest.raises(Parked):
        in_a_thread(Sync(), context(Sync(), memory=memory))
    memory.signals["go"] = None
    assert in_a_thread(Sync(), context(Sync(), memory=memory)) == (
        {"number": "R-1"}, None, 1, {"first": {"number": "R-1"}},
    )  # fmt: skip
    assert memory.cursor == 2
    assert (await run(app, Sync(), memory=memory)).value[2] == 2  # type: ignore[union-attr]
    assert calls == ["charge 1"]


async def test_the_rules_of_steps_hold_here_too():
    memory = JobMemory()
    ctx = context(Place(), memory=memory)
    await ctx.step("one", ship)
    with pytest.raises(UsageError, match="two steps of this handler are named 'one'"):
        await ctx.step("one", ship)
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        await ctx.step("object", object)
    with pytest.raises(StepsChanged, match="renamed or reordered"):
        await context(Place(), memory=memory).step("other", ship)
    with pytest.raises(ConfigurationError, match="run the handler on servers"):
        await context(Place()).step("rows", ship, transaction=True)
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        async with context(Place()).transaction():
            pass


async def test_parents():
    ctx = context(Place(), memory=JobMemory(parents={"charge": Receipt("R-9"), "label": None}))
    assert await ctx.parents.result("charge", Receipt) == Receipt("R-9")
    assert await ctx.parents.results() == {"charge": {"number": "R-9"}, "label": None}
    with pytest.raises(ResultNotKept, match="no node 'pack'"):
        await ctx.parents.result("pack")
    assert await context(Place()).parents.results() == {}
