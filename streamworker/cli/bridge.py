"""``streamworker bridge``: out of lists, into streams."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Final, TextIO, cast

import anyio
from rich import text
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live

from streamworker.app import App
from streamworker.bridge import BridgeLoop, BridgeTotals
from streamworker.cli.app_loader import load_app, with_own
from streamworker.cli.options import SERVER, QueueNames, ServerFlags, Text
from streamworker.cli.output import json_line
from streamworker.cli.streams import Report
from streamworker.errors import StreamworkerError, UsageError
from streamworker.redact import printable
from streamworker.settings import Settings
from streamworker.telemetry import logs
from streamworker.views.rows import age
from streamworker.worker import signals

log = logs.get_logger("streamworker.bridge")

LOOK: Final = 0.25
"""Seconds between two pictures on a terminal."""
TELL: Final = 5.0
"""Seconds between two lines of progress elsewhere."""


def bridge(
    app: str | None = None,
    *,
    queue: QueueNames = (),
    all: bool = False,  # noqa: A002
    drain: bool = False,
    json: bool = False,
    lease: Text = None,
    server: ServerFlags = SERVER,
) -> int:
    """Move jobs from the lists queue:NAME, queue:NAME:high and queue:NAME:low into the streams of that queue and level.

    Runs beside workers, producers and other bridges until SIGTERM or Ctrl-C. Each batch is moved atomically, oldest
    first, and bytes are not touched: killed at any moment, it loses nothing and moves nothing twice.

    Args:
        app: module:attribute, such as shop.jobs:app: moves the lists of its queues.
        queue: Only this queue; may be given several times. Else STREAMWORKER_QUEUES, else the app's.
        all: Every list that is named like a queue's, also those that come later; but no list that looks like another
            program's processing list, such as queue:q:processing. Those are named in the log.
        drain: End when nothing is left in the lists, and no worker of list mode holds a job.
        json: One JSON object per line with the progress, the totals last.
        lease: Seconds after which jobs of a dead worker of list mode are taken back; the same as the workers'.
    """
    signals.exit_until_watched()
    settings = server.settings(app=app, lease=lease)
    queues, settings = _chosen(settings, queue, all)
    return anyio.run(_run, settings, queues, all, drain, json)


def _chosen(settings: Settings, named: Sequence[str], everything: bool) -> tuple[list[str], Settings]:
    """(queues that were named here, by the settings or by the app; the settings, with what the app sets in Python).

    Raises:
        UsageError: it is not said which, or twice.
        ConfigurationError: the app cannot be loaded.
    """
    if named and everything:
        raise UsageError("--queue and --all contradict each other: keep one of them")
    loaded = load_app(settings) if settings.app is not None else None
    if loaded is not None:
        settings = with_own(settings, loaded)
    queues = [*named] or [spec.name for spec in settings.queues] or (loaded.queues if loaded is not None else [])
    if not queues and not everything:
        raise UsageError("say whose lists to move: --queue NAME, STREAMWORKER_QUEUES, an app with handlers, or --all")
    return list(dict.fromkeys(queues)), settings


async def _run(settings: Settings, queues: list[str], everything: bool, drain: bool, json: bool) -> int:
    async with App[Any](settings=settings).bridge(None if everything else queues, settings, known=queues) as mover:
        bridging = BridgeLoop(mover, drain=drain)
        progress = _Progress(bridging.totals, settings, json=json)
        async with anyio.create_task_group() as group:
            told: list[int] = []

            def stop(number: int) -> None:
                """The first signal ends the bridge after the batch in flight, the second at once."""
                told.append(number)
                log.info("bridge_stopping", signal=signal.Signals(number).name)
                bridging.stop()
                if len(told) > 1:
                    group.cancel_scope.cancel()

            await group.start(signals.watch, stop)
            log.info("bridge_ready", queues="all" if everything else queues)
            async with progress.shown():
                await bridging.run()
            group.cancel_scope.cancel()
    progress.end()
    if len(told) > 1:
        return 128 + told[-1]
    if drain and not told:
        _all_moved(bridging.totals)
    return 0


def _all_moved(tally: BridgeTotals) -> None:
    """Complain of jobs that a drained bridge had to leave.

    Raises:
        StreamworkerError: there are any.
    """
    stuck = {spot: left for spot, left in tally.left.items() if left and spot in tally.stuck}
    if stuck:
        where = ", ".join(sorted({queue for queue, _ in stuck}))
        raise StreamworkerError(
            f"{sum(stuck.values())} jobs of {where} could not be moved and are where they were: the log says why"
        )


class _Progress:
    """A live line on a terminal, now and then a line of the log or of JSON elsewhere; totals at the end."""

    def __init__(self, tally: BridgeTotals, settings: Settings, *, json: bool) -> None:
        self._tally = tally
        self._settings = settings
        self._json = json
        self._started = monotonic()
        self._mark = (self._started, 0)
        self._rate = 0.0
        self._told: dict[str, Any] = {}
        self._report = Report()

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Tell while the body runs."""
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        async with anyio.create_task_group() as group:
            if console.is_terminal and not self._json:
                group.start_soon(self._live, console)
            else:
                group.start_soon(self._lines)
            yield
            group.cancel_scope.cancel()

    def end(self) -> None:
        """Tell the totals."""
        seconds = monotonic() - self._started
        if self._json:
            rate = round(self._tally.jobs / max(seconds, 0.001), 1)
            self._report.write(json_line({"state": "ended", **self._facts(), "per_s": rate, "seconds": seconds}))
        else:
            self._report.write(f"moved {self._amount()} in {age(seconds)}\n")
        self._report.end()

    async def _live(self, console: Console) -> None:
        settings = self._settings
        # Lines of the log go above the picture instead of into it.
        logs.configure(settings.log_level, settings.log_format, cast("TextIO", FileProxy(console, sys.stderr)))
        try:
            with Live(console=console, auto_refresh=False, transient=True, redirect_stderr=False) as live:
                while True:
                    live.update(text.Text(self._sentence()), refresh=True)
                    await anyio.sleep(LOOK)
        finally:
            logs.configure(settings.log_level, settings.log_format)

    async def _lines(self) -> None:
        while True:
            await anyio.sleep(TELL)
            facts = self._facts()
            news = {name: facts[name] for name in ("moved", "waiting", "stuck")}
            if news == self._told:  # an idle bridge is silent
                continue
            self._told = news
            if self._json:
                self._report.write(json_line({"state": "running", **facts}))
                self._report.flush()
            else:
                log.info("bridge_progress", **facts)

    def _facts(self) -> dict[str, Any]:
        tally = self._tally
        return {
            "moved": tally.jobs,
            "bytes": tally.bytes,
            "per_s": round(self._pace(), 1),
            "waiting": sum(tally.left.values()),
            "stuck": sorted({queue for queue, _ in tally.stuck}),
        }

    def _pace(self) -> float:
        """Jobs a second, of the last second or more."""
        (at, jobs), now = self._mark, monotonic()
        if now - at >= 1.0:
            self._rate, self._mark = (self._tally.jobs - jobs) / (now - at), (now, self._tally.jobs)
        return self._rate

    def _sentence(self) -> str:
        facts = self._facts()
        stuck = f", stuck: {printable(', '.join(facts['stuck']))}" if facts["stuck"] else ""
        return f"moved {self._amount()}, {facts['per_s']:,.0f}/s, {facts['waiting']:,} waiting{stuck} (Ctrl-C ends)"

    def _amount(self) -> str:
        jobs = self._tally.jobs
        return f"{jobs:,} job{'' if jobs == 1 else 's'} ({self._tally.bytes / 1e6:,.1f} MB)"
