"""What a special run has to pass before its handler is called.

Suspects run alone, kinds with limits wait for their turn, and those that are called for several jobs wait for others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from streamworker.batches import Batches, Carrier
from streamworker.gate import Gate
from streamworker.handlers import Handlers
from streamworker.job import Claim
from streamworker.limits import Limiting
from streamworker.run import Run


class Entrance:
    """Asked before a run starts that is `Run.special`; costs nothing where there are none.

    Args:
        broker: knows about limits.
        handlers: whether any kind has one, or is called for several jobs at once.
        limit: jobs that the worker runs at once.
        isolate: asked before a suspect runs; False puts it aside for later.
        put: starts a run.
        finished: told of runs that have an outcome without having run.
    """

    def __init__(
        self,
        broker: Limiting,
        handlers: Handlers[object],
        *,
        limit: int,
        isolate: Callable[[Run], bool],
        put: Callable[[Run], None],
        finished: Callable[[Run], None],
    ) -> None:
        self._isolate = isolate
        limited = any(registration.quota is not None for registration in handlers.registrations)
        gathering = any(registration.together is not None for registration in handlers.registrations)
        self._finished = finished
        self._gate = Gate(broker, put, finished) if limited else None
        self._batches = Batches(limit, put, finished) if gathering else None
        self.kept: Callable[[Collection[Claim]], None] | None = self._gate.retain if self._gate is not None else None
        """What the lease thread renews along with claims."""

    def may_run(self, run: Run) -> bool:
        """Whether a prepared special run may run now; if not, it waits here or elsewhere, and comes again."""
        if run.suspect and not self._isolate(run):
            return False
        if self._gate is not None and not self._gate.may_run(run):
            return False
        return self._batches is None or self._batches.may_run(run)

    def left(self, run: Run) -> bool:
        """A special run has its outcome. True if it stood for others, which are finished by that, each for itself."""
        if isinstance(run, Carrier):
            for item in run.disperse():
                self._finished(item)
            return True
        if self._gate is not None:
            self._gate.leave(run)
        return False

    def abandon_waiting(self) -> list[Run]:
        """Runs that wait here; they do not wait any more afterwards."""
        waiting = self._gate.abandon_waiting() if self._gate is not None else []
        return waiting + (self._batches.abandon_waiting() if self._batches is not None else [])

    async def run(self) -> None:
        """Run until closed."""
        if self._gate is not None:
            await self._gate.run()

    def close(self, within: float) -> None:
        """End it when all is given back, at the latest in ``within`` seconds."""
        if self._gate is not None:
            self._gate.close(within)
