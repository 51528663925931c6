"""A task and a context for each job: nothing that a job leaves behind reaches another one, and no more run than allowed."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import pytest

from streamworker import Context, Handlers, Payload
from streamworker.context import Shared
from streamworker.execution import Execution
from streamworker.job import Claim, Interrupted, Ok, Outcome, Raised, TimedOut
from streamworker.policy import judge
from streamworker.worker import stacks
from streamworker.worker.calls import JobThreads
from streamworker.worker.executor import Executor
from streamworker.worker.tasks import STARTS, JobTasks
from tests.conftest import eventually

pytestmark = pytest.mark.anyio


class Note(Payload, kind="note", queue="q"):
    text: str = ""


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class Odd(Payload, kind="odd", queue="q"):
    text: str = ""

    def __post_init__(self) -> None:
        variable.set("leaked")
        if self.text == "bad":
            raise SystemExit(3)


class Stage:
    """Executions of the handler ``note``, which looks at its payload to know which job it is."""

    def __init__(self, function: Any, *, limit: int = 1, timeout: float | None = 300.0, grace: float = 0.1) -> None:
        handlers: Handlers[Any] = Handlers()
        handlers.handler(timeout=timeout)(function)
        self.made = 0
        self.ended: list[Execution] = []
        self.stuck: list[Execution] = []
        self.executor = Executor(handlers, Shared("w", None))
        self.executions = JobTasks(limit, self.executor, self, stuck=self.stuck.append, grace=grace)

    def finish(self, run: Execution) -> None:
        self.ended.append(run)

    def put(self, text: str = "", **document: Any) -> Execution:
        self.made += 1
        body = json.dumps({"id": f"i{self.made}", "kind": "note", "payload": {"text": text}, **document}).encode()
        run = Execution(Claim("q", "normal", "stream:{q}", b"%d-0" % self.made, 1, body, b"e"))
        contextvars.copy_context().run(self.executor.prepare, run)
        self.executions.put(run)
        return run

    async def all_ended(self) -> list[Outcome | None]:
        await eventually(lambda: len(self.ended) == self.made, 10, 0.001)
        return [run.outcome for run in sorted(self.ended, key=lambda run: int(run.claim.entry.split(b"-")[0]))]


@asynccontextmanager
async def stage(function: Any, **options: Any) -> AsyncIterator[Stage]:
    made = Stage(function, **options)
    made.executions.open()
    try:
        yield made
    finally:
        await made.executions.close(2)


async def spin(times: int = 10) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


# -- how many, and when


@pytest.mark.parametrize("jobs", [1, 2, 3, 50, 250])
async def test_jobs_that_await_all_begin_at_once_each_in_a_task_of_its_own(jobs):
    tasks: set[Any] = set()
    let_go = asyncio.Event()

    async def note(payload: Note) -> None:
        tasks.add(asyncio.current_task())
        await let_go.wait()

    async with stage(note, limit=250) as on:
        for _ in range(jobs):
            on.put()
        await spin()
        assert len(tasks) == jobs == len(on.executions.running)
        let_go.set()
        assert await on.all_ended() == [Ok()] * jobs
        assert not on.executions.running


async def test_no_more_run_than_allowed_and_the_next_starts_when_one_ends():
    at_work: list[asyncio.Event] = []

    async def note(payload: Note) -> None:
        at_work.append(asyncio.Event())
        await at_work[-1].wait()

    async with stage(note, limit=3) as on:
        for _ in range(5):
            on.put()
        await spin()
        assert len(at_work) == 3
        at_work[1].set()
        await spin()
        assert len(at_work) == 4 and len(on.ended) == 1
        for event in at_work:
            event.set()
        await spin()
        at_work[4].set()
        assert await on.all_ended() == [Ok()] * 5


async def test_jobs_that_await_nothing_run_in_order_and_leave_others_their_turn():
    ran: list[int] = []
    turns: list[int] = []

    async def note(payload: Note) -> None:
        ran.append(int(payload.text))

    async def neighbour() -> None:
        while len(ran) < 1000:
            turns.append(len(ran))
            await asyncio.sleep(0)

    async with stage(note, limit=5000) as on:
        beside = asyncio.create_task(neighbour())
        for n in range(1000):
            on.put(str(n))
        assert await on.all_ended() == [Ok()] * 1000
        await beside
    assert ran == list(range(1000))
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) <= STARTS


async def test_long_first_steps_leave_others_their_turn():
    ran: list[int] = []
    turns: list[int] = []

    async def note(payload: Note) -> None:
        ran.append(1)
        time.sleep(0.005)

    async def neighbour() -> None:
        while len(ran) < 20:
            turns.append(len(ran))
            await asyncio.sleep(0)

    async with stage(note, limit=100) as on:
        beside = asyncio.create_task(neighbour())
        for _ in range(20):
            on.put()
        await on.all_ended()
        await beside
    if sys.version_info >= (3, 12):  # before, tasks that are started together take their first steps in one turn
        assert max(later - earlier for earlier, later in itertools.pairwise(turns)) <= 2


async def test_what_is_abandoned_while_it_waits_never_runs():
    ran: list[str] = []
    let_go = asyncio.Event()

    async def note(payload: Note) -> None:
        ran.append(payload.text)
        await let_go.wait()

    async with stage(note) as on:
        on.put("first")
        waiting = [on.put("waits"), on.put("waits")]
        await spin()
        assert on.executions.abandon_waiting() == waiting
        let_go.set()
        on.put("last")
        await eventually(lambda: ran == ["first", "last"])


async def test_a_run_that_is_cancelled_before_its_first_step_has_an_end():
    """Where tasks do not begin at once there is a moment between."""
    ended: list[str] = []

    async def note(payload: Note) -> None:
        try:
            await asyncio.sleep(10)
        finally:
            ended.append(payload.text)

    async with stage(note) as on:
        run = on.put("x")
        while run.started is None:
            await asyncio.sleep(0)
            run.cancel(Interrupted("shutdown"))
        assert await on.all_ended() == [Interrupted("shutdown")]
    assert ended == ["x"]


async def test_what_decoding_a_payload_raises_or_sets_is_its_own_affair():
    seen: list[str] = []

    async def note(payload: Odd) -> None:
        seen.append(variable.get())

    async with stage(note) as on:
        bad = on.put("bad", kind="odd")
        await spin()
        on.put("good", kind="odd")
        await on.all_ended()
    assert "SystemExit" in getattr(bad.outcome, "error", "")
    assert seen == ["unset"]


# -- what a job leaves behind


async def pages(seconds: float) -> AsyncIterator[int]:
    with anyio.fail_after(seconds):
        yield 1
        yield 2


async def leave_a_generator(payload: Note) -> None:
    async for _ in pages(0.05):
        break


kept: list[Any] = []


async def leave_a_kept_generator(payload: Note) -> None:
    kept.append(pages(0.05))
    await anext(kept[-1])


async def leave_a_watchdog(payload: Note) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.05, task.cancel)


async def leave_a_timeout(payload: Note) -> None:
    timeout = asyncio.timeout(0.05)
    await timeout.__aenter__()


async def leave_a_task(payload: Note) -> None:
    parent = asyncio.current_task()
    assert parent is not None

    async def watchdog() -> None:
        await asyncio.sleep(0.05)
        parent.cancel()

    kept.append(asyncio.create_task(watchdog()))


@pytest.mark.parametrize(
    "leave", [leave_a_generator, leave_a_kept_generator, leave_a_watchdog, leave_a_timeout, leave_a_task]
)
async def test_what_a_job_leaves_behind_cancels_no_other(leave):
    async def note(payload: Note) -> str:
        if payload.text == "first":
            await leave(payload)
            return "left"
        await asyncio.sleep(0.2)
        return "done"

    async with stage(note) as on:
        on.put("first")
        on.put("innocent")
        assert await on.all_ended() == [Ok("left"), Ok("done")]
    kept.clear()


@pytest.mark.parametrize("awaits", [False, True])
async def test_what_is_kept_by_task_ends_with_the_job(awaits):
    """As SQLAlchemy's async_scoped_session keeps its sessions."""
    sessions: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()
    committed: list[str] = []

    async def note(payload: Note) -> None:
        session = sessions.setdefault(asyncio.current_task(), [])
        if awaits:
            await asyncio.sleep(0)
        assert sessions[asyncio.current_task()] is session
        session.append(payload.text)
        if payload.text == "bad":
            raise ValueError("never commit this")
        committed.extend(session)

    async with stage(note) as on:
        on.put("bad")
        on.put("good")
        outcomes = await on.all_ended()
    assert isinstance(outcomes[0], Raised) and outcomes[1] == Ok()
    assert committed == ["good"]


@pytest.mark.parametrize("awaits", [False, True])
async def test_done_callbacks_come_when_the_job_ends(awaits):
    calls: list[str] = []

    async def note(payload: Note) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: calls.append(payload.text))
        if awaits:
            await asyncio.sleep(0)

    async with stage(note) as on:
        on.put("a")
        on.put("b")
        await on.all_ended()
        await spin(3)
        assert calls == ["a", "b"]


# -- async generators


async def open_pages(closed: list[Any]) -> AsyncIterator[int]:
    with anyio.CancelScope():  # which can only be left in the task it was entered in
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            closed.append(asyncio.current_task())


@pytest.mark.parametrize("how", ["dropped at the end", "kept", "kept by a cycle", "raised past", "two, nested"])
async def test_generators_are_closed_in_the_task_of_their_job_before_it_ends(how):
    closed: list[Any] = []
    mine: list[Any] = []

    async def note(payload: Note) -> None:
        mine.append(asyncio.current_task())
        generator = open_pages(closed)
        await anext(generator)
        if how == "kept":
            kept.append(generator)
        elif how == "kept by a cycle":
            cycle: list[Any] = [generator]
            cycle.append(cycle)
        elif how == "raised past":
            raise ValueError
        elif how == "two, nested":
            inner = open_pages(closed)
            await anext(inner)

    async with stage(note) as on:
        run = on.put()
        await on.all_ended()
        assert run.outcome == Ok() or how == "raised past"
        assert closed == mine * (2 if how == "two, nested" else 1)
    kept.clear()


async def test_a_generator_that_is_dropped_while_the_job_goes_on_is_closed_then():
    closed: list[Any] = []

    async def note(payload: Note) -> int:
        async def connections() -> AsyncIterator[int]:
            try:
                yield 1
                yield 2
            finally:
                closed.append(1)

        for _ in range(3):
            async for _ in connections():
                break
            await asyncio.sleep(0.01)
        return len(closed)

    async with stage(note) as on:
        on.put()
        assert await on.all_ended() == [Ok(3)]


async def test_exhausted_generators_leave_nothing_however_many():
    async def few() -> AsyncIterator[int]:
        yield 1

    sizes: list[int] = []

    async def note(payload: Note) -> None:
        for _ in range(1000):
            async for _ in few():
                pass
        begun = on.executor.generators.begun
        sizes.extend(len(each.alive) for each in begun.values())

    async with stage(note) as on:
        on.put()
        await on.all_ended()
        assert sizes == [0] and not on.executor.generators.begun


async def test_a_generator_that_fails_to_close_or_hangs_spoils_nothing():
    async def bad(hangs: bool) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            if hangs:
                await asyncio.sleep(100)
            raise ValueError("closing failed")

    async def note(payload: Note) -> str:
        kept.append(bad(payload.text == "hangs"))
        await anext(kept[-1])
        return "done"

    async with stage(note, timeout=0.2) as on:
        on.put("fails")
        on.put("hangs")
        assert await on.all_ended() == [Ok("done")] * 2  # what the handler did is done
    kept.clear()


async def test_hooks_of_others_are_called_and_come_back():
    before = sys.get_asyncgen_hooks()
    seen: list[Any] = []
    first = before.firstiter

    def theirs(generator: Any) -> None:
        if generator.__name__ == "pages":
            seen.append(generator.__name__)
        if first is not None:
            first(generator)

    sys.set_asyncgen_hooks(firstiter=theirs)
    try:

        async def note(payload: Note) -> None:
            await leave_a_generator(payload)

        async with stage(note) as on, stage(note) as two:
            on.put()
            two.put()
            await on.all_ended()
            await two.all_ended()
        assert seen == ["pages", "pages"]
        assert sys.get_asyncgen_hooks().firstiter is theirs
    finally:
        sys.set_asyncgen_hooks(*before)


# -- cancelled by others, or by itself


def task_of(run: Execution) -> asyncio.Task[Any]:
    assert run.task is not None
    return run.task


async def forever(payload: Note) -> None:
    await asyncio.sleep(100)


@pytest.mark.parametrize(("hop", "wait"), [(0, 1.0), (1, 2.0), (3, 8.0), (100, 64.0)])
async def test_a_cancellation_from_elsewhere_is_uncharged_and_waits_longer_each_time(hop, wait):
    async with stage(forever) as on:
        run = on.put(hop=hop)
        await eventually(lambda: run.task is not None)
        task_of(run).cancel()
        await on.all_ended()
        assert isinstance(run.outcome, Interrupted) and run.outcome.wait == wait
        assert "test_executions.py" in run.outcome.reason and "uncharged_and_waits" in run.outcome.reason
        assert run.facts is not None
        assert getattr(judge(run.outcome, run.facts, now=100.0, jitter=0.5), "at", None) == 100.0 + wait


async def test_a_job_that_cancels_another_is_named(capsys):
    async def note(payload: Note) -> None:
        if payload.text == "culprit":
            task_of(victim).cancel()
            return
        await asyncio.sleep(100)

    async with stage(note, limit=2) as on:
        victim = on.put("victim")
        await eventually(lambda: victim.task is not None)
        on.put("culprit")
        outcomes = await on.all_ended()
    assert isinstance(outcomes[0], Interrupted) and outcomes[1] == Ok()
    assert "test_a_job_that_cancels_another_is_named.<locals>.note" in outcomes[0].reason


async def test_what_a_handler_makes_of_a_cancellation_from_elsewhere():
    async def note(payload: Note) -> str:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            if payload.text == "raises":
                raise ValueError("while cleaning up") from None
            if payload.text == "chains":
                raise ValueError("while cleaning up")  # noqa: B904
        return "finished all the same"

    for text in ("raises", "chains", "finishes"):
        async with stage(note) as on:
            run = on.put(text)
            await eventually(lambda run=run: run.task is not None)
            task_of(run).cancel()
            (outcome,) = await on.all_ended()
            assert outcome == Ok("finished all the same") if text == "finishes" else isinstance(outcome, Interrupted)


async def itself(payload: Note) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(100)


async def its_timer(payload: Note) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.01, task.cancel)
    await asyncio.sleep(100)


async def its_child(payload: Note) -> None:
    task = asyncio.current_task()

    async def child() -> None:
        assert task is not None
        task.cancel()

    await asyncio.create_task(child())
    await asyncio.sleep(100)


async def its_thread(payload: Note) -> None:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    await asyncio.to_thread(loop.call_soon_threadsafe, task.cancel)
    await asyncio.sleep(100)


async def its_future(payload: Note) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


@pytest.mark.parametrize("how", [itself, its_timer, its_child, its_thread, its_future])
async def test_a_handler_that_cancels_itself_has_failed(how):
    async def note(payload: Note) -> None:
        await how(payload)

    async with stage(note) as on:
        on.put()
        (outcome,) = await on.all_ended()
        assert isinstance(outcome, Raised) and isinstance(outcome.error, asyncio.CancelledError)


async def test_timeouts_and_task_groups_of_the_handler_work():
    async def note(payload: Note) -> list[str]:
        ended = []
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(100)
        ended.append("asyncio.timeout")
        with anyio.move_on_after(0.01):
            await anyio.sleep(100)
        ended.append("anyio scope")
        with suppress(BaseExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(its_future(payload))
                group.create_task(failing())
        ended.append("asyncio.TaskGroup")
        with suppress(BaseExceptionGroup):
            async with anyio.create_task_group() as group:
                group.start_soon(failing)
                await anyio.sleep(100)
        ended.append("anyio task group")
        return ended

    async def failing() -> None:
        raise ValueError

    async with stage(note) as on:
        on.put()
        (outcome,) = await on.all_ended()
    assert isinstance(outcome, Ok) and len(outcome.value) == 4


async def test_our_own_reason_stands_before_that_of_others():
    async with stage(forever, timeout=0.05) as on:
        run = on.put()
        await eventually(lambda: run.task is not None)
        task_of(run).cancel()
        run.cancel(TimedOut(0.05))
        assert await on.all_ended() == [TimedOut(0.05)]


# -- what cannot be stopped


@pytest.mark.parametrize("lost", [False, True], ids=["past its deadline", "claim lost"])
async def test_a_handler_that_swallows_its_cancellation_is_stuck_after_the_grace_and_named(lost):
    let_go = asyncio.Event()

    async def silent(payload: Note) -> None:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()

    async with stage(silent, limit=2, timeout=None if lost else 0.05, grace=0.3) as on:
        run = on.put()
        await eventually(lambda: run.task is not None)
        began = time.monotonic()
        if lost:
            run.cancel(Interrupted("the claim was lost"))
        await eventually(lambda: on.stuck == [run])
        took, where = time.monotonic() - began, stacks.of_run(run)
        let_go.set()  # first: it would not let the test fail either
        await on.all_ended()
        assert "test_executions.py:" in where and where.endswith(".silent")
        assert took >= 0.3


@pytest.mark.parametrize("fails", [False, True], ids=["times out", "raises beside it"])
async def test_a_job_with_a_call_in_a_thread_ends_when_that_returns(fails):
    JobThreads.install(asyncio.get_running_loop())
    let_go, began = threading.Event(), threading.Event()

    def blocks() -> None:
        began.set()
        let_go.wait(20)

    async def note(payload: Note) -> None:
        call = asyncio.create_task(asyncio.to_thread(blocks))
        await eventually(began.is_set)
        if fails:
            raise ValueError("beside it")
        await call

    async with stage(note, timeout=20 if fails else 0.05, grace=20) as on:
        run = on.put()
        await eventually(lambda: run.in_thread)
        assert run.outcome is None
        assert stacks.of_run(run).endswith("blocks")
        let_go.set()
        await on.all_ended()
        assert isinstance(run.outcome, Raised if fails else TimedOut)
    assert not JobThreads.calls


async def test_a_call_in_a_thread_that_does_not_return_is_stuck_after_the_grace_and_named():
    JobThreads.install(asyncio.get_running_loop())
    let_go = threading.Event()

    async def note(payload: Note) -> None:
        await asyncio.to_thread(let_go.wait, 20)

    async with stage(note, limit=2, timeout=0.05, grace=0.3) as on:
        run = on.put()
        await eventually(lambda: on.stuck == [run])
        let_go.set()
        await on.all_ended()
        assert isinstance(run.outcome, TimedOut)


async def test_a_job_that_is_done_waits_for_no_thread():
    JobThreads.install(asyncio.get_running_loop())
    let_go = threading.Event()

    async def note(payload: Note) -> None:
        asyncio.get_running_loop().run_in_executor(None, let_go.wait, 20)

    async with stage(note) as on:
        run = on.put()
        await on.all_ended()
        assert isinstance(run.outcome, Ok)
        let_go.set()
    await eventually(lambda: not JobThreads.calls)


async def test_a_handler_that_takes_its_time_to_clean_up_is_not_stuck():
    async def note(payload: Note) -> None:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.3)

    async with stage(note, timeout=0.05, grace=5) as on:
        on.put()
        assert await on.all_ended() == [TimedOut(pytest.approx(0.05))]
        assert on.stuck == []


async def test_a_thread_is_named_by_its_own_line():
    go_on = threading.Event()

    def note(payload: Note) -> None:
        go_on.wait()

    async with stage(note, timeout=0.05, grace=0.1) as on:
        run = on.put()
        await eventually(lambda: on.stuck == [run])
        assert "in test_a_thread_is_named_by_its_own_line.<locals>.note" in stacks.of_run(run)
        go_on.set()
        await on.all_ended()


async def test_where_a_task_stands():
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        await inner()

    async def inner() -> None:
        await asyncio.sleep(10)

    async def outer() -> None:
        async with lifespan():
            pass

    task = asyncio.create_task(outer())
    await spin(3)
    assert "in test_where_a_task_stands.<locals>.inner" in stacks.of_task(task)
    task.cancel()
    await asyncio.wait([task])
    assert stacks.of_task(task) == "unknown"


# -- whatever loop and whatever task factory the process uses


def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
    class Theirs(asyncio.Task[Any]):
        pass

    return Theirs(coro, loop=loop, **options)


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(
    "factories",
    [lambda: None, lambda: factory, lambda: asyncio.eager_task_factory],  # type: ignore[attr-defined]
    ids=["none", "own", "eager"],
)
def test_with_every_loop_and_task_factory(factories: Callable[[], Any], uvloop: bool):
    if factories.__code__.co_names[-1:] == ("eager_task_factory",) and sys.version_info < (3, 12):
        pytest.skip("needs Python 3.12, which brought eager tasks: ./dev pythons")
    seen: list[tuple[Any, Any]] = []
    unusable: list[bool] = []

    async def note(payload: Note, ctx: Context) -> str:
        before = asyncio.current_task()
        if payload.text == "awaits":
            await asyncio.sleep(0)
            async with asyncio.timeout(5):
                await anyio.to_thread.run_sync(threading.get_ident)
        seen.append((before, asyncio.current_task()))
        return payload.text

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factories())
        probe = asyncio.sleep(0)
        try:
            await asyncio.create_task(probe)
        except TypeError:  # uvloop 0.22 and later on 3.13.0: `asyncio.create_task` itself fails, here and everywhere
            asyncio.get_running_loop().set_task_factory(None)
            probe.close()
            unusable.append(True)
            return
        async with stage(note, limit=10) as on:
            texts = ["", "awaits"] * 10
            for text in texts:
                on.put(text)
            assert await on.all_ended() == [Ok(text) for text in texts]

    anyio.run(main, backend_options={"use_uvloop": uvloop})
    if unusable:
        pytest.skip("needs a Python on which uvloop and eager task factories work together: ./dev pythons")
    assert all(before is after for before, after in seen)
    assert len({id(before) for before, _ in seen}) == len(seen) == 20
    gc.collect()
