"""The ledger's slow loop: notes jobs that run for longer than a second, and lets the ledger tidy up."""

from __future__ import annotations

from collections.abc import Callable, Collection
from time import monotonic, time
from typing import Final

import anyio

from streamworker.bookkeeping.recorder import begun
from streamworker.errors import Unreachable
from streamworker.postgres import Effect, Ledger
from streamworker.run import Run
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

LONG: Final = 1.0
"""Seconds after which a run is noted as running."""
INTERVAL: Final = 0.5
TIDY_PAUSE: Final = 30.0
"""Seconds before tidying is tried again after an error."""


class Noting:
    """Ticks until closed.

    Args:
        ledger: told.
        running: the runs whose handlers are at work.
    """

    def __init__(self, ledger: Ledger, running: Callable[[], Collection[Run]]) -> None:
        self._ledger = ledger
        self._running = running
        self._noted: set[Run] = set()
        self._stop = anyio.Event()
        self._logged = ""
        self._tidy_at = monotonic() + INTERVAL

    def close(self) -> None:
        """End the loop."""
        self._stop.set()

    async def run(self) -> None:
        """Note and tidy; what goes wrong here is tried again, and disturbs nobody."""
        while not self._stop.is_set():
            with anyio.move_on_after(INTERVAL):
                await self._stop.wait()
                return
            try:
                await self._note()
                self._logged = ""
            except Unreachable:
                continue  # the recorder and the lookup say so
            except Exception as error:  # noqa: BLE001 - a main loop never crashes
                if str(error) != self._logged:
                    log.error("noting_failed", error=str(error))
                self._logged = str(error)
            await self._tidy()

    async def _note(self) -> None:
        running = self._running()
        self._noted.intersection_update(running)
        long_ago = monotonic() - LONG
        # A run in its own transaction holds its record: waiting for that would only hold up the others.
        new = [
            run
            for run in running
            if run.started is not None
            and run.started < long_ago
            and run not in self._noted
            and (run.context is None or run.context.effect is not Effect.OPEN)
        ]
        if new:
            begun_at = time() - monotonic()
            for run in new:
                run.new = False  # whatever comes of this
            await self._ledger.running([begun(run, begun_at) for run in new])
            self._noted.update(new)

    async def _tidy(self) -> None:
        if monotonic() < self._tidy_at:
            return
        try:
            seconds = await self._ledger.tick()
        except Unreachable:
            seconds = TIDY_PAUSE
        except Exception as error:  # noqa: BLE001 - pruning is never urgent
            log.error("pruning_failed", error=str(error))
            seconds = TIDY_PAUSE
        self._tidy_at = monotonic() + seconds
