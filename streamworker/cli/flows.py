"""``streamworker flows``: graphs of jobs in the ledger, and a tree of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from cyclopts import App, Parameter

from streamworker.cli import streams
from streamworker.cli.jobs import redis_too
from streamworker.cli.options import LISTING, WORKER, Listing, WorkerFlags, run
from streamworker.cli.output import Column, print_json, print_lines, show
from streamworker.cli.resource import agreed
from streamworker.cli.streams import say
from streamworker.errors import UsageError
from streamworker.job import FlowRecord, NodeRecord
from streamworker.postgres import Archive
from streamworker.redact import printable
from streamworker.views.flows import before, in_order
from streamworker.views.rows import age

flows = App(name="flows", help="Flows in the ledger: graphs of jobs.")

Yes = Annotated[bool, Parameter(alias="-y")]
SIGNS: Final = {
    "ok": "+", "failed": "x", "held": "!", "skipped": "-", "running": ">", "retrying": "~", "queued": ".",
    "waiting": "z", "blocked": " ",
}  # fmt: skip
ALIKE: Final = 8
"""Nodes side by side of which the tree tells apart no more, unless --all is given."""


class _Row(msgspec.Struct, frozen=True):
    """A flow of a listing."""

    flow: FlowRecord
    now: datetime


def _states(nodes: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {state}" for state, count in sorted(nodes.items(), key=_rank)) or "none"


def _rank(pair: tuple[str, int]) -> int:
    return list(SIGNS).index(pair[0]) if pair[0] in SIGNS else len(SIGNS)


_COLUMNS: Final[list[Column[_Row]]] = [
    Column("flow", lambda row: row.flow.id, short=36),
    Column("name", lambda row: row.flow.name, short=16),
    Column("key", lambda row: row.flow.key or "", short=16),
    Column("status", lambda row: row.flow.status),
    Column("ago", lambda row: age((row.now - row.flow.created_at).total_seconds()), right=True),
    Column("jobs", lambda row: _states(row.flow.nodes), rest=True),
]


@flows.default
@flows.command(name="list")
def list_(
    *,
    status: Literal["running", "completed", "failed", "cancelled"] | None = None,
    name: str | None = None,
    listing: Listing = LISTING,
    flags: WorkerFlags = WORKER,
) -> int:
    """List flows, newest first.

    Args:
        status: With this status.
        name: With this name.
    """

    async def work(archive: Archive) -> int:
        async def rows() -> AsyncIterator[tuple[_Row, bytes | None]]:
            now, last = datetime.fromtimestamp(await archive.now(), UTC), None
            while True:
                page = await archive.flows.flows(status=status, name=name, after=last)
                for flow in page:
                    yield _Row(flow, now), None
                if not page:
                    return
                last = page[-1].created_at, page[-1].id

        return await show(listing, rows, _COLUMNS, title="flows", json=lambda row: msgspec.to_builtins(row.flow))

    return _ask(flags, work, endless=listing.watch)


@flows.command(name="show")
def show_(flow: str, /, *, all: bool = False, json: bool = False, flags: WorkerFlags = WORKER) -> int:  # noqa: A002
    """Show a flow as a tree: + ok, x failed, ! held, - skipped, > running, ~ retrying, . queued, z waiting.

    Args:
        flow: Its id, or its key.
        all: Each of many nodes that are alike.
        json: The flow and its nodes as one JSON object, for programs.
    """

    async def work(archive: Archive) -> int:
        found = await _known(archive, flow)
        if found is None:
            return 1
        nodes = await archive.flows.nodes(found.id)
        if json:
            print_json(msgspec.to_builtins(found) | {"graph": [msgspec.to_builtins(node) for node in nodes]})
            return 0
        print_lines([
            ("flow", found.id), ("name", found.name), ("key", found.key), ("status", found.status),
            ("created_at", found.created_at.isoformat()),
            ("finished_at", found.finished_at and found.finished_at.isoformat()), ("jobs", _states(found.nodes)),
        ])  # fmt: skip
        for line in tree(nodes, most=len(nodes) if all else ALIKE):
            streams.write(f"{printable(line)}\n")
        return 0

    return _ask(flags, work)


@flows.command
def cancel(*ids: str, flags: WorkerFlags = WORKER) -> int:
    """Cancel flows: nodes that have not started never run, and running jobs are cancelled.

    Args:
        ids: Flow ids, or keys.
    """

    async def do(operator: Any, found: FlowRecord) -> str | None:
        return "cancelled" if await operator.cancel(found) else None

    return _each(ids, flags, do, "cancel", "it has ended")


@flows.command
def retry(*ids: str, flags: WorkerFlags = WORKER) -> int:
    """Queue the dead, expired and cancelled jobs of flows anew; nodes that never ran because of them wait again.

    Args:
        ids: Flow ids, or keys.
    """

    async def do(operator: Any, found: FlowRecord) -> str | None:
        count = await operator.retry(found)
        return f"{count:,} job{'' if count == 1 else 's'} queued" if count else None

    return _each(ids, flags, do, "retry", "no job of it has failed")


@flows.command
def delete(*ids: str, yes: Yes = False, flags: WorkerFlags = WORKER) -> int:
    """Delete flows that have ended, with their jobs. Workers do it by themselves after a while.

    Args:
        ids: Flow ids, or keys.
        yes: Do not ask.
    """
    if ids and not yes and not agreed(f"delete {len(ids)} flow{'' if len(ids) == 1 else 's'} and their jobs for good?"):
        say("nothing was changed")
        return 1

    async def do(operator: Any, found: FlowRecord) -> str | None:
        return "deleted" if await operator.delete(found) else None

    return _each(ids, flags, do, "delete", "it has not ended: cancel it first")


Do = Callable[[Any, FlowRecord], Coroutine[Any, Any, str | None]]


def _each(ids: Sequence[str], flags: WorkerFlags, do: Do, verb: str, why_not: str) -> int:
    if not ids:
        raise UsageError(f"say which: streamworker flows {verb} ID")
    settings = flags.settings()

    async def work(archive: Archive) -> int:
        from streamworker.operators import FlowOperator  # noqa: PLC0415 - see `run`

        code = 0
        async with redis_too(settings) as redis:
            operator = FlowOperator(archive, redis)
            for each in ids:
                found = await _known(archive, each)
                if found is None:
                    code = 1
                    continue
                done = await do(operator, found)
                if done is None:
                    say(f"{found.id}: {why_not}")
                    code = 1
                else:
                    streams.write(f"{found.id}: {done}\n")
        return code

    return _ask(flags, work)


async def _known(archive: Archive, flow: str) -> FlowRecord | None:
    found = await archive.flows.find(flow)
    if found is None:
        say(f"the ledger knows no flow {printable(flow)}")
    return found


def _ask(flags: WorkerFlags, work: Callable[[Archive], Coroutine[Any, Any, int]], *, endless: bool = False) -> int:
    settings = flags.settings()

    async def main() -> int:
        from streamworker.operators import require_archive  # noqa: PLC0415 - see `run`

        async with AsyncExitStack() as stack:
            return await work(await require_archive(stack, settings))

    return run(main, endless=endless)


# -- the tree


def tree(nodes: Sequence[NodeRecord], *, most: int) -> Iterator[str]:
    """Lines of a tree of jobs: each below the last of those that it comes after; the others are named beside it.

    Args:
        nodes: of a flow, gates among them.
        most: nodes side by side that are shown; of those with none below them the rest is counted.
    """
    jobs = {node.number: node for node in nodes if node.job_id is not None}
    earlier = before(nodes)
    depth: dict[int, int] = {}
    for number in in_order(earlier):
        depth[number] = 1 + max((depth[each] for each in earlier[number]), default=0)
    below: dict[int | None, list[NodeRecord]] = {}
    for number, node in jobs.items():
        parent = max(earlier[number], key=lambda each: (depth[each], each), default=None)
        below.setdefault(parent, []).append(node)
    waiting = _rows(below.get(None, []), "", None, below, most)
    while waiting:
        prefix, what, above = waiting.pop(0)
        if isinstance(what, str):
            yield prefix + what
            continue
        yield f"{prefix}{_told(what, above, earlier[what.number], jobs)}"
        inner = prefix[:-3] + ("|  " if prefix.endswith("|- ") else "   ")
        waiting[:0] = _rows(below.get(what.number, []), inner, what, below, most)


Line = tuple[str, NodeRecord | str, NodeRecord | None]


def _rows(
    nodes: Sequence[NodeRecord],
    indent: str,
    parent: NodeRecord | None,
    below: dict[int | None, list[NodeRecord]],
    most: int,
) -> list[Line]:
    leaves = [node for node in nodes if node.number not in below]
    left = {node.number for node in leaves[most:]} if len(leaves) > most + 1 else set()
    shown: list[NodeRecord | str] = [node for node in nodes if node.number not in left]
    if left:
        counts: Counter[str] = Counter(node.state for node in nodes if node.number in left)
        shown.append(f"    and {len(left):,} more: {_states(dict(counts))} (--all shows them)")
    return [(f"{indent}{'`- ' if each is shown[-1] else '|- '}", each, parent) for each in shown]


def _told(node: NodeRecord, parent: NodeRecord | None, earlier: dict[int, str], jobs: dict[int, NodeRecord]) -> str:
    words = [f"[{SIGNS.get(node.state, '?')}] {node.name}", node.state]
    if node.started_at is not None and node.finished_at is not None:
        words.append(f"{(node.finished_at - node.started_at).total_seconds():.3f} s")
    if parent is not None and earlier.get(parent.number, "ok") != "ok":
        words.append(f"when {earlier[parent.number]}")
    others = [
        jobs[each].name + ("" if condition == "ok" else f" ({condition})")
        for each, condition in earlier.items()
        if parent is None or each != parent.number
    ]
    if others:
        words.append(f"after {', '.join(others[:3])}{f' and {len(others) - 3:,} more' if len(others) > 3 else ''}, too")
    words.append(node.job_id or "")
    if node.error and node.state in ("failed", "held", "retrying"):
        words.append(node.error.splitlines()[-1][:100])
    return "  ".join(words)
