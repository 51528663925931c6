"""The executor, with handlers called directly: every way a handler can end, and that a task survives all of them."""

import asyncio
import contextvars
import json
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest

from streamworker import Context, Discard, Handlers, Payload
from streamworker.codec import State, sealed
from streamworker.context import Shared
from streamworker.execution import Execution
from streamworker.job import Abandoned, Claim, Interrupted, Ok, Outcome, Raised, TimedOut, Undecodable, UnknownKind
from streamworker.worker.executor import Executor
from streamworker.worker.job_task import JobTask
from tests.conftest import eventually


class Note(Payload, kind="note", queue="q"):
    text: str = ""


def claim(
    document: Any = None, *, body: bytes | None = b"", count: int = 1, suspect: bool = False, kind: str = "note"
) -> Claim:
    if body == b"":
        body = json.dumps({"id": "i", "kind": kind, "payload": {"text": "x"}, **(document or {})}).encode()
    return Claim("q", "normal", "stream:{q}", b"1-0", count, body, b"e", suspect, secret=b"5ec2e7 0")


def executor(function: Any = None, *, timeout: float | None = 300, middleware: Any = (), **options: Any) -> Executor:
    handlers: Handlers[Any] = Handlers()
    if function is not None:
        handlers.handler(timeout=timeout)(function)
    return Executor(handlers, Shared("w", None), middleware=middleware, **options)


def prepared(made: Executor, given: Claim | None = None) -> Execution:
    run = Execution(given or claim())
    made.prepare(run)
    return run


async def call(function: Any, **options: Any) -> Outcome:
    made = executor(function, **options)
    return await made.call(prepared(made))


async def in_task(function: Any, meddle: Callable[[Execution], Any], **options: Any) -> Outcome:
    """Call in a task of its own, as a worker does; ``meddle`` once the handler waits. The task must be clean afterwards."""
    made = executor(function, **options)
    run = prepared(made)

    async def whole() -> Outcome:
        outcome = await made.call(run)
        await assert_clean()
        return outcome

    context = contextvars.copy_context()
    run.task = task = JobTask(whole(), loop=asyncio.get_running_loop(), context=context)
    task.context = context
    await eventually(lambda: run.started is not None)
    await asyncio.sleep(0)
    result = meddle(run)
    if isinstance(result, Awaitable):
        await result
    return await asyncio.wait_for(task, 5)


async def assert_clean() -> None:
    """This task is as good as new: nothing cancelled is left, and timeouts of what cleans up work."""
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await asyncio.sleep(10)
    with anyio.move_on_after(0.001) as scope:
        await anyio.sleep(10)
    assert scope.cancelled_caught
    assert task.cancelling() == 0


# -- before it runs


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        (claim(body=None), Undecodable),
        (claim(body=b"\xff"), Undecodable),
        (claim(body=b"x" * 300_000), Undecodable),
        (claim({"payload": {"text": 5}}), Undecodable),
        (claim({"payload": 5}), Undecodable),
        (claim({"payload": None}), Undecodable),
        (claim({"id": "x" * 201}), Undecodable),
        (claim(kind="who"), UnknownKind),
        (claim(kind="who", count=6), Abandoned),
        (claim(count=6), Abandoned),
        (claim(count=5, suspect=True), Abandoned),
        (claim({"streamworker_state": sealed(State(5), "i", b"5ec2e7 0")}), Abandoned),
        (claim({"streamworker_state": {"deliveries": 5}, "hop": 1}), None),
        (claim({"headers": {"streamworker-deliveries": "5"}, "hop": 1}), None),
        (claim({"payload": {"text": 5}}, count=6), Abandoned),
        (claim({"kind": None}), None),
        (claim({"kind": ""}), None),
        (claim(count=5), None),
        (claim({"max_attempts": 0}), None),
        (claim({"unknown": [1]}), None),
    ],
)
def test_what_is_decided_before_the_handler(given, outcome):
    async def note(payload: Note) -> None: ...

    run = prepared(executor(note), given)
    assert (None if run.outcome is None else type(run.outcome)) is outcome
    assert run.facts is not None
    assert run.facts.limits.max_attempts >= 1


@pytest.mark.parametrize(
    ("count", "suspect", "alone"), [(1, False, False), (3, False, False), (4, False, True), (3, True, True)]
)
def test_from_the_fourth_delivery_on_a_job_runs_alone(count, suspect, alone):
    async def note(payload: Note) -> None: ...

    assert prepared(executor(note), claim(count=count, suspect=suspect)).suspect is alone


@pytest.mark.parametrize(
    "moment", ["2999-01-01T00:00:00Z", "9999-12-31T23:59:59-14:00", "2000-01-01T00:00:00", "0001-01-01T00:00:00+14:00"]
)
def test_whether_a_job_is_due_is_left_to_the_server(moment):
    """Whatever the clock of this machine shows; the job is prepared to the end when the answer is there."""

    async def note(payload: Note) -> None: ...

    runs = executor(note)
    run = prepared(runs, claim({"run_at": moment}))
    assert (run.outcome, run.special, run.payload) == (None, True, None)
    runs.decode(run)
    # Special still: whether it has expired is asked once more when it starts.
    assert (run.outcome, run.special, run.payload) == (None, True, Note(text="x"))


def test_a_document_of_exactly_the_limit_is_read():
    async def note(payload: Note) -> None: ...

    body = b'{"payload":{"text":"' + b"x" * 100 + b'"}}'
    assert prepared(executor(note, max_job_bytes=len(body)), claim(body=body)).outcome is None
    assert isinstance(prepared(executor(note, max_job_bytes=len(body) - 1), claim(body=body)).outcome, Undecodable)


def test_the_jobs_own_max_attempts_holds():
    async def note(payload: Note) -> None: ...

    run = prepared(executor(note), claim({"max_attempts": 2, "attempt_count": 1}))
    assert run.facts is not None and (run.facts.limits.max_attempts, run.facts.attempts) == (2, 1)


# -- how it ends


async def test_what_it_returns():
    async def note(payload: Note, ctx: Context) -> str:
        assert ctx.job.id == "i"
        return payload.text

    async def quiet(payload: Note) -> None: ...

    assert await call(note) == Ok("x")
    assert await call(quiet) == Ok()


@pytest.mark.parametrize("sync", [False, True], ids=["async", "thread"])
@pytest.mark.parametrize(
    "error",
    [ValueError("x"), SystemExit(3), KeyboardInterrupt(), StopIteration("v"), StopAsyncIteration(), Discard("d"), BaseExceptionGroup("g", [SystemExit(1)]), MemoryError(), RecursionError()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
async def test_whatever_it_raises_ends_the_job_alone(sync, error):
    def plain(payload: Note) -> None:
        raise error

    async def awaited(payload: Note) -> None:
        await asyncio.sleep(0)
        raise error

    outcome = await call(plain if sync else awaited)
    assert isinstance(outcome, Raised)
    if isinstance(error, StopIteration):
        assert isinstance(outcome.error, RuntimeError)  # what a coroutine makes of it
    else:
        assert outcome.error is error
    await assert_clean()


async def test_a_stray_cancelled_error_is_the_handlers_own():
    async def note(payload: Note) -> None:
        task = asyncio.create_task(asyncio.sleep(10))
        task.cancel()
        await task

    outcome = await call(note)
    assert isinstance(outcome, Raised) and isinstance(outcome.error, asyncio.CancelledError)
    await assert_clean()


async def test_a_cancellation_from_elsewhere_is_no_failure_of_the_handler():
    async def note(payload: Note) -> None:
        await asyncio.sleep(10)

    assert isinstance(await in_task(note, lambda run: run.task.cancel()), Interrupted)


# -- timeouts and interruptions


async def test_a_timeout_propagates():
    async def note(payload: Note) -> None:
        await asyncio.sleep(10)

    assert await in_task(note, lambda run: run.cancel(TimedOut(1.0))) == TimedOut(1.0)
    assert await in_task(note, lambda run: run.cancel(Interrupted("x"))) == Interrupted("x")


async def test_the_first_reason_holds():
    async def note(payload: Note) -> None:
        await asyncio.sleep(10)

    def twice(run: Execution) -> None:
        run.cancel(Interrupted("x"))
        run.cancel(TimedOut(1.0))

    assert await in_task(note, twice) == Interrupted("x")


async def test_a_handler_that_finishes_although_it_was_cancelled_is_done():
    async def note(payload: Note, ctx: Context) -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            assert ctx.cancelled
        await asyncio.sleep(0)
        return "cleaned up"

    assert await in_task(note, lambda run: run.cancel(TimedOut(1.0))) == Ok("cleaned up")


async def test_an_error_while_being_cancelled_does_not_hide_the_reason():
    async def note(payload: Note) -> None:
        try:
            await asyncio.sleep(10)
        finally:
            raise ValueError("cleaning up failed")

    assert await in_task(note, lambda run: run.cancel(TimedOut(1.0))) == TimedOut(1.0)


@pytest.mark.parametrize("kind", ["asyncio.timeout", "anyio scope", "TaskGroup", "wait_for", "shield"])
async def test_cancelling_goes_through_structures_of_the_handlers_own(kind):
    async def note(payload: Note) -> None:
        match kind:
            case "asyncio.timeout":
                async with asyncio.timeout(10):
                    await asyncio.sleep(10)
            case "anyio scope":
                with anyio.move_on_after(10):
                    await anyio.sleep(10)
            case "TaskGroup":
                async with asyncio.TaskGroup() as group:
                    group.create_task(asyncio.sleep(10))
            case "wait_for":
                await asyncio.wait_for(asyncio.sleep(10), 10)
            case "shield":
                await asyncio.shield(asyncio.sleep(0.01))
                await asyncio.sleep(10)

    assert await in_task(note, lambda run: run.cancel(TimedOut(1.0))) == TimedOut(1.0)


async def test_a_deadline_inside_the_handler_is_its_own_error():
    async def note(payload: Note) -> None:
        async with asyncio.timeout(0.001):
            await asyncio.sleep(10)

    outcome = await call(note)
    assert isinstance(outcome, Raised) and isinstance(outcome.error, TimeoutError)
    await assert_clean()


async def test_cancelled_again_and_again_the_task_is_clean_in_the_end():
    async def note(payload: Note) -> None:
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(10)

    async def often(run: Execution) -> None:
        for _ in range(3):
            run.cancel(TimedOut(1.0))
            for _ in range(3):
                await asyncio.sleep(0)

    assert await in_task(note, often) == Ok()


async def test_deadlines():
    async def note(payload: Note, ctx: Context) -> None:
        assert ctx.deadline_at is not None and 0 < ctx.deadline_at - time.monotonic() <= 5

    made = executor(note, timeout=5)
    run = prepared(made)
    assert await made.call(run) == Ok()
    assert run.deadline is not None and run.overdue(run.deadline + 1) and not run.overdue(run.deadline)

    async def unlimited(payload: Note, ctx: Context) -> None:
        assert ctx.deadline is None

    assert await call(unlimited, timeout=None) == Ok()


async def test_cancelling_what_has_not_begun_or_is_over_does_nothing():
    async def note(payload: Note) -> None: ...

    made = executor(note)
    run = prepared(made)
    run.cancel(TimedOut(1))
    assert run.cause is None
    run.outcome = await made.call(run)
    run.cancel(TimedOut(1))
    assert run.cause is None
    await assert_clean()


# -- threads


async def test_sync_handlers_run_in_threads_and_see_the_context():
    seen = []

    def note(payload: Note, ctx: Context) -> str:
        seen.append(threading.current_thread())
        assert ctx.deadline is not None
        return ctx.job.id

    assert await call(note) == Ok("i")
    assert seen[0] is not threading.current_thread()


async def test_a_thread_is_told_but_not_stopped():
    told, go_on = threading.Event(), threading.Event()

    def note(payload: Note, ctx: Context) -> str:
        while not ctx.cancelled:
            time.sleep(0.001)
        told.set()
        assert go_on.wait(5)
        return "late"

    async def meddle(run: Execution) -> None:
        run.cancel(TimedOut(1.0))
        await eventually(told.is_set)
        go_on.set()

    assert await in_task(note, meddle) == Ok("late")


async def test_the_clock_of_a_thread_starts_in_the_thread():
    release = threading.Event()

    def note(payload: Note) -> None:
        assert release.wait(5)

    made = executor(note, timeout=7, threads=1)
    first, second = prepared(made), prepared(made)
    tasks = [asyncio.create_task(made.call(run)) for run in (first, second)]
    await eventually(lambda: first.deadline is not None and second.started is not None)
    assert second.started is not None and second.deadline is None and not second.overdue(1e18)
    release.set()
    assert await asyncio.gather(*tasks) == [Ok(), Ok()]


@pytest.mark.parametrize("how", ["thread", "thread, in time", "thread, failing", "swallowing"])
async def test_an_overrun_that_ends_well_is_told_of_once(how, caplog):
    go_on = threading.Event()

    def in_thread(payload: Note) -> str:
        assert go_on.wait(5)
        if how == "thread, failing":
            raise ValueError("late")
        return "late"

    async def swallowing(payload: Note) -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        return "late"

    async def meddle(run: Execution) -> None:
        if how == "swallowing":
            await eventually(lambda: run.overdue(time.monotonic()))
            run.cancel(TimedOut(0.01))
            return
        await eventually(lambda: run.deadline is not None)
        if how != "thread, in time":
            await eventually(lambda: run.overdue(time.monotonic()))
        go_on.set()

    function = swallowing if how == "swallowing" else in_thread
    timeout = 60 if how == "thread, in time" else 0.01
    outcome = await in_task(function, meddle, timeout=timeout)
    if how == "thread, failing":
        assert isinstance(outcome, Raised)
    else:
        assert outcome == Ok("late")
    told = [record.getMessage() for record in caplog.records if "handler_overran" in record.getMessage()]
    assert len(told) == (how in ("thread", "swallowing")), caplog.text
    for line in told:
        assert "job_id='i'" in line or "job_id=i" in line
        assert "timeout=0.01" in line and "duration=" in line


# -- context variables, middleware


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


async def test_a_thread_leaves_no_context_variable_behind():
    def note(payload: Note) -> None:
        variable.set("thread")

    assert await call(note) == Ok()
    assert variable.get() == "unset"


async def test_no_job_sees_a_context_variable_of_another():
    from streamworker.worker.tasks import JobTasks

    seen: list[str] = []
    done = asyncio.Event()

    async def note(payload: Note) -> None:
        seen.append(variable.get())
        variable.set("leaked")
        if len(seen) == 5:
            done.set()

    made = executor(note)

    class Ignored:
        def finish(self, run: Execution) -> None: ...

    executions = JobTasks(1, made, Ignored(), stuck=lambda run: None, grace=1)
    executions.open()
    for _ in range(5):
        executions.put(prepared(made))
    with anyio.fail_after(5):
        await done.wait()
    assert await executions.close(1) == []
    assert seen == ["unset"] * 5


@pytest.mark.parametrize("sync", [False, True], ids=["async", "thread"])
async def test_middleware_wraps_in_order(sync):
    trace: list[str] = []

    def layer(name: str):
        async def wrap(ctx: Context, call_next: Callable[[], Awaitable[Any]]) -> Any:
            trace.append(f"{name} {ctx.job.id}")
            value = await call_next()
            trace.append(f"/{name}")
            return f"{name}({value})"

        return wrap

    def plain(payload: Note) -> str:
        trace.append("handler")
        return "v"

    async def awaited(payload: Note) -> str:
        return plain(payload)

    assert await call(plain if sync else awaited, middleware=(layer("a"), layer("b"))) == Ok("a(b(v))")
    assert trace == ["a i", "b i", "handler", "/b", "/a"]


async def test_middleware_may_raise_catch_and_refuse():
    async def note(payload: Note) -> None:
        raise ValueError("x")

    async def catching(ctx: Context, call_next: Any) -> str:
        try:
            await call_next()
        except ValueError:
            return "caught"
        return "not"

    async def refusing(ctx: Context, call_next: Any) -> None:
        raise Discard("not today")

    assert await call(note, middleware=(catching,)) == Ok("caught")
    outcome = await call(note, middleware=(refusing, catching))
    assert isinstance(outcome, Raised) and isinstance(outcome.error, Discard)
