"""/healthz, /readyz and /metrics of one worker (``STREAMWORKER_HTTP``), answered by a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Final

import anyio
import orjson

from streamworker.broker import Broker
from streamworker.claiming import Claimer
from streamworker.holdings import Holdings
from streamworker.lease import LeaseKeeper
from streamworker.metering import Metering
from streamworker.observe import Observer
from streamworker.redact import redact
from streamworker.settings import Settings
from streamworker.telemetry.http import Answer, HttpThread, Route
from streamworker.telemetry.vitals import Vitals, not_alive, not_ready

ASK: Final = 0.5
"""Seconds between two questions to the event loop whether it turns."""
LEDGER_AWAY: Final = "PostgreSQL does not record: nothing is claimed until it does"


class Health:
    """Serves a worker's health; does nothing where ``STREAMWORKER_HTTP`` is off.

    Args:
        settings: the worker's.
        worker_id: told with every answer.
        stopping: set when the worker drains.
        metering: answers scrapes; ``None`` where nobody shall.
    """

    def __init__(
        self, settings: Settings, worker_id: str, stopping: anyio.Event, metering: Metering | None = None
    ) -> None:
        self._metering = metering
        self._lease_seconds = settings.lease
        self._worker_id = worker_id
        self._stopping = stopping
        self._claimer: Claimer | None = None
        self._lease: LeaseKeeper | None = None
        self.stuck: str | None = None
        """What will not end although it was told to, in a sentence."""
        self._turned = monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        routes: dict[str, Route] = {
            "/healthz": self._route(not_alive),
            "/readyz": self._route(not_ready),
        }
        tasks = [self._ask_the_loop]
        if metering is not None:
            routes["/metrics"] = metering.answer
            tasks.append(metering.look)
        self._http = HttpThread(settings.http, routes, tasks) if settings.http is not None else None

    def open(self) -> None:
        """Start to answer; call it on the worker's event loop.

        Raises:
            ConfigurationError: the address cannot be listened on.
        """
        if self._http is not None:
            self._loop, self._turned = asyncio.get_running_loop(), monotonic()
            self._http.open()

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Who counts, where somebody may ask."""
        return (self._metering.observer,) if self._metering is not None else ()

    def watch(self, claimer: Claimer, lease: LeaseKeeper, holdings: Holdings, broker: Broker) -> None:
        """The groups are joined: from now on these tell how the worker is."""
        self._claimer, self._lease = claimer, lease
        if self._metering is not None:
            self._metering.watch(holdings, lease, broker)

    def close(self) -> None:
        """Answer no more."""
        if self._metering is not None:
            self._metering.end()
        if self._http is not None:
            self._http.close()

    def close_in_forked_child(self) -> None:
        """Let go of the port; called in a process that a handler forked."""
        if self._http is not None:
            self._http.close_in_forked_child()

    def vitals(self) -> Vitals:
        """How the worker is right now; may be called from any thread."""
        now, claimer, lease = monotonic(), self._claimer, self._lease
        silent = max(0.0, now - self._turned - ASK)
        if claimer is None or lease is None:
            return Vitals(phase="starting", lease=self._lease_seconds, loop_silent=silent)
        asking, renewed = claimer.asking_since, lease.renewed_at
        return Vitals(
            phase="draining" if self._stopping.is_set() else "working",
            lease=self._lease_seconds,
            loop_silent=silent,
            asking=now - asking if asking is not None else 0.0,
            claim_trouble=claimer.trouble,
            renewed=now - renewed if renewed is not None else None,
            renewal_trouble=lease.trouble,
            stuck=self.stuck,
            away=(LEDGER_AWAY,) if claimer.shut else (),
        )

    def _route(self, judge: Callable[[Vitals], str | None]) -> Route:
        async def answer() -> Answer:
            vitals = self.vitals()
            why = judge(vitals)
            told = {"ok": why is None, "phase": vitals.phase, "why": why and redact(why), "worker_id": self._worker_id}
            return Answer(200 if why is None else 503, orjson.dumps(told) + b"\n")

        return answer

    async def _ask_the_loop(self) -> None:
        while self._loop is not None:
            with suppress(RuntimeError):  # it is closed: then nothing turns any more
                self._loop.call_soon_threadsafe(self._answered)
            await asyncio.sleep(ASK)

    def _answered(self) -> None:
        self._turned = monotonic()
