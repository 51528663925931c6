"""Read models: what an operator sees of a job, a queue or a worker, as frozen rows. Shared by command line and web."""

from streamworker.views.bulk import Throttle
from streamworker.views.fleet import Fleet, History, Look, Notice, Point, Stuck, attention
from streamworker.views.listing import (
    BUDGET,
    Pace,
    Selection,
    Slice,
    chosen_dead,
    chosen_delayed,
    chosen_pending,
    dead_slice,
    delayed_slice,
    overview,
    pending_slice,
)
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
from streamworker.views.text import age, moment, printable, size

__all__ = [
    "BUDGET",
    "DeadRow",
    "DelayedRow",
    "Fleet",
    "History",
    "Look",
    "Notice",
    "Pace",
    "Point",
    "QueueRow",
    "Selection",
    "Slice",
    "Stuck",
    "Throttle",
    "WorkerRow",
    "age",
    "attention",
    "chosen_dead",
    "chosen_delayed",
    "chosen_pending",
    "dead_row",
    "dead_slice",
    "delayed_row",
    "delayed_slice",
    "moment",
    "overview",
    "pending_slice",
    "printable",
    "queue_row",
    "size",
    "worker_row",
]
