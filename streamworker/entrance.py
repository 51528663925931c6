"""What a special run has to pass before its handler is called: suspects run alone, limited kinds wait their turn."""

from __future__ import annotations

from collections.abc import Callable, Collection

from streamworker.gate import Gate
from streamworker.handlers import Handlers
from streamworker.job import Claim
from streamworker.limits import Limiting
from streamworker.run import Run


class Entrance:
    """Asked by the slots about runs that are `Run.special`; costs nothing where there are none.

    Args:
        broker: knows about limits.
        handlers: whether any kind has one.
        isolate: asked before a suspect runs; False puts it aside for later.
        put: hands a run back to the slots.
        finished: told of runs that have an outcome without having run.
    """

    def __init__(
        self,
        broker: Limiting,
        handlers: Handlers[object],
        *,
        isolate: Callable[[Run], bool],
        put: Callable[[Run], None],
        finished: Callable[[Run], None],
    ) -> None:
        self._isolate = isolate
        limited = any(registration.quota is not None for registration in handlers.registrations)
        self._gate = Gate(broker, put, finished) if limited else None
        self.kept: Callable[[Collection[Claim]], None] | None = self._gate.retain if self._gate is not None else None
        """What the lease thread renews along with claims."""

    def may_run(self, run: Run) -> bool:
        """Whether a prepared special run may run now; if not, it waits here or elsewhere, and comes again."""
        if run.suspect and not self._isolate(run):
            return False
        return self._gate is None or self._gate.may_run(run)

    def leave(self, run: Run) -> None:
        """A special run has its outcome."""
        if self._gate is not None:
            self._gate.leave(run)

    def abandon_waiting(self) -> list[Run]:
        """Runs that wait here; they do not wait any more afterwards."""
        return self._gate.abandon_waiting() if self._gate is not None else []

    async def run(self) -> None:
        """Run until closed."""
        if self._gate is not None:
            await self._gate.run()

    def close(self, within: float) -> None:
        """End it when all is given back, at the latest in ``within`` seconds."""
        if self._gate is not None:
            self._gate.close(within)
