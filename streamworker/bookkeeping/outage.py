"""Whether the ledger fails: logged once when it begins, and once when it is over. Meanwhile nothing is claimed."""

from __future__ import annotations

from time import monotonic
from typing import Literal, TypeAlias

from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

Part: TypeAlias = Literal["lookup", "record"]
"""What the ledger is asked for. A database that answers lookups may still refuse records: a standby, a full disk."""


class Outage:
    """One worker's view of its ledger."""

    def __init__(self) -> None:
        self._since = 0.0
        self._failing: set[Part] = set()

    def is_on(self) -> bool:
        """Whether the last lookup or the last record failed."""
        return bool(self._failing)

    def began(self, part: Part, error: Exception) -> None:
        """It failed, and no single row is to blame."""
        if not self._failing:
            self._since = monotonic()
            log.error(
                "ledger_down",
                error=str(error),
                hint="nothing is claimed until PostgreSQL records again; finished jobs are kept until then",
            )
        self._failing.add(part)

    def over(self, part: Part) -> None:
        """It worked."""
        if part in self._failing:
            self._failing.discard(part)
            if not self._failing:
                log.info("ledger_back", seconds=round(monotonic() - self._since, 1))
