"""``streamworker relay``: what moves jobs where no worker may be."""

from __future__ import annotations

from typing import Any

import anyio

from streamworker.app import App
from streamworker.cli.app_loader import load_app, loop_options, with_own
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.telemetry.http import HttpThread
from streamworker.telemetry.logs import get_logger
from streamworker.worker import signals
from streamworker.worker.metrics import ScaleEndpoint
from streamworker.worker.relay_process import Scheduler

log = get_logger("streamworker.relay")


def relay(app: str | None = None, *, flags: WorkerFlags = WORKER) -> int:
    """Promote due jobs of all queues, enqueue what the app schedules, and relay what waits in PostgreSQL.

    Every worker does this, too (the last unless STREAMWORKER_RELAY=off). On its own it does so while no worker runs, so
    that workers can be scaled down to none: with or without PostgreSQL, and without an app but for its schedules. With
    STREAMWORKER_HTTP it tells autoscalers at /scale (and Prometheus at /metrics) for how many jobs of each queue there
    should be workers, and how many slots clear it within STREAMWORKER_TARGET_WAIT.

    Args:
        app: module:attribute of the app whose schedules tick, such as shop.jobs:app; STREAMWORKER_APP unless given.
    """
    settings = flags.settings(app=app)
    flags.export()
    loaded: App[Any] = App(settings=settings)
    if settings.app is not None:
        loaded = load_app(settings)
        settings = with_own(settings, loaded)

    async def main() -> int:
        stopping = anyio.Event()
        queues = [spec.name for spec in settings.queues] or loaded.handlers.queues
        scale = ScaleEndpoint(loaded, settings, None, queues)
        http = None if settings.http is None else HttpThread(settings.http, scale.routes, scale.tasks)
        async with loaded.relay_process(settings) as relaying, anyio.create_task_group() as group:
            await group.start(signals.watch, lambda _: stopping.set())
            scale.ledger.watch(relaying)
            if http is not None:
                http.open()
            log.info("relay_ready", schedules=len(loaded.schedules), ledger=not isinstance(relaying, Scheduler))
            try:
                await relaying.run(stopping)
            finally:
                scale.end()
                if http is not None:
                    http.close()
            group.cancel_scope.cancel()
        log.info("relay_stopped", dispatched=relaying.dispatched)
        return 0

    return anyio.run(main, backend_options=loop_options(settings))
