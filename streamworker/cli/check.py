"""``streamworker check``: everything that loses jobs, before it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import anyio
import msgspec

from streamworker import wiring
from streamworker.app import App
from streamworker.broker import Finding, Operator
from streamworker.cli.app_loader import load_app, with_own
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.cli.output import json_line
from streamworker.cli.streams import Report
from streamworker.errors import ConfigurationError, StreamworkerError
from streamworker.redact import printable
from streamworker.settings import EMBEDDED, Settings

SAMPLE: Final = 1000
"""Jobs whose kinds are looked at."""
_SIGNS: Final = {"ok": "ok", "warning": "warn", "error": "FAIL"}


def check(app: str | None = None, *, json: bool = False, flags: WorkerFlags = WORKER) -> int:
    """Check settings, handlers and the server for everything that loses jobs; exits with 1 if there is an error.

    Args:
        app: module:attribute, as for the worker; without one the handlers are not checked.
        json: One JSON object per line, for programs.
    """
    found = _everything(app, flags)
    report = Report()  # the exit code is right although `| head` reads only the first lines
    for finding in found:
        if json:
            report.write(json_line(msgspec.structs.asdict(finding)))
        else:
            sentence = printable(finding.sentence)
            report.write(f"{_SIGNS[finding.severity]:<4}  {finding.subject:<11}  {sentence}\n")
    report.end()
    return int(any(finding.severity == "error" for finding in found))


def _everything(app: str | None, flags: WorkerFlags) -> list[Finding]:
    """Every error is a finding here, and ends the check where nothing more can be seen without it."""
    try:
        settings = flags.settings(app=app)
        flags.export()
    except StreamworkerError as error:
        return [Finding("error", "settings", line) for line in str(error).splitlines()]
    found = [Finding("warning", "settings", warning) for warning in settings.warnings]
    found = found or [Finding("ok", "settings", "every variable is known and right")]
    loaded: App[Any] | None = None
    if settings.app is None:
        found.append(Finding("warning", "app", "no app is named (STREAMWORKER_APP): the handlers are not checked"))
    else:
        try:
            loaded = load_app(settings)
            settings = with_own(settings, loaded)
            count = len(loaded.registrations)
            found.append(
                Finding("ok", "app", f"{settings.app} has {count} handlers")
                if count
                else Finding(
                    "error", "app", f"{settings.app} has no handler: is the module that registers them imported?"
                )
            )
        except StreamworkerError as error:
            found.append(Finding("error", "app", str(error)))
    try:
        found += anyio.run(_server, settings, loaded)
    except StreamworkerError as error:
        found.append(Finding("error", "server", str(error)))
    if settings.database_url is not None:
        looked = anyio.run(wiring.examine, settings, settings.database_url)
        found += looked
        if settings.ledger != "off" and not any(
            each.severity == "error" or each.subject == "ledger" for each in looked
        ):
            found += anyio.run(_pair, settings, settings.database_url)
    elif settings.redis_url != EMBEDDED:
        found.append(Finding("ok", "postgresql", "none is named (DATABASE_URL): there is no ledger"))
    return found


async def _server(settings: Settings, app: App[Any] | None) -> list[Finding]:
    root: App[Any] = App(settings=settings)
    async with root.operator(settings) as operator:
        ours = [spec.name for spec in settings.queues] or (app.queues if app is not None else [])
        try:
            there, found = await operator.queues(), []
        except ConfigurationError:  # workers need not see the names of all keys
            there = []
            found = [Finding("warning", "queues", "this user may not SCAN: only the app's queues were looked at")]
        found += await operator.findings(list(dict.fromkeys([*ours, *there])))
        if app is not None:
            found += await _kinds(operator, app, ours)
            found += await _schedules(operator, app, settings)
            unserved = sorted({registration.queue for registration in app.registrations} - set(ours))
            if unserved:
                what = ", ".join(unserved)
                found.append(
                    Finding("warning", "queues", f"the app has handlers for {what}, which STREAMWORKER_QUEUES lacks")
                )
    return found


async def _pair(settings: Settings, database_url: str) -> list[Finding]:
    """Whether the ledger is the one of this Redis."""
    try:
        async with App[Any](settings=settings).operator(settings) as operator:
            working = any(worker.alive for worker in await operator.workers(await operator.queues()))
    except StreamworkerError:  # it does not answer, which is a finding already, or this user may not SCAN
        working = False
    return await wiring.examine_pair(settings, database_url, working=working)


async def _schedules(operator: Operator, app: App[Any], settings: Settings) -> list[Finding]:
    """Schedules kept as data whose jobs no handler of the app runs, or whose names are those of schedules in code."""
    schedules = app.schedules_of(operator, settings)
    ours, unknown, twice = {each.name for each in schedules}, [], []
    try:
        async for state in schedules.list():
            unknown += [f"{state.stored.name} ({state.stored.kind})"] if state.known is False else []
            twice += [state.stored.name] if state.stored.name in ours else []
    except StreamworkerError as error:
        return [Finding("warning", "schedules", str(error))]
    found = []
    if unknown:
        what = ", ".join(unknown[:5])
        sentence = (
            f"{len(unknown)} schedules are of kinds that the app has no handler for: {what}; add one, or remove them"
        )
        found.append(Finding("error", "schedules", sentence))
    if twice:
        sentence = f"schedules of these names are both in code and data, and both tick: {', '.join(twice[:5])}"
        found.append(Finding("warning", "schedules", sentence))
    return found


async def _kinds(operator: Operator, app: App[Any], queues: Sequence[str]) -> list[Finding]:
    """Jobs that no handler of the app will ever run."""
    found = []
    try:
        sample = await operator.waiting(queues, SAMPLE)
    except ConfigurationError as error:
        return [Finding("warning", "handlers", f"the kinds that wait could not be looked at: {error}")]
    for waiting in sample:
        if app.handler_of(waiting.kind, waiting.queue) is not None:
            continue
        kind = f"the kind {waiting.kind!r}" if waiting.kind else "jobs without a kind"
        found.append(
            Finding(
                "warning" if waiting.place == "dead" else "error",
                "handlers",
                f"{waiting.count} {waiting.place} jobs of {waiting.queue}: the app has no handler for {kind}; add one, "
                "or an alias to its payload",
            )
        )
    return found or [Finding("ok", "handlers", "every kind that waits has a handler")]
