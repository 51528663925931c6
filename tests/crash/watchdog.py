"""What hangs ends, and says where: the stack of every task and thread, then the process is gone.

A timeout that is raised inside of a test does not end one whose event loop waits for a task that swallowed its
cancellation; nothing inside of the process does. A thread of its own that ends the process always does, and pytest-xdist
then names the test as the one during which its worker crashed.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

CODE: Final = 70


@contextmanager
def watchdog(seconds: float, what: str, first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """End the process if the block lasts longer than that.

    Args:
        seconds: how long it may last.
        what: named in the message.
        first: called before anything is said; makes sure that it is seen.
    """
    over = threading.Event()

    def watch() -> None:
        if over.wait(seconds):
            return
        first()
        print(f"\nwatchdog: {what} hangs, {seconds:g} s are over", file=sys.stderr)
        for task in [each for each in gc.get_objects() if isinstance(each, asyncio.Task) and not each.done()]:
            task.print_stack(file=sys.stderr)
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2)
        os._exit(CODE)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()
