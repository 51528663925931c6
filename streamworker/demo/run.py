"""The course of the demo: start everything, enqueue, kill, wait, count, clean up."""

from __future__ import annotations

import shutil
import signal
import tempfile
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from time import monotonic
from typing import Final

import anyio
import anyio.to_thread
import msgspec
from redis import exceptions as redis_errors

from streamworker import App, Settings, embedded
from streamworker.broker import PendingEntry
from streamworker.demo import script
from streamworker.demo.audit import Evidence, Killed, audit, leftovers, number_in
from streamworker.demo.mailer import SMTP_PORT, SendWelcome
from streamworker.demo.script import Scenario
from streamworker.demo.smtp import Mailbox
from streamworker.demo.stage import INTERVAL, STALL, Durations, Member, Stage, View, launch, stop
from streamworker.embedded import Servers
from streamworker.errors import Unreachable
from streamworker.operators import open_operator
from streamworker.views.listing import PENDING, Selection
from streamworker.worker import signals

_BATCH: Final = 1000
_SERVERS_STOP_WITHIN: Final = 20.0


async def show(play: Scenario, *, as_json: bool) -> int:
    """Play the demo and clean up, whatever happens.

    Args:
        play: what is played.
        as_json: see `View`.

    Returns:
        The exit code: 0 everything is accounted for, 1 it is not, 130 or 143 after a signal.

    Raises:
        StreamworkerError: a process or a server did not start, or broke.
    """
    view = View(as_json=as_json)
    code, failure = 1, None
    stopped: list[int] = []
    async with anyio.create_task_group() as group:

        def stop(number: int) -> None:
            stopped.append(number)
            group.cancel_scope.cancel()

        await group.start(signals.watch, stop)
        try:
            code = await _play(play, view)
        except Exception as error:  # noqa: BLE001 - raised below, outside of the group that would wrap it
            failure = error
        group.cancel_scope.cancel()
    if stopped:
        view.say("Stopped. Processes, servers and data of the demo are gone.")
        return 128 + stopped[0]
    if failure is not None:
        raise _first(failure)
    return code


async def _play(play: Scenario, view: View) -> int:
    began = monotonic()
    async with AsyncExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="streamworker-demo-"))
        stack.push_async_callback(_clear, home)
        view.say(
            f"streamworker demo: {play.jobs:,} jobs, each sends one mail; {play.workers} worker processes.", "bold"
        )
        view.say(
            f"One job in {script.FLAKY[0]} fails twice before it succeeds, one in {script.HOPELESS[0]:,} never does."
        )
        if play.kill:
            view.say("Midway one worker is killed with SIGKILL.")
        servers = await _servers(stack, home)
        view.say(f"Private Valkey and PostgreSQL are up ({monotonic() - began:.1f} s); yours are not touched.")
        mailbox = await stack.enter_async_context(Mailbox(home / "smtp.log"))
        env = {
            "STREAMWORKER_REDIS_URL": servers.redis_url,
            "STREAMWORKER_LEASE": str(script.LEASE),
            "STREAMWORKER_CONCURRENCY": str(script.CONCURRENCY),
            "STREAMWORKER_LOG_LEVEL": "warning",
            SMTP_PORT: str(mailbox.port),
        }
        members = await launch(stack, play.workers, home, env)
        operator = await stack.enter_async_context(open_operator(Settings(redis_url=servers.redis_url)))
        stage = Stage(play, mailbox, members, operator)
        async with anyio.create_task_group() as group:
            group.start_soon(stage.look)
            await stage.all_working()
            view.say(f"An SMTP server and {play.workers} workers are up ({monotonic() - began:.1f} s).")
            group.start_soon(view.follow, stage)
            killed, working = await _work(stage, servers.redis_url, view)
            await stop(members)
            group.cancel_scope.cancel()
        evidence = Evidence(
            arrived=await mailbox.recipients(),
            leftovers=await leftovers(servers.redis_url),
            killed=killed,
            exits={member.name: member.exit_code for member in members if not member.killed},
        )
        report = audit(play, evidence)
        view.report(play, report, killed, Durations(monotonic() - began, working))
        return 0 if report.ok else 1


async def _work(stage: Stage, url: str, view: View) -> tuple[Killed | None, float]:
    """Enqueue everything, kill if the script says so, wait for the end; returns who died and the seconds it took."""
    play, start = stage.play, monotonic()
    async with App(settings=Settings(redis_url=url)) as producer:
        for first in range(0, play.jobs, _BATCH):
            numbers = range(first, min(first + _BATCH, play.jobs))
            await producer.enqueue_many(SendWelcome(number=n, to=script.address(n)) for n in numbers)
    view.say(f"{play.jobs:,} jobs enqueued in {monotonic() - start:.1f} s.")
    killed = await _kill_one(stage, view) if play.kill else None
    if not await stage.until(lambda seen: not seen.unfinished, fresh=True):
        view.say(f"Nothing moved for {STALL:g} s, or no worker is left: counting what is there.", "bold red")
    return killed, monotonic() - start


async def _kill_one(stage: Stage, view: View) -> Killed | None:
    """Kill the worker that holds most, and wait until others run its jobs; ``None`` if none ever held any."""
    await stage.until(lambda seen: seen.mails >= stage.play.jobs * script.KILL_AT, fresh=True)
    found = await _catch(stage)
    if found is None:
        return None
    victim, worker_id = found
    began = monotonic()
    await victim.kill()
    numbers: dict[tuple[str, str], int | None] = {}
    killed = Killed(victim.name, worker_id, victim.pid, frozenset(), None)
    while held := await _held(stage, worker_id):
        for entry in held:
            # What it had asked for in its last instant may still arrive after its death.
            if (key := (entry.level, entry.entry_id)) not in numbers:
                numbers[key] = number_in({"job": await stage.operator.body(entry) or b""})
        known = frozenset(number for number in numbers.values() if number is not None)
        if known != killed.held:
            killed = stage.seen.killed = msgspec.structs.replace(killed, held=known)
            view.say(f"kill -9 {victim.pid}: {victim.name} is dead and held {len(known)} jobs.", "bold red")
        if monotonic() - began > script.LEASE + STALL:
            return killed
        await anyio.sleep(INTERVAL)
    killed = stage.seen.killed = msgspec.structs.replace(killed, recovery=monotonic() - began)
    view.say(f"Its {len(killed.held)} jobs run elsewhere, {killed.recovery:.1f} s after the kill.", "bold green")
    return killed


async def _catch(stage: Stage) -> tuple[Member, str] | None:
    """Freeze the worker that holds most, so that what it holds does not change before it is killed."""
    while stage.seen.unfinished:
        held = {info.worker_id: info.pending for info in await stage.operator.workers([script.QUEUE], everywhere=False)}
        names = {pid: row.worker_id for pid, row in stage.seen.workers.items()}
        alive = [member for member in stage.members if member.alive and member.pid in names]
        if not alive:
            return None
        victim = max(alive, key=lambda member: held.get(names[member.pid], 0))
        victim.signal(signal.SIGSTOP)
        if await _held(stage, names[victim.pid]):
            return victim, names[victim.pid]
        victim.signal(signal.SIGCONT)
        await stage.until(lambda _: True, fresh=True)
    return None


async def _held(stage: Stage, worker_id: str) -> list[PendingEntry]:
    """Everything that is pending under a worker's name."""
    selection = Selection(queue=script.QUEUE, worker=worker_id)
    return [entry async for entry in PENDING.chosen(stage.operator, selection)]


async def _servers(stack: AsyncExitStack, home: Path) -> Servers:
    # Entered inside the thread: a Ctrl-C meanwhile drops the thread's result, but not what the stack holds.
    kept = stack.enter_context(ExitStack())
    return await anyio.to_thread.run_sync(lambda: kept.enter_context(embedded.acquire(home)))


async def _clear(home: Path) -> None:
    """Remove the demo's directory, as soon as the servers in it have stopped."""
    with anyio.CancelScope(shield=True):
        with anyio.move_on_after(_SERVERS_STOP_WITHIN):
            while embedded.describe(home).state not in {"stopped", "failed"}:  # noqa: ASYNC110 - there is no event for it
                await anyio.sleep(INTERVAL)
        await anyio.to_thread.run_sync(lambda: shutil.rmtree(home, ignore_errors=True))


def _first(error: BaseException) -> BaseException:
    """The error inside of groups; a broken connection of the demo itself in one sentence."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, redis_errors.ConnectionError | redis_errors.TimeoutError):
        return Unreachable(f"the demo's own Redis server went away ({error}): run the demo again")
    return error
