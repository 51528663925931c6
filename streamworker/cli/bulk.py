"""Actions on many jobs: show what is meant, ask, act on each, print each result."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any, Generic, NamedTuple

import msgspec
from typing_extensions import TypeVar

from streamworker.broker import StoredJob
from streamworker.cli.options import ActionFlags
from streamworker.cli.output import json_line, sentence_of
from streamworker.cli.streams import Report, say
from streamworker.errors import StreamworkerError, UsageError
from streamworker.views import Selection, Throttle, printable

T = TypeVar("T")


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


def narrowed(selection: Selection, everything: bool, verb: str) -> Selection:
    """The selection, if it says which jobs are meant.

    Raises:
        UsageError: it does not.
    """
    says = (
        selection.ids or selection.worker or selection.min_idle or selection.kind or selection.reason or selection.text
    )
    if says and everything:
        raise UsageError("--all and other conditions contradict each other: keep one of them")
    if not says and not everything:
        raise UsageError(f"say what to {verb}: ids, a condition, or --all")
    return selection


def stored_names(job: StoredJob) -> dict[str, Any]:
    """The identity of a delayed job or a dead letter, as it is printed."""
    return {"queue": job.queue, "entry_id": job.handle, "job_id": job.job_id, "kind": job.kind}


async def without_bodies(jobs: AsyncIterator[StoredJob]) -> AsyncIterator[StoredJob]:
    """The jobs without their documents: thousands of them need not be kept until the last is confirmed."""
    async for job in jobs:
        yield msgspec.structs.replace(job, body=None)


async def act(
    acting: ActionFlags,
    items: AsyncIterator[T],
    deed: BulkAction[T],
    wanted: Collection[str] = (),
    *,
    rate: float | None = None,
) -> int:
    """Apply the action to the items, whether or not the reader of standard output is still there.

    All are read first: a job that is released may come by again.

    Args:
        acting: how.
        items: what fits.
        deed: what is done.
        wanted: ids that were named; each that no item has is said.
        rate: items a second at most; ``None`` for as fast as it goes.

    Returns:
        0, or 1 if something that was named is not there, or could not be done.

    Raises:
        StreamworkerError: not all could be said, or done.
    """
    report = Report()
    free, code = await _chosen(acting, items, deed, wanted, report)
    if free:
        code = max(code, await _do(acting, deed, free, report, rate))
    report.end()
    return code


async def _chosen(
    acting: ActionFlags, items: AsyncIterator[T], deed: BulkAction[T], wanted: Collection[str], report: Report
) -> tuple[list[T], int]:
    """(what is to be done and was agreed to, the exit code so far)."""
    chosen: list[T] = []
    async for item in items:
        chosen.append(item)
        if len(chosen) == acting.limit:
            break
    known = {str(value) for item in chosen for value in deed.names(item).values()}
    missing = [] if acting.limit == len(chosen) else sorted(set(wanted) - known)
    for name in missing:
        say(f"there is no {deed.noun} {printable(name)}")
    free = [item for item in chosen if deed.barred(item) is None]
    for item in chosen:
        reason = deed.barred(item)
        if reason is not None:
            _tell(acting, report, deed.names(item), "skipped", reason)
    bad = bool(missing) or (len(free) < len(chosen) and bool(wanted))
    if not free:
        if not chosen and not missing:
            say(f"no {deed.noun} fits")
        return [], int(bad)
    if acting.dry_run:
        for item in free:
            _tell(acting, report, deed.names(item), f"would be {deed.past}")
        return [], int(bad)
    if not acting.yes and not agreed(f"{deed.verb} {_count(len(free), deed.noun)}?"):
        say("nothing was changed")
        return [], 1
    return free, int(bad)


async def _do(acting: ActionFlags, deed: BulkAction[T], items: Sequence[T], report: Report, rate: float | None) -> int:
    tally: Counter[str] = Counter()
    pace = Throttle(rate)
    try:
        for item in items:
            await pace.turn()
            reason = ""
            try:
                result = deed.past if await deed.do(item) else "gone"
            except StreamworkerError as error:
                result, reason = "refused", sentence_of(error)
            tally[result] += 1
            if acting.json or result == "refused":
                _tell(acting, report, deed.names(item), result, reason)
    finally:
        # Also when the server went away in the middle: what is done is done.
        if not acting.json:
            report.write(f"{deed.past} {_count(tally[deed.past], deed.noun)}\n")
        if tally["gone"]:
            say(f"{_count(tally['gone'], deed.noun)} moved on meanwhile and were left alone")
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
