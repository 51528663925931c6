"""/healthz, /readyz and /metrics of one worker (``STREAMWORKER_HTTP``), answered by a thread of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Final, Literal, NamedTuple, TypeAlias

import anyio
import msgspec
import orjson

from streamworker.broker import Connected
from streamworker.observe import Observer
from streamworker.redact import redact
from streamworker.settings import Settings
from streamworker.telemetry.http import Answer, HttpThread, Route
from streamworker.worker.fetcher import Fetcher
from streamworker.worker.host import Relays
from streamworker.worker.inflight import InFlight
from streamworker.worker.lease import LeaseKeeper
from streamworker.worker.metrics import MetricsEndpoint


class Inherited(NamedTuple):
    """What a worker gets from the supervisor that started it.

    Attributes:
        listener: the socket that listens at ``STREAMWORKER_HTTP``, shared by the generations of a worker; ``None``: the
            worker makes its own.
        succeeds: another worker runs, and answers there until this one is ready.
    """

    listener: socket.socket | None = None
    succeeds: bool = False


ASK: Final = 0.5
"""Seconds between two questions to the event loop whether it turns."""
LEDGER_AWAY: Final = "PostgreSQL does not record: nothing is claimed until it does"


class Health:
    """Serves a worker's health; does nothing where ``STREAMWORKER_HTTP`` is off.

    Args:
        settings: the worker's.
        worker_id: part of every answer.
        stopping: set when the worker drains.
        metrics: answers scrapes; ``None`` without ``STREAMWORKER_HTTP``.
        listener: the socket to listen with; ``None`` makes one.
    """

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        stopping: anyio.Event,
        metrics: MetricsEndpoint | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self._metrics = metrics
        self._lease_seconds = settings.lease
        self._worker_id = worker_id
        self._stopping = stopping
        self._fetcher: Fetcher | None = None
        self._lease: LeaseKeeper | None = None
        self._relay: Relays | None = None
        self.stuck: str | None = None
        """What will not end although it was told to, in a sentence."""
        self._turned = monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        routes: dict[str, Route] = {
            "/healthz": self._route(not_alive),
            "/readyz": self._route(not_ready),
        }
        tasks = [self._ask_the_loop]
        if metrics is not None:
            routes["/metrics"] = metrics.answer
            tasks.append(metrics.look)
        self._http = HttpThread(settings.http, routes, tasks, listener) if settings.http is not None else None

    def open(self) -> None:
        """Start to answer, unless it does; call it on the worker's event loop.

        Raises:
            ConfigurationError: the address cannot be listened on.
        """
        if self._http is not None and self._loop is None:
            self._loop, self._turned = asyncio.get_running_loop(), monotonic()
            self._http.open()

    @property
    def observers(self) -> tuple[Observer, ...]:
        """The observer of the metrics, if there are any."""
        return (self._metrics.observer,) if self._metrics is not None else ()

    def watch(
        self, fetcher: Fetcher, lease: LeaseKeeper, in_flight: InFlight, broker: Connected, relay: Relays
    ) -> None:
        """The groups are joined: answers show the state of these from now on."""
        self._fetcher, self._lease, self._relay = fetcher, lease, relay
        if self._metrics is not None:
            self._metrics.watch(in_flight, lease, broker, relay)

    async def hand_over(self) -> None:
        """Leave requests to the worker that listens with the same socket; those that are there are answered first."""
        if self._http is not None:
            await self._http.hand_over()

    def close(self) -> None:
        """Answer no more."""
        if self._metrics is not None:
            self._metrics.end()
        if self._http is not None:
            self._http.close()

    def close_in_forked_child(self) -> None:
        """Let go of the port; called in a process that a handler forked."""
        if self._http is not None:
            self._http.close_in_forked_child()

    def vitals(self) -> Vitals:
        """How the worker is right now; may be called from any thread."""
        now, fetcher, lease = monotonic(), self._fetcher, self._lease
        silent = max(0.0, now - self._turned - ASK)
        if fetcher is None or lease is None:
            return Vitals(phase="starting", lease=self._lease_seconds, loop_silent=silent)
        asking, renewed = fetcher.asking_since, lease.renewed_at
        barred = self._relay.trouble if self._relay is not None else None
        return Vitals(
            phase="draining" if self._stopping.is_set() else "working",
            lease=self._lease_seconds,
            loop_silent=silent,
            asking=now - asking if asking is not None else 0.0,
            claim_trouble=fetcher.trouble,
            renewed=now - renewed if renewed is not None else None,
            renewal_trouble=lease.trouble,
            stuck=self.stuck,
            away=(LEDGER_AWAY,) if fetcher.shut else (barred,) if barred is not None else (),
        )

    def _route(self, judge: Callable[[Vitals], str | None]) -> Route:
        async def answer(_: str) -> Answer:
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


LEAST_SILENCE: Final = 5.0
"""Seconds the event loop may stand still in any case, however short the lease is."""
LEAST_WAIT: Final = 30.0
"""Seconds claims may fail in any case before that is no passing trouble."""

Phase: TypeAlias = Literal["starting", "working", "draining"]


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """One worker at one moment.

    Attributes:
        phase: before its groups are joined, after that, after it was told to stop.
        lease: seconds.
        loop_silent: seconds since the event loop last answered.
        asking: seconds since the first of the claims that were made and have not succeeded; 0 without one.
        claim_trouble: why the last claim failed, or ``None``.
        renewed: seconds since the lease thread last reached the server; ``None`` before its first success.
        renewal_trouble: why its last call failed, or ``None``.
        away: one sentence per other server that does not answer, or is not the one it has to be.
        stuck: what will not end although it was told to, in a sentence.
    """

    phase: Phase
    lease: float
    loop_silent: float = 0.0
    asking: float = 0.0
    claim_trouble: str | None = None
    renewed: float | None = None
    renewal_trouble: str | None = None
    away: tuple[str, ...] = ()
    stuck: str | None = None


def not_alive(vitals: Vitals) -> str | None:
    """Why a restart would help; ``None`` while the loop turns and claims succeed, or fail for want of a server.

    Args:
        vitals: the worker, now.
    """
    if vitals.stuck is not None:
        return vitals.stuck
    if vitals.loop_silent > max(LEAST_SILENCE, vitals.lease):
        return f"the event loop has not turned for {vitals.loop_silent:.0f} s: a handler blocks it"
    if vitals.phase != "working" or vitals.asking <= max(LEAST_WAIT, 2 * vitals.lease):
        return None
    if vitals.renewal_trouble is not None or not _recent(vitals):
        return None  # the lease thread has a connection of its own: it is the server that is away
    trouble = f": {vitals.claim_trouble}" if vitals.claim_trouble else ""
    return f"no claim has succeeded for {vitals.asking:.0f} s although Redis answers{trouble}"


def not_ready(vitals: Vitals) -> str | None:
    """Why this worker cannot take jobs right now, or ``None``.

    Args:
        vitals: the worker, now.
    """
    if vitals.phase == "starting":
        return "starting: its groups are not joined yet"
    if vitals.phase == "draining":
        return "draining: it takes no more jobs"
    if (trouble := vitals.renewal_trouble or vitals.claim_trouble) is not None:
        return trouble
    if not _recent(vitals):
        return f"Redis has not answered for {vitals.renewed:.0f} s" if vitals.renewed is not None else "no lease yet"
    return vitals.away[0] if vitals.away else not_alive(vitals)


def _recent(vitals: Vitals) -> bool:
    return vitals.renewed is not None and vitals.renewed <= vitals.lease
