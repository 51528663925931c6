"""Whether PostgreSQL is down: said once when it goes, and once when it is back. While it is, nothing is claimed."""

from __future__ import annotations

from time import monotonic

from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")


class Outage:
    """One worker's view of its database."""

    def __init__(self) -> None:
        self._since: float | None = None

    def is_on(self) -> bool:
        """The last question was not answered."""
        return self._since is not None

    def began(self, error: Exception) -> None:
        """A question was not answered."""
        if self._since is None:
            self._since = monotonic()
            log.error(
                "ledger_down",
                error=str(error),
                hint="nothing is claimed until PostgreSQL is back; finished jobs are kept until they are recorded",
            )

    def over(self) -> None:
        """A question was answered."""
        if self._since is not None:
            log.info("ledger_back", seconds=round(monotonic() - self._since, 1))
            self._since = None
