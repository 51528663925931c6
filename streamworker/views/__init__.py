"""Read models: what an operator sees of a job, a queue or a worker, as frozen rows. Shared by command line and web."""

from streamworker.views.rows import (
    DeadRow,
    DelayedRow,
    QueueRow,
    WorkerRow,
    dead_row,
    delayed_row,
    queue_row,
    worker_row,
)
from streamworker.views.select import Pace, Selection, chosen_dead, chosen_delayed, chosen_pending, overview
from streamworker.views.throttle import Throttle
from streamworker.views.words import age, moment, printable, size

__all__ = [
    "DeadRow",
    "DelayedRow",
    "Pace",
    "QueueRow",
    "Selection",
    "Throttle",
    "WorkerRow",
    "age",
    "chosen_dead",
    "chosen_delayed",
    "chosen_pending",
    "dead_row",
    "delayed_row",
    "moment",
    "overview",
    "printable",
    "queue_row",
    "size",
    "worker_row",
]
