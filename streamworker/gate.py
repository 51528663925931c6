"""The gate between decoding and running, for kinds with limits: asks the broker who may run now, and gives holds back.

Group commit, as in the settle loop: while one question is on its way the next gathers. Kinds without limits never come
here, and without any such kind there is no gate.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Collection
from time import time
from typing import Any, Final

import anyio
import msgspec

from streamworker import codec
from streamworker.errors import Unreachable
from streamworker.job import Claim, Deferred
from streamworker.limits import Answer, Asking, Hold, Limit, Limiting, Quota
from streamworker.pause import Pause
from streamworker.run import Run
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

MOST: Final = 200
"""Most jobs of one question."""
LONGEST_VALUE: Final = 100
"""Characters of a value in the name of a key; longer ones stand there as a digest."""


class Gate:
    """Lets runs of kinds with limits through when it is their turn.

    Args:
        broker: asked.
        put: starts a run that may run.
        finished: told of runs that have an outcome: it is not their turn yet.
    """

    def __init__(self, broker: Limiting, put: Callable[[Run], None], finished: Callable[[Run], None]) -> None:
        self._broker = broker
        self._put = put
        self._finished = finished
        self._asking: dict[Run, Asking] = {}
        self._leaving: list[Hold] = []
        self._holds: dict[tuple[str, bytes], Hold] = {}
        self._wake = asyncio.Event()
        self._closing = anyio.Event()
        self._give_up_at = float("inf")

    def may_run(self, run: Run) -> bool:
        """Whether this prepared run has got its turn; if not, it waits here until it gets an answer."""
        if run.passed:
            return True
        asking = asking_of(run)
        if asking is None:
            return True
        self._asking[run] = asking
        self._wake.set()
        return False

    def leave(self, run: Run) -> None:
        """The run has ended: its place is free. A thread that still runs keeps it until it lapses."""
        hold = self._holds.pop((run.claim.place, run.claim.entry), None)
        if hold is not None and not run.in_thread:
            self._leaving.append(hold)
            self._wake.set()

    def retain(self, claims: Collection[Claim]) -> None:
        """Renew what is held by runs of these claims; from the lease thread, after their leases."""
        find = self._holds.get
        holds = [hold for claim in claims if (hold := find((claim.place, claim.entry))) is not None]
        if holds:
            self._broker.retain(holds)

    def abandon_waiting(self) -> list[Run]:
        """Runs that wait for an answer; they do not wait any more afterwards."""
        waiting = list(self._asking)
        self._asking = {}
        return waiting

    def close(self, within: float) -> None:
        """End the loop when every hold is given back, at the latest in ``within`` seconds."""
        self._give_up_at = anyio.current_time() + within
        self._closing.set()
        self._wake.set()

    async def run(self) -> None:
        """Ask until closed; an error is followed by a pause, and the question asked again."""
        pause = Pause(longest=5.0)
        while True:
            if not self._asking and not self._leaving:
                if self._closing.is_set():
                    return
                await self._wake.wait()
                self._wake.clear()
                continue
            try:
                await self._turn()
                pause.reset()
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; what waits is asked about again
                if not isinstance(error, Unreachable):
                    log.error("limits_failed", jobs=len(self._asking), error=str(error))
                await pause.wait(self._closing, least=0.2)
            if anyio.current_time() > self._give_up_at:
                return

    async def _turn(self) -> None:
        """One question, of one queue."""
        first = self._leaving[0].limit if self._leaving else next(iter(self._asking.values())).limit
        leaving = [hold for hold in self._leaving if hold.limit.queue == first.queue][:MOST]
        asking = [(run, each) for run, each in self._asking.items() if each.limit.queue == first.queue][:MOST]
        answers = await self._broker.limit(first.queue, [each for _, each in asking], leaving)
        given = set(leaving)
        self._leaving = [hold for hold in self._leaving if hold not in given]
        for (run, _), answer in zip(asking, answers, strict=True):
            self._answer(run, answer)

    def _answer(self, run: Run, answer: Answer) -> None:
        mine = self._asking.pop(run, None) is not None  # else it was handed back meanwhile
        runs = mine and run.outcome is None  # else its claim was lost
        if answer.hold is not None and answer.hold.limit.concurrency:
            if runs:
                self._holds[run.claim.place, run.claim.entry] = answer.hold
            else:
                self._leaving.append(answer.hold)
        if runs and answer.hold is not None:
            run.passed = True
            self._put(run)
        elif mine:
            run.outcome = run.outcome or Deferred(time() + answer.wait, answer.turn, answer.member)
            self._finished(run)


def asking_of(run: Run) -> Asking | None:
    """What a prepared run has to ask; ``None`` if its kind has no limit."""
    registration, reading = run.registration, run.reading
    if registration is None or reading is None or registration.quota is None:
        return None
    quota = registration.quota
    name = limit_name(registration.kind, quota, run.payload)
    limit = Limit(run.claim.queue, name, quota.concurrency, quota.gap, quota.burst)
    return Asking(run.claim, limit, run.job_id, secrets.token_hex(4), codec.state_of(reading, run.claim.secret).turn)


def limit_name(kind: str, quota: Quota, payload: Any) -> str:
    """The end of the names of a limit's keys: the kind, and the value that it is limited by."""
    name = kind.replace("%", "%25").replace(":", "%3A")  # so that no kind can be another one with a value
    if not quota.limit_by:
        return name
    value = getattr(payload, quota.limit_by)
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if len(text) > LONGEST_VALUE or not text.isprintable():
        text = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{name}:{text}"
