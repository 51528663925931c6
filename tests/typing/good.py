"""What users write, as type checkers see it: all of this must be clean under mypy --strict and basedpyright's strict."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, assert_type
from uuid import UUID

from streamworker import (
    App,
    Backoff,
    Context,
    Discard,
    Enqueued,
    Handlers,
    Job,
    Payload,
    QueueWorker,
    Retry,
    Settings,
    Snooze,
)
from streamworker.observe import JobRun, Observer


class SendInvoice(Payload, kind="invoice.send", queue="billing", aliases=("invoice.mail",)):
    invoice_id: UUID
    copy_to: str | None = None


class Cleanup(Payload, kind="cleanup", queue="chores"):
    pass


class SendMany(Payload, kind="many", queue="chores"):
    number: int
    copy_to: str = ""


class SendMore(Payload, kind="more", queue="chores"):
    number: int


class SendFew(Payload, kind="few", queue="chores"):
    number: int


@dataclass
class Services:
    mails: list[str]


@asynccontextmanager
async def lifespan() -> AsyncGenerator[Services]:
    yield Services([])


# An app without services.
plain = App()
assert_type(plain, App[None])


@plain.handler
async def bare(payload: SendInvoice) -> None:
    assert_type(payload.invoice_id, UUID)
    assert_type(payload.copy_to, str | None)


@plain.handler(max_attempts=8, timeout=None, backoff=Backoff(base=1, cap=300))
def in_thread(payload: Cleanup, ctx: Context) -> int:
    return ctx.attempt


# One with services, and a group of handlers from another file.
app = App(lifespan=lifespan, settings=Settings())
assert_type(app, App[Services])
billing = Handlers[Services]()


@billing.handler(max_attempts=8, timeout=30)
async def send_invoice(payload: SendInvoice, ctx: Context[Services]) -> None:
    assert_type(ctx.services, Services)
    assert_type(ctx.job, Job)
    assert_type(ctx.attempt, int)
    assert_type(ctx.last_attempt, bool)
    assert_type(ctx.worker_id, str)
    assert_type(ctx.delivery, int)
    assert_type(ctx.deadline, datetime | None)
    assert_type(ctx.cancelled, bool)
    assert_type(ctx.stopping, bool)
    ctx.services.mails.append(str(payload.invoice_id))
    async with ctx.transaction() as pg:
        row = await pg.fetchrow("select * from invoice where id = $1", payload.invoice_id)
        if row is None:
            raise Discard("invoice deleted")
        if not row["ready"]:
            raise Snooze(60)
        await ctx.complete(pg)
    raise Retry(after=60)


@app.handler
async def cleanup(payload: Cleanup, ctx: Context[Services]) -> None:
    assert_type(ctx.services.mails, list[str])


app.include(billing)


# The decorated functions stay what they were.
async def call_them(ctx: Context[Services], none: Context[None]) -> None:
    await send_invoice(SendInvoice(UUID(int=1)), ctx)
    await cleanup(Cleanup(), ctx)
    await bare(SendInvoice(invoice_id=UUID(int=1), copy_to="x"))
    assert_type(in_thread(Cleanup(), none), int)


async def timed(ctx: Context[Any], call_next: Callable[[], Awaitable[Any]]) -> Any:
    return await call_next()


wrapped = App(middleware=[timed])


class Tracker(Observer):
    def on_outcome(self, run: JobRun) -> None:
        assert_type(run.exception, BaseException | None)
        assert_type(run.seconds, float | None)

    def on_dead(self, run: JobRun) -> None:
        assert_type(run.job_id, str)


watched = App(observers=[Tracker()])


async def produce(i: UUID) -> None:
    async with app:
        answer = await app.enqueue(
            SendInvoice(invoice_id=i),
            queue="other",
            priority="high",
            delay=30,
            key=f"invoice:{i}",
            key_ttl=60,
            headers={"a": 1},
        )
        assert_type(answer, Enqueued)
        assert_type(answer.id, str)
        assert_type(answer.new, bool)
        await app.enqueue(SendInvoice(i), run_at=datetime.now(UTC), priority=200)
        await app.enqueue(SendInvoice(i), delay=1, expires_in=60)
        await app.enqueue(app.job(SendInvoice(i), expires_at=datetime.now(UTC)))
        job = app.job(SendInvoice(i), delay=5)
        assert_type(job, Job)
        assert_type(await app.enqueue_many([job, Cleanup()]), list[Enqueued])


def produce_blocking() -> Enqueued:
    return app.enqueue_blocking(Cleanup(), delay=1.5, key="nightly")


async def work() -> None:
    worker = QueueWorker(app, redis="redis://localhost", database=None, services=Services([]), worker_id="w")
    assert_type(worker.worker_id, str)
    assert_type(await worker.run(burst=True), int)
    await worker.stop()


# Handlers of batches, and limits.
@plain.handler(batch=100, linger=0.05, concurrency=5, rate="100/s", limit_by="copy_to")
async def many(payloads: list[SendMany], contexts: list[Context]) -> list[Exception | None]:
    assert_type(payloads[0].number, int)
    assert_type(contexts[0].attempt, int)
    return [None for _ in payloads]


@plain.handler(batch=10)
def many_in_thread(payloads: list[SendMore]) -> None:
    assert_type(payloads[0].number, int)


@plain.handler(concurrency=5)
async def few(payload: SendFew, ctx: Context) -> None:
    assert_type(payload.number, int)
