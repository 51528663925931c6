"""streamworker: a worker runtime for background jobs on Redis Streams.

Everything a user needs is imported from here; `streamworker.testing` helps to test handlers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any  # noqa: TID251 - hides nothing: import-linter counts the imports below

if TYPE_CHECKING:
    from streamworker.app import App
    from streamworker.context import Context, ProcessContext
    from streamworker.encryption import Keys
    from streamworker.errors import Discard, Retry, Snooze, StreamworkerError
    from streamworker.flow import Flow, chain, group
    from streamworker.handlers import Handlers, Payload
    from streamworker.job import Enqueued, Job
    from streamworker.policy import Backoff
    from streamworker.settings import Settings
    from streamworker.worker import QueueWorker

__all__ = [
    "App",
    "Backoff",
    "Context",
    "Discard",
    "Enqueued",
    "Flow",
    "Handlers",
    "Job",
    "Keys",
    "Payload",
    "ProcessContext",
    "QueueWorker",
    "Retry",
    "Settings",
    "Snooze",
    "StreamworkerError",
    "chain",
    "group",
]

_HOMES = {
    "App": "app",
    "Backoff": "policy",
    "Context": "context",
    "Discard": "errors",
    "Enqueued": "job",
    "Flow": "flow",
    "Handlers": "handlers",
    "Job": "job",
    "Keys": "encryption",
    "Payload": "handlers",
    "ProcessContext": "context",
    "QueueWorker": "worker",
    "Retry": "errors",
    "Settings": "settings",
    "Snooze": "errors",
    "StreamworkerError": "errors",
    "chain": "flow",
    "group": "flow",
}


def __getattr__(name: str) -> Any:
    # Imported when first named: `streamworker --help` and its completions shall not wait for Redis clients.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
