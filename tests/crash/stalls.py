"""When the machine itself did not let somebody run: written down like a fault, because a lease runs out by it just the same.

A thread that sleeps for 50 ms and wakes much later was not given a processor (or its process was stopped). Workers keep
such a watch each, and so do the harness, which is the network of proxied runs, and whoever asks the server for an answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Final

from tests.crash.history import Log

STEP: Final = 0.05
WORTH: Final = 0.05
"""Seconds late from which it is written down."""


def watch(directory: Path, worker: str, ask: Callable[[], object] = lambda: None) -> threading.Event:
    """Watch until the event is set.

    Args:
        directory: of the history.
        worker: who suffers; ``*`` for everybody.
        ask: what else has to come back soon.
    """
    over, log = threading.Event(), Log(directory / "stalls")

    def look() -> None:
        while not over.wait(0.0):
            began = monotonic()
            over.wait(STEP)
            ask()
            late = monotonic() - began - STEP
            if late > WORTH:
                log.add(worker=worker, began=began, late=late)
        log.close()

    threading.Thread(target=look, name="stalls", daemon=True).start()
    return over
