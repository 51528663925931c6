"""Errors to Sentry, by an observer: every failure with its exception object, what was logged before it, and the job.

    REDIS_URL=redis://localhost:6379 SENTRY_DSN=https://key@host/1 python examples/everyday/sentry.py

Without SENTRY_DSN nothing is sent, and what would be is printed.
"""

import asyncio
import logging
import os
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import sentry_sdk

from streamworker import App, Backoff, Context, Payload, QueueWorker
from streamworker.observe import JobRun, Observer

around: ContextVar[tuple[ExitStack, list[Any]]] = ContextVar("around")


class Sentry(Observer):
    """A scope of its own for each run, so that breadcrumbs do not mix. Payloads stay here: they may be private."""

    def on_start(self, run: JobRun) -> None:
        stack = ExitStack()
        stack.enter_context(sentry_sdk.isolation_scope()).clear_breadcrumbs()
        tokens: list[Any] = []
        tokens.append(around.set((stack, tokens)))  # the handler's task, or its thread, sees what is set here

    def on_outcome(self, run: JobRun) -> None:
        if run.word in ("raised", "timed_out"):  # no Snooze, no Discard
            self.report(run, run.error or run.word, "error" if run.last_attempt else "warning")
        if run.started_at is not None and (held := around.get(None)) is not None:
            around.reset(held[1].pop())
            held[0].close()

    def on_dead(self, run: JobRun) -> None:
        if run.word not in ("raised", "timed_out"):  # poison, undecodable, discarded
            self.report(run, f"dead letter: {run.word}", "error")

    def report(self, run: JobRun, sentence: str, level: Any) -> None:
        with sentry_sdk.new_scope() as scope:
            scope.set_level(level)
            scope.set_tag("kind", run.kind)
            scope.set_tag("queue", run.queue)
            scope.set_context("job", {"id": run.job_id, "attempt": run.attempt, "deliveries": run.deliveries})
            if run.exception is not None:
                scope.capture_exception(run.exception)
            else:
                scope.capture_message(f"{run.kind}: {sentence}")


app = App(observers=[Sentry()])


class Divide(Payload, kind="divide", queue="sums"):
    by: int


@app.handler(max_attempts=2, backoff=Backoff(base=0, jitter=0))
async def divide(payload: Divide, ctx: Context) -> None:
    logging.getLogger("sums").info("dividing, attempt %s", ctx.attempt)
    print(100 / payload.by)


def shown(event: Any, hint: Any) -> Any:
    job, error = event["contexts"]["job"], event["exception"]["values"][-1]
    crumbs = [crumb["message"] for crumb in event.get("breadcrumbs", {}).get("values", [])]
    print(f"{event['level']}: {error['type']} in {event['tags']['kind']}, attempt {job['attempt']}, after {crumbs}")
    return event if "SENTRY_DSN" in os.environ else None


async def main() -> None:
    logging.getLogger("sums").setLevel(logging.INFO)
    sentry_sdk.init(dsn=os.environ.get("SENTRY_DSN", "https://nobody@localhost/1"), before_send=shown)
    async with app:
        await app.enqueue_many([Divide(by=4), Divide(by=0)])
        worker = QueueWorker(app, redis=None, database=None, services=None)
        working = asyncio.create_task(worker.start())
        async with app.operator() as operator:
            while not (await operator.depth(["sums"]))[0].dead:
                await asyncio.sleep(0.02)
        await worker.stop()
        await working


if __name__ == "__main__":
    asyncio.run(main())
