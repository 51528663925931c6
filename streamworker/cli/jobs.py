"""``streamworker jobs``: the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from cyclopts import App, Parameter

from streamworker.broker import Operator
from streamworker.cli import streams
from streamworker.cli.options import (
    ACTION,
    LISTING,
    WORKER,
    ActionFlags,
    Listing,
    NamedIds,
    QueueName,
    Seconds,
    WorkerFlags,
    encryption,
    opener,
    run,
)
from streamworker.cli.output import Column, document, plain, print_json, print_lines, show
from streamworker.cli.resource import BulkAction, act, agreed, require_choice
from streamworker.cli.streams import say
from streamworker.errors import StreamworkerError, UsageError
from streamworker.job import Progress
from streamworker.postgres import Archive, JobRecord, Status, StepRow, Wanted
from streamworker.redact import clean_block, printable
from streamworker.results import OutputItem
from streamworker.settings import EMBEDDED, Settings
from streamworker.views.job_log import log_text
from streamworker.views.rows import JobRow, age, attempt_row, job_row, step_row

jobs = App(name="jobs", help="Jobs in the ledger: every one that is durable, or has run.")
jobs.command("streamworker.cli.jobs:cancel", name="cancel")
jobs.command("streamworker.cli.jobs:reconcile", name="reconcile")
jobs.command("streamworker.cli.erase:erase", name="erase")

OPEN: Final[tuple[Status, ...]] = ("queued", "dispatching", "dispatched", "retrying", "waiting")
"""Of these a job can still be kept from running."""

_COLUMNS: Final[list[Column[JobRow]]] = [
    Column("job", lambda row: row.job_id, short=36),
    Column("queue", lambda row: row.queue, short=12),
    Column("kind", lambda row: row.kind or "?", short=14),
    Column("status", lambda row: row.status),
    Column("attempts", lambda row: str(row.attempts), right=True, wide=True),
    Column("ago", lambda row: age(row.age_s), right=True),
    Column("took", lambda row: "" if row.took_s is None else f"{row.took_s:.3f} s", right=True, wide=True),
    Column("worker", lambda row: row.worker_id or "", wide=True),
    Column("error", lambda row: row.error or "", rest=True),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JobConditions:
    """Which jobs.

    Attributes:
        kind: Of this kind.
        status: With this status; give it again for another one.
        since: Made in the last so many seconds.
    """

    kind: str | None = None
    status: tuple[Status, ...] = ()
    since: Seconds | None = None

    def wanted(self, queue: str | None, ids: tuple[str, ...] = (), default: tuple[Status, ...] = ()) -> Wanted:
        """What is asked for; ``default`` are the statuses unless some, or ids, are given."""
        since = None if self.since is None else datetime.now(UTC) - timedelta(seconds=self.since)
        statuses = self.status or (() if ids else default)
        return Wanted(queue=queue, kind=self.kind, statuses=statuses, since=since, ids=frozenset(ids))

    def chosen(
        self, queue: str | None, ids: tuple[str, ...], default: tuple[Status, ...], *, everything: bool, verb: str
    ) -> Wanted:
        """What is to be changed, as `wanted`.

        Raises:
            UsageError: neither ids nor a condition say which jobs, nor does ``everything``.
        """
        require_choice(bool(ids or self.kind or self.since), everything=everything, verb=verb)
        return self.wanted(queue, ids, default)


CONDITIONS = JobConditions()


@jobs.default
@jobs.command(name="list")
def list_(
    queue: QueueName = None,
    *,
    named: NamedIds = (),
    conditions: JobConditions = CONDITIONS,
    payload: bool = False,
    listing: Listing = LISTING,
    flags: WorkerFlags = WORKER,
) -> int:
    """List jobs, newest first.

    Args:
        queue: Only of this queue.
        payload: Print the documents too.
    """

    async def work(archive: Archive) -> int:
        async def rows() -> AsyncIterator[tuple[JobRow, bytes | None]]:
            now = await archive.now()
            async for job in archive.jobs(conditions.wanted(queue, named), payload=payload):
                yield job_row(job, now), _body(job)

        return await show(listing, rows, _COLUMNS, title="jobs", payload=payload)

    return _ask(flags, work, endless=listing.watch, private=payload)


@jobs.command(name="show")
def show_(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    payload: bool = False,
    json: bool = False,
    flags: WorkerFlags = WORKER,
) -> int:
    """Show everything about some jobs, with each of their attempts and steps.

    Args:
        ids: Job ids.
        queue: Of this queue; needed where several queues have a job with that id.
        payload: Print payload, headers and result too.
        json: One JSON object per line, for programs.
    """
    wanted = (*ids, *named)
    if not wanted:
        raise UsageError("say which: streamworker jobs show ID")
    settings = flags.settings()

    async def work(archive: Archive) -> int:
        missing, now = 0, await archive.now()
        for number, job_id in enumerate(wanted):
            job = await archive.find(job_id, queue)
            if job is None:
                say(f"the ledger knows no job {printable(job_id)}")
                missing = 1
                continue
            attempts = [plain(attempt_row(attempt)) for attempt in await archive.attempts(job.queue, job_id)]
            steps = await archive.steps(job.queue, job_id)
            progress = await _progress(settings, job) if job.status == "running" else None
            private = {"headers": job.headers, "result": job.result} if payload else {}
            if json:
                more = private | ({"document": document(_body(job))} if payload else {})
                told: dict[str, Any] = {} if progress is None else {"progress": msgspec.structs.asdict(progress)}
                if steps:
                    told |= {"steps": [_step(step, payload=payload) for step in steps]}
                print_json(plain(job_row(job, now)) | more | {"log": attempts} | told)
                continue
            if number:
                print_lines([("--", "")])
            _print(job_row(job, now), job, private, attempts, payload=payload)
            print_lines([_of_step(step, payload=payload) for step in steps])
            if progress is not None:
                print_lines([("progress", progress.text)])
        return missing

    return _ask(flags, work, private=payload)


@jobs.command
def signal(
    job_id: str,
    name: str,
    data: str | None = None,
    /,
    *,
    queue: QueueName = None,
    flags: WorkerFlags = WORKER,
) -> int:
    """Send a signal to a job that waits for it, or will.

    Args:
        job_id: The job's id.
        name: Of the signal; of several with one name, the first counts.
        data: What the handler is given, as JSON.
        queue: The job's queue; needed if the ledger does not know the job yet, or several queues have one with this id.
    """
    try:
        written = None if data is None else bytes(msgspec.json.format(data.encode(), indent=-1)).decode()
    except msgspec.DecodeError as error:
        raise UsageError(f'the data must be JSON, such as \'{{"by": "ann"}}\': {error}') from None

    async def work(archive: Archive) -> int:
        if await archive.signal(job_id, name, written, queue):
            streams.write(f"sent {printable(name)} to {printable(job_id)}\n")
            return 0
        say(f"nothing was sent: {printable(job_id)} has ended, or {printable(name)} was sent before or has timed out")
        return 1

    return _ask(flags, work, private=True)


@jobs.command(name="output")
def output_(
    job_id: str,
    /,
    *,
    queue: QueueName = None,
    follow: bool = False,
    after: int = 0,
    json: bool = False,
    flags: WorkerFlags = WORKER,
) -> int:
    """Print what a job's handler emits: texts as they are, anything else as lines of JSON.

    Args:
        job_id: The job's id.
        queue: Its queue; needed where no ledger knows the job.
        follow: Wait for more, until the job has ended.
        after: Only what is behind this position.
        json: One JSON object per line, for programs; bytes as base64, and so marked.
    """
    settings = flags.settings()

    async def main() -> int:
        from streamworker.app import App as StreamworkerApp  # noqa: PLC0415 - it imports all there is

        app = StreamworkerApp[Any](settings=settings, encryption=encryption(settings))
        async with app, aclosing(app.output(job_id, after=after, queue=queue, follow=follow)) as items:
            async for item in items:
                if json:
                    mark = {"encoding": "base64"} if isinstance(item.chunk, bytes) else {}
                    print_json(msgspec.to_builtins(item) | mark)
                else:
                    _print_chunk(item)
                streams.flush()
        return 0

    return run(main, endless=True)


@jobs.command
def logs(
    job_id: str,
    /,
    *,
    queue: QueueName = None,
    follow: bool = False,
    json: bool = False,
    flags: WorkerFlags = WORKER,
) -> int:
    """Print what a job's handler logged, run by run, if workers store it (STREAMWORKER_JOB_LOG).

    Args:
        job_id: The job's id.
        queue: Its queue; needed where no ledger knows the job.
        follow: Wait for more, until the job has ended.
        json: One JSON object per line, for programs.
    """
    settings = flags.settings()

    async def main() -> int:
        from streamworker.app import App as StreamworkerApp  # noqa: PLC0415 - it imports all there is

        app, run_of = StreamworkerApp[Any](settings=settings, encryption=encryption(settings)), None
        async with app, aclosing(app.job_log(job_id, queue=queue, follow=follow)) as lines:
            async for line in lines:
                if json:
                    print_json(msgspec.to_builtins(line))
                else:
                    if line.run != run_of:
                        say(line.heading)
                    streams.write(log_text(line))
                run_of = line.run
                streams.flush()
        if run_of is None:
            say("nothing is kept of what this job logged: is STREAMWORKER_JOB_LOG set where workers run?")
        return 0

    return run(main, endless=True)


def _print_chunk(item: OutputItem) -> None:
    if item.restart:
        say("the job started over: what follows is of another run")
    if item.missed:
        say(f"{item.missed:,} chunks are missing: they were dropped before they were read")
    chunk = item.chunk
    if isinstance(chunk, bytes):
        chunk = chunk.decode(errors="backslashreplace")
    if isinstance(chunk, str):
        streams.write(clean_block(chunk))
    else:
        print_json(chunk)


@jobs.command
def retry(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    conditions: JobConditions = CONDITIONS,
    all: bool = False,  # noqa: A002 - the flag's name
    force: bool = False,
    acting: ActionFlags = ACTION,
    flags: WorkerFlags = WORKER,
) -> int:
    """Queue dead and cancelled jobs again, with all their attempts; a relay dispatches them.

    Args:
        ids: Job ids.
        queue: Of this queue.
        all: All that died.
        force: Completed ones too: they run a second time.
    """
    wanted = conditions.chosen(queue, ids + named, ("dead",), everything=all, verb="retry")

    async def work(archive: Archive) -> int:
        def barred(job: JobRecord) -> str | None:
            if job.status == "completed":
                return None if force else "it is completed: --force runs it a second time"
            if job.expires_at is not None and job.expires_at <= datetime.now(UTC):
                return "it has expired: enqueue its data anew"
            return None if job.status in ("dead", "cancelled") else f"it is {job.status}"

        async def do(job: JobRecord) -> bool:
            if operator is not None:
                await operator.uncancel(job.queue, job.id)
            return await archive.retry(job.queue, job.id)

        async with redis_too(settings) as operator:
            action = BulkAction("retry", "queued", "job", do, _names, barred)
            return await act(acting, unambiguous(archive, wanted), action, wanted.ids)

    settings = flags.settings()
    return _ask(flags, work)


@jobs.command
def prune(
    queue: QueueName = None,
    *,
    older: Seconds | None = None,
    yes: Annotated[bool, Parameter(alias="-y")] = False,
    dry_run: bool = False,
    flags: WorkerFlags = WORKER,
) -> int:
    """Forget completed, cancelled and expired jobs after a while. Workers do it by themselves; dead jobs are kept.

    Args:
        queue: Only of this queue.
        older: Seconds ago that they ended, at least; the queue's own retention unless given.
        yes: Do not ask.
        dry_run: Only tell how many.
    """

    async def work(archive: Archive) -> int:
        count = await archive.prunable(queue, older=older)
        if dry_run or not count:
            streams.write(f"{count:,} jobs would be forgotten\n") if dry_run else say("no job is that old")
            return 0
        if not yes and not agreed(f"forget {count:,} jobs for good?"):
            say("nothing was changed")
            return 1
        forgotten = 0
        while batch := await archive.prune(queue, older=older):
            forgotten += batch
        streams.write(f"forgot {forgotten:,} jobs\n")
        return 0

    return _ask(flags, work)


def _ask(
    flags: WorkerFlags,
    work: Callable[[Archive], Coroutine[Any, Any, int]],
    *,
    endless: bool = False,
    private: bool = False,
) -> int:
    settings = flags.settings()

    async def main() -> int:
        from streamworker.operators import open_audited_archive  # noqa: PLC0415 - see `run`

        async with AsyncExitStack() as stack:
            archive: Archive = await open_audited_archive(stack, settings)
            return await work(opener(settings).archive(archive) if private else archive)

    return run(main, endless=endless)


@asynccontextmanager
async def redis_too(settings: Settings) -> AsyncIterator[Operator | None]:
    """An operator of Redis; ``None`` where only the ledger is named."""
    from streamworker.operators import open_operator  # noqa: PLC0415 - see `run`

    if settings.redis_url is None:
        yield None
        return
    async with open_operator(settings) as operator:
        yield operator


async def _progress(settings: Settings, job: JobRecord) -> Progress | None:
    """The progress of a running job; ``None`` if its handler reports none, or no Redis is named."""
    async with redis_too(settings) as operator:
        if operator is None or job.worker_id is None:
            return None
        return (await operator.progress([(job.worker_id, job.id)]))[0]


async def unambiguous(archive: Archive, wanted: Wanted) -> AsyncIterator[JobRecord]:
    """The jobs that are wanted.

    Raises:
        UsageError: they are named by ids, one of which stands for jobs of several queues.
    """
    jobs = archive.jobs(wanted)
    if not wanted.ids or wanted.queue is not None:
        async for job in jobs:
            yield job
        return
    found = [job async for job in jobs]
    queues: dict[str, list[str]] = {}
    for job in found:
        queues.setdefault(job.id, []).append(job.queue)
    for job_id, names in queues.items():
        if len(names) > 1:
            raise UsageError(
                f"several queues have a job with the id {printable(job_id)} ({', '.join(sorted(names))}): add --queue"
            )
    for job in found:
        yield job


def _names(job: JobRecord) -> dict[str, Any]:
    return {"queue": job.queue, "job_id": job.id, "kind": job.kind, "status": job.status}


def _body(job: JobRecord) -> bytes | None:
    """What there is of the document: all of it, or else the payload."""
    if job.document is not None:
        return job.document
    return None if job.payload is None else bytes(job.payload)


def _step(step: StepRow, *, payload: bool) -> dict[str, Any]:
    value = {"value": None if step.value is None else document(step.value.encode())} if payload else {}
    return plain(step_row(step)) | value


def _of_step(step: StepRow, *, payload: bool) -> tuple[str, str]:
    """A line about a step."""
    row = step_row(step)
    took = "" if row.took_s is None else f" in {row.took_s:.3f} s"
    until = f" until {row.until}" if row.until and row.state == "waiting" else ""
    value = f": {step.value}" if payload and step.value is not None else ""
    return f"{row.kind} {row.name}".strip(), f"{row.recorded_at} {row.state}{took}{until}{value}"


def _print(
    row: JobRow, job: JobRecord, private: dict[str, Any], attempts: list[dict[str, Any]], *, payload: bool
) -> None:
    lines = [*plain(row).items(), *private.items()]
    if payload:
        lines.append(("document", (_body(job) or b"").decode(errors="backslashreplace")))
    for each in attempts:
        took = "" if each["took_s"] is None else f" in {each['took_s']:.3f} s"
        where = f" on {each['worker_id']}" if each["worker_id"] else ""
        what = f": {each['error']}" if each["error"] else ""
        lines.append((f"attempt {each['attempt']}", f"{each['finished_at']} {each['outcome']}{took}{where}{what}"))
    print_lines(lines)


def cancel(
    *ids: str,
    named: NamedIds = (),
    queue: QueueName = None,
    conditions: JobConditions = CONDITIONS,
    all: bool = False,  # noqa: A002 - the flag's name
    acting: ActionFlags = ACTION,
    flags: WorkerFlags = WORKER,
) -> int:
    """Keep jobs from running, and end those that run. Without a ledger, and for jobs that it does not know, --queue
    must name their queue.

    Args:
        ids: Job ids.
        queue: Of this queue.
        all: All that wait.
    """
    wanted = conditions.chosen(queue, ids + named, OPEN, everything=all, verb="cancel")

    async def work(archive: Archive | None, operator: Operator | None) -> int:
        from streamworker.operators import cancel_job  # noqa: PLC0415 - see `run`

        def barred(job: _Target) -> str | None:
            return None if job.status in (*OPEN, "running", None) else f"it is {job.status}"

        async def do(job: _Target) -> bool:
            return await cancel_job(archive, operator, job.queue, job.job_id) != "ended"

        action = BulkAction("cancel", "cancelled", "job", do, msgspec.structs.asdict, barred)
        return await act(acting, _targets(archive, wanted, queue), action, wanted.ids)

    settings = flags.settings()

    async def main() -> int:
        from streamworker.operators import open_audited_archive  # noqa: PLC0415 - see `run`

        async with AsyncExitStack() as stack, redis_too(settings) as operator:
            if settings.ledger != "off" and (settings.database_url or settings.redis_url == EMBEDDED):
                return await work(await open_audited_archive(stack, settings), operator)
            if queue is None or not wanted.ids:
                raise UsageError("there is no ledger (DATABASE_URL is not set): say which jobs, and --queue")
            return await work(None, operator)

    return run(main)


class _Target(msgspec.Struct, frozen=True):
    """A job to be cancelled; ``kind`` and ``status`` as the ledger knows them."""

    queue: str
    job_id: str
    kind: str | None
    status: Status | None


async def _targets(archive: Archive | None, wanted: Wanted, queue: str | None) -> AsyncIterator[_Target]:
    """What the ledger knows of it, and what else was named: that can only lie in Redis."""
    known = set()
    if archive is not None:
        async for job in unambiguous(archive, wanted):
            known.add(job.id)
            yield _Target(job.queue, job.id, job.kind, job.status)
    if queue is not None:
        for job_id in sorted(wanted.ids - known):
            yield _Target(queue, job_id, None, None)


class MissingJob(NamedTuple):
    """A job that is missing in Redis, unchanged in the ledger since ``before``."""

    queue: str
    job_id: str
    before: datetime


def reconcile(queue: QueueName = None, *, acting: ActionFlags = ACTION, flags: WorkerFlags = WORKER) -> int:
    """Compare the ledger with Redis job by job, and queue again what Redis lost.

    Relays do the same by themselves one lease after Redis shows a sign of loss. Jobs that are in Redis, ready, held or
    delayed, are left alone.

    Args:
        queue: Only this queue; all the ledger knows unless given.
    """
    settings = flags.settings()

    async def main() -> int:
        from streamworker.app import App as StreamworkerApp  # noqa: PLC0415 - it imports all there is

        async with StreamworkerApp[Any](settings=settings).relaying(settings) as relaying:

            async def missing() -> AsyncIterator[MissingJob]:
                for name in [queue] if queue is not None else await relaying.known():
                    ids, before = await relaying.missing(name)
                    for job_id in ids:
                        yield MissingJob(name, job_id, before)

            async def again(job: MissingJob) -> bool:
                lost = await relaying.outbox.lost(job.queue, [job.job_id], job.before)
                if lost.locked:
                    raise StreamworkerError("a run of it is in its transaction: try again when that has ended")
                return bool(lost.queued)

            action = BulkAction("queue again", "queued again", "lost job", again, _names_of_missing)
            return await act(acting, missing(), action)

    return run(main)


def _names_of_missing(job: MissingJob) -> dict[str, Any]:
    return {"queue": job.queue, "job_id": job.job_id}
