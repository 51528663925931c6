"""Jobs as a command lists, shows and changes them: one description of a resource, and the actions on many jobs."""

# Annotations are evaluated here: cyclopts would look for those of `Choice` in the modules of its subclasses.

import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import msgspec
from typing_extensions import TypeVar

from streamworker.broker import Operator, PendingEntry, StoredJob
from streamworker.cli.options import (
    SERVER,
    ActionFlags,
    Listing,
    NamedIds,
    QueueName,
    ServerFlags,
    fleet,
    operate,
)
from streamworker.cli.output import Column, detail, json_line, print_lines, show
from streamworker.cli.streams import Report, say
from streamworker.errors import UsageError
from streamworker.redact import printable
from streamworker.views.listing import JobListing, Selection, Throttle, outcome_of

T = TypeVar("T")
R = TypeVar("R")
J = TypeVar("J", bound=StoredJob | PendingEntry)


class BulkAction(NamedTuple, Generic[T]):
    """A change.

    Attributes:
        verb: what is done ("release").
        past: what was done then ("released").
        noun: to what, in the singular ("pending job").
        do: does it; False if it did not hold any more.
        names: the item's identity, as printed in JSON.
        barred: why it must not be done without --force; ``None`` if it may.
    """

    verb: str
    past: str
    noun: str
    do: Callable[[T], Awaitable[bool]]
    names: Callable[[T], dict[str, Any]]
    barred: Callable[[T], str | None] = lambda _: None


def require_choice(says: bool, *, everything: bool, verb: str) -> None:
    """Check that it is said which jobs are to be changed.

    Args:
        says: ids or conditions say it.
        everything: ``--all`` was given.
        verb: what is done to them.

    Raises:
        UsageError: it is not said, or twice.
    """
    if says and everything:
        raise UsageError("--all and other conditions contradict each other: keep one of them")
    if not says and not everything:
        raise UsageError(f"say what to {verb}: ids, a condition, or --all")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions on jobs, as flags. A subclass has a field for each, named as that of `Selection`."""

    def selection(self, queue: str | None, ids: Sequence[str] = ()) -> Selection:
        """The jobs that fit: in this queue (``None``: in all), with one of these ids (empty: with any)."""
        conditions = {name: value for name, value in vars(self).items() if name in Selection.__struct_fields__}
        return Selection(**{**conditions, "queue": queue, "ids": frozenset(ids)})


@dataclass(frozen=True, kw_only=True)
class Choice(Conditions):
    """Which jobs are changed.

    Attributes:
        named: The same, once per id.
        queue: In this queue.
        all: All of them.
    """

    named: NamedIds = ()
    queue: QueueName = None
    all: bool = False

    def chosen(self, ids: tuple[str, ...], verb: str) -> Selection:
        """The jobs to change.

        Args:
            ids: those without a flag.
            verb: what is done to them.

        Raises:
            UsageError: it is not said which.
        """
        selection = self.selection(self.queue, (*ids, *self.named))
        require_choice(selection.narrows, everything=self.all, verb=verb)
        return selection


class Resource(NamedTuple, Generic[J, R]):
    """Jobs in one state, as ``list``, ``show`` and the actions of their command use them.

    Attributes:
        noun: one of the jobs, in the singular ("dead letter").
        jobs: all in that state; the command is named as it.
        row: a job as its listing shows it, at this moment by the server's clock.
        columns: of the listing.
        more: further facts for ``show``; the second argument says whether private ones are wanted.
    """

    noun: str
    jobs: JobListing[J]
    row: Callable[[J, float], R]
    columns: Sequence[Column[R]]
    more: Callable[[J, bool], dict[str, Any]] = lambda _, __: {}

    def list(self, selection: Selection, listing: Listing, server: ServerFlags, *, payload: bool) -> int:
        """Print the jobs that fit."""

        async def work(operator: Operator) -> int:
            async def rows() -> AsyncIterator[tuple[R, bytes | None]]:
                now = await operator.now()
                async for job in self.jobs.chosen(operator, selection):
                    yield self.row(job, now), await _body(operator, job) if payload else None

            above = fleet(operator, listing, selection.queue)
            return await show(listing, rows, self.columns, title=f"{self.noun}s", payload=payload, fleet=above)

        return operate(server, work, endless=listing.watch, private=payload)

    def show(
        self,
        *ids: str,
        named: NamedIds = (),
        queue: QueueName = None,
        payload: bool = False,
        json: bool = False,
        server: ServerFlags = SERVER,
    ) -> int:
        """Print everything about the jobs with these ids; 1 if one of them is not there. It is a command as it is.

        Args:
            ids: Entry ids or job ids.
            queue: In this queue.
            payload: Print the documents too.
            json: One JSON object per line, for programs.

        Raises:
            UsageError: no id was given.
        """
        wanted = (*ids, *named)
        if not wanted:
            raise UsageError(f"say which: streamworker {self.jobs.state} show ID")

        async def work(operator: Operator) -> int:
            found: set[str | None] = set()
            now = await operator.now()
            async for job in self.jobs.chosen(operator, Selection(queue=queue, ids=frozenset(wanted))):
                if found and not json:
                    print_lines([("--", "")])
                names = job_names(job)
                found |= {names["entry_id"], names["job_id"]}
                body, more = await _body(operator, job), self.more(job, payload)
                detail(self.row(job, now), body, payload=payload, json=json, more=more)
            missing = [name for name in wanted if name not in found]
            for name in missing:
                say(f"there is no {self.noun} {printable(name)}")
            return int(bool(missing))

        return operate(server, work, private=payload)

    def change(
        self,
        words: tuple[str, str],
        selection: Selection,
        acting: ActionFlags,
        server: ServerFlags,
        do: Callable[[Operator], Callable[[J], Awaitable[bool]]],
        *,
        barred: Callable[[J], str | None] = lambda _: None,
        rate: float | None = None,
        bodies: bool = False,
        chosen: Callable[[Operator, Selection], AsyncIterator[J]] | None = None,
    ) -> int:
        """Act on the jobs that fit.

        Args:
            words: the action, as an infinitive and as a participle.
            selection: which jobs.
            acting: how.
            server: flags of settings.
            do: makes the action.
            barred: as in `BulkAction`.
            rate: jobs a second at most.
            bodies: the action needs their documents.
            chosen: reads the jobs that fit; those of the listing unless given.
        """

        async def work(operator: Operator) -> int:
            action = BulkAction(*words, self.noun, do(operator), job_names, barred)
            jobs = (chosen or self.jobs.chosen)(operator, selection)
            return await act(acting, jobs if bodies else _without_bodies(jobs), action, selection.ids, rate=rate)

        return operate(server, work)


def job_names(job: StoredJob | PendingEntry) -> dict[str, Any]:
    """The identity of a pending job, a delayed one or a dead letter, as it is printed."""
    entry_id = job.handle if isinstance(job, StoredJob) else job.entry_id
    return {"queue": job.queue, "entry_id": entry_id, "job_id": job.job_id, "kind": job.kind}


async def _body(operator: Operator, job: StoredJob | PendingEntry) -> bytes | None:
    return job.body if isinstance(job, StoredJob) else await operator.body(job)


async def _without_bodies(jobs: AsyncIterator[J]) -> AsyncIterator[J]:
    """The jobs without their documents: thousands of them need not be kept until the last is confirmed."""
    async for job in jobs:
        yield msgspec.structs.replace(job, body=None) if isinstance(job, StoredJob) else job


async def act(
    acting: ActionFlags,
    items: AsyncIterator[T],
    action: BulkAction[T],
    wanted: Collection[str] = (),
    *,
    rate: float | None = None,
) -> int:
    """Apply the action to the items, whether or not the reader of standard output is still there.

    All are read first: a job that is released may come by again.

    Args:
        acting: how.
        items: what fits.
        action: what is done.
        wanted: ids that were named; each that no item has is said.
        rate: items a second at most; ``None`` for as fast as it goes.

    Returns:
        0, or 1 if something that was named is not there, or could not be done.

    Raises:
        StreamworkerError: not all could be said, or done.
    """
    report = Report()
    free, code = await _chosen(acting, items, action, wanted, report)
    if free:
        code = max(code, await _do(acting, action, free, report, rate))
    report.end()
    return code


async def _chosen(
    acting: ActionFlags, items: AsyncIterator[T], action: BulkAction[T], wanted: Collection[str], report: Report
) -> tuple[list[T], int]:
    """(what is to be done and was agreed to, the exit code so far)."""
    chosen: list[T] = []
    async for item in items:
        chosen.append(item)
        if len(chosen) == acting.limit:
            break
    known = {str(value) for item in chosen for value in action.names(item).values()}
    missing = [] if acting.limit == len(chosen) else sorted(set(wanted) - known)
    for name in missing:
        say(f"there is no {action.noun} {printable(name)}")
    free = [item for item in chosen if action.barred(item) is None]
    for item in chosen:
        reason = action.barred(item)
        if reason is not None:
            _tell(acting, report, action.names(item), "skipped", reason)
    bad = bool(missing) or (len(free) < len(chosen) and bool(wanted))
    if not free:
        if not chosen and not missing:
            say(f"no {action.noun} fits")
        return [], int(bad)
    if acting.dry_run:
        for item in free:
            _tell(acting, report, action.names(item), f"would be {action.past}")
        return [], int(bad)
    if not acting.yes and not agreed(f"{action.verb} {_count(len(free), action.noun)}?"):
        say("nothing was changed")
        return [], 1
    return free, int(bad)


async def _do(
    acting: ActionFlags, action: BulkAction[T], items: Sequence[T], report: Report, rate: float | None
) -> int:
    tally: Counter[str] = Counter()
    pace = Throttle(rate)
    try:
        for item in items:
            await pace.turn()
            result, reason = await outcome_of(action.do(item))
            tally[result] += 1
            if acting.json or result == "refused":
                _tell(acting, report, action.names(item), action.past if result == "done" else result, reason)
    finally:
        # Also when the server went away in the middle: what is done is done.
        if not acting.json:
            report.write(f"{action.past} {_count(tally['done'], action.noun)}\n")
        if tally["gone"]:
            say(f"{_count(tally['gone'], action.noun)} moved on meanwhile and were left alone")
    return int(tally["refused"] > 0)


def _tell(acting: ActionFlags, report: Report, names: dict[str, Any], result: str, reason: str = "") -> None:
    if acting.json:
        report.write(json_line({**names, "result": result, **({"reason": reason} if reason else {})}))
        return
    what = printable(" ".join(str(value) for value in names.values() if value is not None))
    if reason:
        say(f"{result}: {what}: {printable(reason)}")
    else:
        report.write(f"{result}: {what}\n")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def agreed(question: str) -> bool:
    """Ask on a terminal.

    Raises:
        UsageError: there is no terminal to ask on.
    """
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody is there to answer: add --yes, or --dry-run to see what would be done.")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
