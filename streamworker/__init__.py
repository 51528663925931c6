"""streamworker: a worker runtime for background jobs on Redis Streams.

Everything a user needs is imported from here; `streamworker.testing` helps to test handlers.
"""

from streamworker.app import App
from streamworker.context import Context
from streamworker.errors import Discard, Retry, Snooze, StreamworkerError
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
    "Handlers",
    "Job",
    "Payload",
    "QueueWorker",
    "Retry",
    "Settings",
    "Snooze",
    "StreamworkerError",
]
