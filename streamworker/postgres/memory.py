"""Steps, waits and parents of a job under test, kept in memory: the logic of `JobSteps` without its statements."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Final, NoReturn, Protocol, TypeVar

from streamworker.errors import ConfigurationError
from streamworker.postgres import RunRecord, SqlConnection, StepHost, StepMemory
from streamworker.postgres.steps import JobSteps, Kind, Remembered, encoded

T = TypeVar("T")

WORKER_ID: Final = "worker-test"


class Memory(Protocol):
    """What is remembered of a job between its runs, and what was sent to it; see `testing.JobMemory`."""

    @property
    def records(self) -> dict[int, StepMemory]:
        """Steps that runs have recorded, by their positions."""

    @property
    def signals(self) -> dict[str, Any]:
        """The data of signals, by their names."""

    @property
    def timed_out(self) -> set[str]:
        """Names of signals that did not come in time."""

    @property
    def parents(self) -> dict[str, Any]:
        """Results of the nodes before the job."""

    def now(self) -> float:
        """Epoch seconds, as the test counts them."""


class MemoryLedger:
    """`Ledger` of a handler under test: it has steps, waits and parents, and no PostgreSQL.

    Args:
        memory: of the job.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def steps(self, run: RunRecord, host: StepHost) -> MemorySteps:
        return MemorySteps(self._memory, run, host)

    def parents(self, _: RunRecord) -> MemoryParents:
        return MemoryParents(self._memory)

    def transaction(self, *_: Any) -> NoReturn:
        raise refused("ctx.transaction()")

    async def complete(self, *_: Any, **__: Any) -> NoReturn:
        raise refused("ctx.complete()")


def refused(what: str) -> ConfigurationError:
    """The error of what is not there without a database."""
    return ConfigurationError(
        f"{what} needs the PostgreSQL ledger: set DATABASE_URL, and run `streamworker migrate up` once; in tests, "
        "run the handler on servers (docs/testing.md)"
    )


class MemorySteps(JobSteps):
    """`Steps` in memory.

    Args:
        memory: of the job.
        run: of the job.
        host: the run's context.
    """

    _database: Any
    _pool: Any

    def __init__(self, memory: Memory, run: RunRecord, host: StepHost) -> None:
        nothing: Any = None
        super().__init__(nothing, nothing, run, WORKER_ID, host)
        self._memory = memory

    async def _read(self) -> dict[int, Remembered]:
        now = self._memory.now()
        return {
            position: Remembered(
                each.kind, each.name, each.value, each.until is not None and each.until <= now, each.until
            )
            for position, each in self._memory.records.items()
        }

    async def _record(
        self,
        position: int,
        kind: Kind,
        name: str,
        raw: str | None,
        *,
        started: float | None = None,  # noqa: ARG002 - no row has it
        until: float | None = None,
        connection: SqlConnection | None = None,  # noqa: ARG002
    ) -> float | None:
        moment = None if until is None else self._memory.now() + until
        self._memory.records[position] = StepMemory(kind, name, raw, moment)
        self.progressed = True
        return moment

    async def _signalled(self, name: str) -> Sequence[Any] | None:
        if name in self._memory.timed_out:
            return None, "true"
        signals = self._memory.signals
        return (encoded(f"the signal {name!r}", signals[name]), "false") if name in signals else None

    async def _ask(self, _: str, *values: Any) -> Sequence[Any]:
        """A wait may have timed out: the only statement that is left."""
        waits = self._memory.records[int(values[2])]
        if waits.until is not None and waits.until <= self._memory.now() and waits.name not in self._memory.signals:
            self._memory.timed_out.add(waits.name)
        return ()

    async def _call_in_transaction(self, *_: Any) -> NoReturn:
        raise refused("a step with transaction=")

    def _blocking_transaction(self, *_: Any) -> NoReturn:
        raise refused("a step with transaction=")

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return alone(work)


class MemoryParents:
    """`ParentSource` in memory.

    Args:
        memory: of the job.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def read(self) -> Sequence[tuple[str, str, str | None]]:
        return [(name, "", encoded(f"the result of {name}", value)) for name, value in self._memory.parents.items()]

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return alone(work)


def alone(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, on an event loop of its own: a sync handler may be called in a test that has one."""
    answer: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 - `Parked` is one; it is raised where the handler waits
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return answer[0]
