"""``streamworker enqueue``."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import anyio
import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from streamworker import codec
from streamworker.app import App
from streamworker.cli.app_loader import load_app, with_own
from streamworker.cli.options import SERVER, QueueName, Seconds, ServerFlags
from streamworker.cli.output import json_line
from streamworker.cli.streams import Report
from streamworker.errors import InvalidJob, UsageError
from streamworker.job import Enqueued, Job, Level, Until
from streamworker.payload import KIND_NAME

BATCH: Final = 1000
"""Jobs of one round trip."""
_NUMBER: Final = re.compile(r"-?[0-9]{1,18}")


@Parameter(name="*")
@dataclass(frozen=True)
class HeldFlags:
    """How --key is held.

    Attributes:
        unique: Hold the key until the job is done or started, instead of for a time.
        replace: Replace a job with that key that has not started.
        debounce: Seconds to wait first, anew with each job that replaces it.
        debounce_max: Most seconds of that.
    """

    unique: Until | None = None
    replace: bool = False
    debounce: Seconds | None = None
    debounce_max: Seconds | None = None

    @property
    def until(self) -> Until | None:
        """Until when the key is held."""
        return self.unique or ("started" if self.replace or self.debounce is not None else None)

    def check(self, key: str | None, delay: float | None) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: it makes none.
        """
        if key is None and (self.until is not None or self.debounce_max is not None):
            raise UsageError("--unique, --replace and --debounce are about the jobs of one key: give --key, too")
        if self.debounce is not None and delay is not None:
            raise UsageError("--debounce says when the job runs: leave --delay out")
        if self.debounce_max is not None and (self.debounce is None or self.debounce_max < self.debounce):
            raise UsageError("--debounce-max needs a --debounce that is not longer")


HELD: Final = HeldFlags()


def enqueue(
    kind: str,
    payload: Annotated[str, Parameter(allow_leading_hyphen=True)] = "{}",
    /,
    *,
    queue: QueueName = None,
    priority: str = "normal",
    delay: Seconds | None = None,
    expires_in: Seconds | None = None,
    key: str | None = None,
    held: HeldFlags = HELD,
    count: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    app: str | None = None,
    json: bool = False,
    server: ServerFlags = SERVER,
) -> int:
    """Enqueue a job and print its id.

    With an app the payload is checked against the type of the kind's handler, which names the queue, too. Without one,
    --queue is needed and any JSON object will do.

    Args:
        kind: The kind, such as invoice.send.
        payload: A JSON object; - reads it from standard input.
        queue: Another queue than the handler's.
        priority: high, normal, low, or a number (up to 50 high, up to 150 normal).
        delay: Seconds to wait first.
        expires_in: Seconds from now on; from then on it never starts, and ends as expired.
        key: While this key is remembered, enqueueing again gives the earlier job's id.
        count: Enqueue so many, each with an id of its own.
        app: module:attribute of the app whose handlers check the payload.
        json: One JSON object per line, with id and new.
    """
    _refuse_nonsense(key, count, delay, expires_in, held)
    settings, keys = server.settings(app=app), None
    text = _stdin() if payload == "-" else payload.encode()
    if settings.app is not None:
        server.export()
        known = load_app(settings)
        settings, keys = with_own(settings, known), known.encryption
        kind, queue, raw = checked_payload(known, kind, queue, text)
    else:
        kind, queue, raw = checked_payload(None, kind, queue, text)
    job = Job(
        id="", queue=queue, kind=kind, payload=raw, level=level_named(priority), created_at=datetime.now(UTC),
        delay=delay if held.debounce is None else held.debounce, expires_in=expires_in, key=key, unique=held.until,
        replace=held.replace or held.debounce is not None, debounce=held.debounce, debounce_max=held.debounce_max,
    )  # fmt: skip
    anyio.run(_enqueue, App[Any](settings=settings, encryption=keys), job, count, json)
    return 0


def _row(answer: Enqueued) -> dict[str, str | bool]:
    row: dict[str, str | bool] = {"id": answer.id, "new": answer.new}
    return row if answer.replaced is None else {**row, "replaced": answer.replaced}


def _refuse_nonsense(
    key: str | None, count: int, delay: float | None, expires_in: float | None, held: HeldFlags
) -> None:
    held.check(key, delay)
    if key is not None and count > 1:
        raise UsageError("--key makes all jobs the same and --count wants many: leave one of them out")
    if key == "":
        raise UsageError("--key is empty and would make every job the same: leave it out or give it a value")
    if expires_in is not None and delay is not None and expires_in <= delay:
        raise UsageError("--expires-in ends before --delay: no run would ever start")


async def _enqueue(app: App[Any], job: Job, count: int, json: bool) -> None:
    report = Report()  # who reads one id with `| head` wants all the jobs nevertheless
    async with app:
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            jobs = [msgspec.structs.replace(job, id=codec.new_id()) for _ in range(size)]
            for answer in await app.enqueue_many(jobs):
                if json:
                    report.write(json_line(_row(answer)))
                else:
                    note = "" if answer.new else " (enqueued before)"
                    report.write(answer.id + (" (replaced)" if answer.replaced else note) + "\n")
    report.end()


def _stdin() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise UsageError(f"standard input cannot be read: {error.strerror or error}") from None


def level_named(priority: str) -> Level:
    """The level of a word or a number.

    Raises:
        UsageError: it is none.
    """
    try:
        return codec.level_of(int(priority) if _NUMBER.fullmatch(priority) else priority)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _checked(app: App[Any], kind: str, queue: str | None, text: bytes) -> tuple[str, str, msgspec.Raw]:
    """(kind, queue, payload) as the handler's type has them."""
    registration = app.handler_of(kind, "")
    if registration is None:
        kinds = [each.kind for each in app.registrations]
        near = difflib.get_close_matches(kind, kinds, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(kinds)) or 'none at all'}"
        raise UsageError(f"the app has no handler for the kind {kind!r}; {hint}")
    try:
        value = registration.decode(msgspec.Raw(text))
    except Exception as error:  # noqa: BLE001 - the user's own hooks run here
        type_ = registration.payload
        raise InvalidJob(f"the payload is no {type_.__name__}: {codec.misfit(type_, error)}") from None
    return registration.kind, queue or registration.queue, codec.encode_payload(value)


def checked_payload(
    app: App[Any] | None, kind: str, queue: str | None, text: bytes, *, lenient: bool = False
) -> tuple[str, str, msgspec.Raw]:
    """(kind, queue, payload) of a job.

    Args:
        app: its handler of the kind checks the payload; ``None`` where no app is known.
        kind: as it was typed.
        queue: ``None`` for that of the handler.
        text: the payload.
        lenient: a kind that the app does not know is let through, if its queue is named.

    Raises:
        UsageError: the kind is not known, or its queue.
        InvalidJob: the payload is none.
    """
    if app is not None and not (lenient and queue is not None and app.handler_of(kind, "") is None):
        return _checked(app, kind, queue, text)
    where, raw = _unchecked(kind, queue, text)
    return kind, where, raw


def _unchecked(kind: str, queue: str | None, text: bytes) -> tuple[str, msgspec.Raw]:
    """(queue, payload), of which only the shape is known."""
    if queue is None:
        raise UsageError("name the --queue, or the --app (STREAMWORKER_APP) whose handler knows it")
    if not KIND_NAME.fullmatch(kind):
        raise UsageError(f"{kind!r} is no kind: use 1 to 200 characters without white space")
    try:
        text.decode()  # msgspec looks at the inside of no Raw
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        return queue, msgspec.Raw(msgspec.json.format(text, indent=-1))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJob(f"the payload must be a JSON object: {error}") from None
