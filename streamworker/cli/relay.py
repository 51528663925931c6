"""``streamworker relay``: the relay on its own."""

from __future__ import annotations

import importlib.util
import signal
from typing import Any

import anyio

from streamworker.app import App
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.relay")


def relay(*, flags: WorkerFlags = WORKER) -> int:
    """Put jobs that were enqueued in PostgreSQL transactions onto Redis, and promote due jobs of all queues.

    Every worker does the first unless STREAMWORKER_RELAY=off. On its own it keeps delayed jobs coming while no worker
    runs, so that workers can be scaled down to none.
    """
    settings = flags.settings()

    async def main() -> int:
        stopping = anyio.Event()
        async with App[Any](settings=settings).relaying(settings) as relaying, anyio.create_task_group() as group:

            async def watch(*, task_status: anyio.abc.TaskStatus[None]) -> None:
                with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                    task_status.started()
                    async for _ in signals:
                        stopping.set()

            await group.start(watch)
            log.info("relay_ready")
            await relaying.run(stopping)
            group.cancel_scope.cancel()
        log.info("relay_stopped", dispatched=relaying.relay.dispatched)
        return 0

    return anyio.run(main, backend_options={"use_uvloop": importlib.util.find_spec("uvloop") is not None})
