"""``streamworker jobs erase``: every trace of a person's jobs, in both stores."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from streamworker.cli.options import WORKER, QueueName, Seconds, WorkerFlags, app_store, opener, run
from streamworker.cli.output import print_json, print_lines
from streamworker.cli.streams import say
from streamworker.errors import UsageError
from streamworker.settings import EMBEDDED
from streamworker.views.erasure import Erased, Erasure, Person

Conditions = Annotated[tuple[str, ...], Parameter(negative=())]


def erase(
    *,
    where: Conditions = (),
    header: Conditions = (),
    queue: QueueName = None,
    wait: Seconds = 10.0,
    yes: Annotated[bool, Parameter(alias="-y")] = False,
    json: bool = False,
    flags: WorkerFlags = WORKER,
) -> int:
    """Delete every trace of a person's jobs, in Redis and in the ledger. Without --yes it only counts them.

    Sealed payloads are looked into with the keys of the app that STREAMWORKER_APP names. 1 if a job still runs, or if
    something is sealed that no key here opens.

    Args:
        where: A field of the payload and its value, such as customer.email=ann@example.org; all must match.
        header: A header and its value.
        queue: Only this queue.
        wait: Seconds to wait for jobs that run.
        yes: Delete.
        json: One JSON object, for programs.
    """
    if not where and not header:
        raise UsageError("say whose jobs: --where customer_id=17, or --header NAME=VALUE")
    whose = Person(_values("where", where), _values("header", header))
    settings = flags.settings()

    async def main() -> int:
        from streamworker.operators import open_audited_archive, open_operator  # noqa: PLC0415 - see `run`

        async with AsyncExitStack() as stack:
            operator = await stack.enter_async_context(open_operator(settings))
            durable = settings.ledger != "off" and (settings.database_url or settings.redis_url == EMBEDDED)
            archive = await open_audited_archive(stack, settings) if durable else None
            store = app_store(settings) or (None if archive is None else archive.payloads(settings.namespace))
            erasure = Erasure(whose, operator, archive, opener(settings), queue=queue, store=store)
            found = await erasure.run(wait, dry_run=not yes)
        if json:
            print_json(msgspec.structs.asdict(found))
        else:
            _print(found)
        if found.dry_run and found.jobs:
            say("nothing was deleted: --yes deletes it")
        return int(bool(found.running or found.sealed))

    return run(main)


def _values(flag: str, conditions: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """The values as JSON, if they are, and as text: a number may be kept as either."""
    found: dict[str, tuple[Any, ...]] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals or not name:
            raise UsageError(f"--{flag} {condition} is no condition: write --{flag} NAME=VALUE")
        try:
            found[name] = (msgspec.json.decode(value), value)
        except (msgspec.MsgspecError, UnicodeEncodeError):
            found[name] = (value,)
    return found


def _print(found: Erased) -> None:
    counts = [*found.redis.items(), *((f"ledger: {name}", count) for name, count in found.ledger.items())]
    lines: list[tuple[str, Any]] = [("jobs", len(found.jobs)), *((name, f"{count:,}") for name, count in counts)]
    lines += [("still running", f"{job_id} ({queue})") for queue, job_id in found.running]
    if found.sealed:
        lines.append(("sealed", f"{found.sealed:,} with a key that is not here: what is in them is not known"))
    if found.unreadable:
        lines.append(("unreadable", f"{found.unreadable:,} documents that are no JSON"))
    print_lines(lines)
