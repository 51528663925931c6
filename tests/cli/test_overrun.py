"""Whatever users' code holds: a worker ends when it has to, hands its jobs back first, and names the line that held it."""

from __future__ import annotations

import signal

import pytest

from tests.cli.conftest import document
from tests.conftest import eventually_blocking

JOBS = """
import asyncio, os, threading, time
from contextlib import asynccontextmanager, suppress
import anyio, anyio.to_thread
from streamworker import App, Payload

class Odd(Payload, kind="odd", queue="odd"):
    how: str

class Swallow(Payload, kind="swallow", queue="odd"):
    pass

class Thread(Payload, kind="thread", queue="odd"):
    pass

async def swallow_all():
    while True:
        with suppress(BaseException):
            await asyncio.sleep(60)

@asynccontextmanager
async def lifespan():
    how = os.environ.get("HOW", "")
    if how == "enter":
        print("entering", flush=True)
        await asyncio.sleep(60)
    if how == "swallow on entering":
        await swallow_all()
    yield
    if how == "leave":
        await asyncio.sleep(60)
    if how == "block on leaving":
        time.sleep(60)

app = App(lifespan=lifespan)

def toil():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.05)  # where threads stand

@app.handler(timeout=60)
async def odd(payload: Odd) -> None:
    match payload.how:
        case "to_thread":
            await asyncio.to_thread(toil)
        case "executor":
            await asyncio.get_running_loop().run_in_executor(None, toil)
        case "anyio":
            await anyio.to_thread.run_sync(toil)
        case "block":
            time.sleep(60)
        case "spin":
            while True:
                pass
        case "leave a task":
            asyncio.create_task(swallow_all())
            await asyncio.sleep(0)

@app.handler(timeout=0.3, max_attempts=1)
async def swallow(payload: Swallow) -> None:
    await swallow_all()

@app.handler(timeout=60)
def thread(payload: Thread) -> None:
    toil()
"""


@pytest.fixture
def odd(sw, project):
    """``odd(document, ...)``: a worker that runs this job, and ends soon when it is told twice."""
    (project / "jobs.py").write_text(JOBS)
    sw.constants["streamworker.worker.HURRIED"] = 0.8

    def run(job: str | None, *flags, **env):
        worker = sw.worker("--queues", "odd", "--grace", "0.3", *flags, **env)
        if job is not None:
            sw.ground.push(job, queue="odd")
        return worker

    return run


@pytest.fixture(autouse=True)
def with_ground(sw, ground):
    sw.ground = ground


def begun(ground) -> bool:
    return ground.held("odd") == 1


def test_a_handler_that_swallows_its_cancellation_costs_the_process_and_is_named(odd, ground, raw):
    worker = odd(document("swallow"))
    assert worker.wait(15) == 70
    (line,) = [line for line in worker.lines if "handler_stuck" in line]
    assert "jobs.swallow" in line and "jobs.py:" in line and "in swallow_all" in line
    assert "would not end when it was told to" in worker.text
    assert raw.xlen("stream:{odd}:dead") == 1 and ground.held("odd") == 0  # charged: or it took worker after worker


@pytest.mark.parametrize("job", ["to_thread", "executor", "anyio", "thread"])
def test_threads_do_not_outlive_the_hand_back_of_their_job(odd, ground, job):
    worker = odd(document("thread") if job == "thread" else document("odd", how=job))
    eventually_blocking(lambda: begun(ground))
    assert worker.stop() == 0
    assert "threads_cut_short" in worker.text and "in toil" in worker.text
    assert ground.held("odd") == 0 and ground.ready(queue="odd") == 1


@pytest.mark.parametrize(("how", "loop"), [("block", "asyncio"), ("spin", "uvloop")])
def test_a_blocked_event_loop_hears_a_second_signal(odd, ground, how, loop):
    worker = odd(document("odd", how=how), STREAMWORKER_LOOP=loop)
    eventually_blocking(lambda: worker.saw("event_loop_blocked"))
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGINT)  # of two alike, so soon after each other, the system may deliver one
    eventually_blocking(lambda: worker.process.poll() is not None, 15)
    assert worker.wait() == 70
    (line,) = [line for line in worker.lines if "process_overran" in line]
    assert "in odd" in line and "jobs.py:" in line


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_a_lifespan_that_hangs_on_entering_is_left(odd, sw, project, again):
    (project / "jobs.py").write_text(JOBS)
    worker = sw.start("worker", "jobs:app", "--grace", "0.3", HOW="swallow on entering" if again else "enter")
    eventually_blocking(lambda: worker.saw("worker_starting"))
    eventually_blocking(sw.ground.raw.client_list)
    worker.signal(signal.SIGTERM)
    if again:
        eventually_blocking(lambda: worker.saw("worker_stopping"))
        worker.signal(signal.SIGTERM)
        assert worker.wait(15) == 70
        assert "worker_overran" in worker.text and "in swallow_all" in worker.text
    else:
        assert worker.wait(10) == 0


@pytest.mark.parametrize("how", ["leave", "block on leaving"])
def test_a_lifespan_that_hangs_on_leaving_is_named(odd, how):
    worker = odd(None, HOW=how)
    worker.signal(signal.SIGTERM)
    eventually_blocking(lambda: worker.saw("worker_stopping"))
    worker.signal(signal.SIGTERM)
    assert worker.wait(15) == 70
    assert "in lifespan" in worker.text and ("worker_overran" in worker.text or "process_overran" in worker.text)


@pytest.mark.slow
def test_a_task_that_a_handler_left_does_not_keep_the_process(odd, ground):
    worker = odd(document("odd", how="leave a task"))
    eventually_blocking(lambda: ground.empty("odd"))
    worker.signal(signal.SIGTERM)
    assert worker.wait(25) == 70
    assert "process_overran" in worker.text
