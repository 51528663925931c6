"""SealedStages: the stages of a worker that differ with encryption.

Payloads are opened before they are decoded. What a run leaves is sealed before later stages store, log or report it.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Final, Protocol

import msgspec

from streamworker import codec
from streamworker.encryption import MOST_REASON, PLAIN, Keys, Purpose, Sealer, sealed_in
from streamworker.errors import Discard, NoKey, Retry, Snooze
from streamworker.execution import Execution
from streamworker.handlers import Handlers, Registration, names_of
from streamworker.job import Job, Ok, Outcome, Raised, Settled, Undecodable, Unopened
from streamworker.payload import StoredPayload
from streamworker.redact import describe, name_of, text_of
from streamworker.results import NotKept, OutputBatch, Outputs, result_json
from streamworker.worker.batching import BatchExecution
from streamworker.worker.executor import Executor, undecodable
from streamworker.worker.tasks import Completion

UNDECODABLE: Final = Undecodable("").reason
NOT_ENCRYPTED: Final = "not encrypted"
"""Reason of a dead letter whose payload should have been sealed."""


class Stages(Protocol):
    """Makes the stages of a worker that differ with encryption."""

    sealer: Sealer

    def executor(self, handlers: Handlers[Any], *args: Any, **options: Any) -> Executor:
        """Opens payloads and calls handlers."""

    def completion(self, *args: Any, **options: Any) -> Completion:
        """Takes outcomes."""

    def outputs(self, outputs: Outputs) -> Outputs:
        """Stores what handlers emit."""

    def tick(self, job: Job) -> Job:
        """The job of a schedule's tick, as it is stored."""


class PlainStages:
    """The `Stages` of apps without encryption."""

    sealer: Sealer = PLAIN

    def executor(self, handlers: Handlers[Any], *args: Any, **options: Any) -> Executor:
        return Executor(handlers, *args, **options)

    def completion(self, *args: Any, **options: Any) -> Completion:
        return Completion(*args, **options)

    def outputs(self, outputs: Outputs) -> Outputs:
        return outputs

    def tick(self, job: Job) -> Job:
        return job


class SealedStages:
    """The `Stages` of apps with keys."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.sealer: Sealer = keys

    def executor(self, handlers: Handlers[Any], *args: Any, **options: Any) -> Executor:
        return SealedExecutor(self._keys, handlers, *args, **options)

    def completion(self, *args: Any, **options: Any) -> Completion:
        return SealedCompletion(self._keys, *args, **options)

    def outputs(self, outputs: Outputs) -> Outputs:
        return SealedOutputs(outputs, self._keys)

    def tick(self, job: Job) -> Job:
        return self._keys.sealed_job(job)


def stages_of(encryption: Keys | None) -> Stages:
    """The stages for an app's keys."""
    return PlainStages() if encryption is None else SealedStages(encryption)


class UnopenedHandlers:
    """Handlers whose payloads are not decoded: they are sealed as yet.

    Args:
        handlers: of the app.
    """

    def __init__(self, handlers: Handlers[Any]) -> None:
        self._handlers = handlers
        self._made: dict[int, tuple[Registration, Registration]] = {}

    def handler_of(self, kind: str | None, queue: str) -> Registration | None:
        """As `Handlers.handler_of`."""
        found = self._handlers.handler_of(kind, queue)
        if found is None:
            return None
        made = self._made.get(id(found))
        if made is None:
            made = self._made[id(found)] = (found, msgspec.structs.replace(found, decode=_undecoded))
        return made[1]

    def opened(self, registration: Registration) -> Registration:
        """The registration with its decoder."""
        return next(found for found, made in self._made.values() if made.kind == registration.kind)


def _undecoded(payload: msgspec.Raw) -> msgspec.Raw:
    return payload


class SealedExecutor(Executor):
    """`Executor` that opens payloads.

    Args:
        keys: open them.
        handlers: kind to handler.
        args: those of `Executor`.
        options: those of `Executor`.
    """

    def __init__(self, keys: Keys, handlers: Handlers[Any], *args: Any, **options: Any) -> None:
        self._unopened = UnopenedHandlers(handlers)
        super().__init__(self._unopened, *args, **options)
        self._keys = keys
        self._describe = name_of  # what an error says may be private

    def prepare(self, run: Execution) -> None:
        """`Executor.prepare`; a payload that does not open gives the run its outcome."""
        super().prepare(run)
        self._open(run)

    def decode(self, run: Execution) -> None:
        """`Executor.decode`, likewise."""
        super().decode(run)
        self._open(run)

    def _open(self, run: Execution) -> None:
        if run.outcome is None and run.reading is not None and run.payload is not None:
            if type(run.payload) is not StoredPayload and not self._refers(run):
                self._decode_loaded(run, run.reading.payload)
        elif isinstance(run.outcome, Undecodable) and run.outcome.reason == UNDECODABLE:
            run.outcome = Undecodable(self._keys.sealed_text(run.job_id, run.outcome.error))

    def _decode_loaded(self, run: Execution, payload: msgspec.Raw) -> None:
        reading, registration = run.reading, run.registration
        if reading is None or registration is None:
            return
        run.payload = None
        try:
            known = self._unopened.opened(registration)
            if self._keys.required and sealed_in(payload) is None:
                run.outcome = Undecodable("its producer has no keys, and this app requires them", NOT_ENCRYPTED)
                return
            kinds = (reading.kind or "", *names_of(known), "")
            run.payload = known.decode(self._keys.opened_payload(payload, run.job_id, kinds))
        except NoKey as error:
            run.outcome = Unopened(str(error), codec.state_of(reading, run.claim.secret).unknown_since or None)
        except BaseException as error:  # noqa: BLE001 - as in `Executor.prepare`
            run.outcome = Undecodable(self._keys.sealed_text(run.job_id, undecodable(run, error).error))


class SealedCompletion(Completion):
    """`Completion` that seals what a run leaves, before observers see it or a later stage stores it.

    Args:
        keys: seal it.
        args: those of `Completion`.
        options: those of `Completion`.
    """

    def __init__(self, keys: Keys, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._keys = keys

    def finish(self, run: Execution) -> None:
        """`Completion.finish`."""
        if run.outcome is not None and not isinstance(run, BatchExecution):
            run.outcome = self._sealed(run.job_id, run.outcome)
        super().finish(run)

    def _sealed(self, job_id: str, outcome: Outcome) -> Outcome:
        if isinstance(outcome, Ok):
            return outcome if outcome.value is None else Ok(self._result(job_id, outcome.value))
        if isinstance(outcome, Raised) and not isinstance(outcome.error, SealedError):
            return Raised(self._error(job_id, outcome.error))
        return outcome

    def _result(self, job_id: str, value: Any) -> Any:
        try:
            return self._keys.sealed_result(job_id, result_json(value))
        except ValueError as error:
            return NotKept(SealedError(self._keys.sealed_text(job_id, str(error), MOST_REASON)))

    def _error(self, job_id: str, error: BaseException) -> BaseException:
        """The error as all see it from now on: its class, where it was raised, and its text sealed."""
        if isinstance(error, Snooze):
            return error
        if isinstance(error, Discard):
            return Discard(self._keys.sealed_text(job_id, text_of(error, how=_reason)))
        if isinstance(error, Retry):
            return Retry(error.after, self._keys.sealed_text(job_id, text_of(error)))
        if type(error).__module__.partition(".")[0] == "streamworker" and not isinstance(error, Exception):
            return error  # `RunEnded` says what the ledger knows
        made = _named(name_of(error))(f"{_place_of(error)}{self._keys.sealed_text(job_id, describe(error))}")
        made.original = error
        return made


class SealedError(Exception):
    """A handler's error whose text is sealed.

    It has the name of the error's class, and no traceback: frames and chained errors hold what a handler works on.
    """

    original: BaseException | None = None
    """The error as it was raised, for observers that may see it."""


@lru_cache(maxsize=512)
def _named(name: str) -> type[SealedError]:
    return type(name, (SealedError,), {})


def _reason(wish: Any) -> str:
    return str(wish.reason)


def _place_of(error: BaseException) -> str:
    """``at mail.py:12 in send ``: code, and nothing that it worked on."""
    frames = traceback.extract_tb(error.__traceback__) if error.__traceback__ is not None else []
    if not frames:
        return ""
    return f"at {PurePath(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name} "


class SealedOutputs:
    """`Outputs` that seals what is emitted.

    Args:
        outputs: stores it.
        keys: seal it.
    """

    def __init__(self, outputs: Outputs, keys: Keys) -> None:
        self._outputs = outputs
        self._keys = keys
        self.output = outputs.output

    async def emit(self, batches: Sequence[OutputBatch]) -> list[Settled | None]:
        """`Outputs.emit`."""
        return await self._outputs.emit([self._sealed(batch) for batch in batches])

    def _sealed(self, batch: OutputBatch) -> OutputBatch:
        purpose: Purpose = "log" if batch.lines else "output"
        return msgspec.structs.replace(batch, chunks=self._keys.sealed_bytes(purpose, batch.job_id, batch.chunks))
