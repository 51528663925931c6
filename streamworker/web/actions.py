"""What can be done: each by one POST, fenced by what the page showed, and written to the log with who did it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from streamworker.broker import Operator, Place, StoredJob
from streamworker.errors import StreamworkerError, UsageError
from streamworker.job import FlowRecord
from streamworker.operators import FlowOperator, JobChange, JobChanger, cancel_job
from streamworker.operators.audit_trail import ACTOR, Actor
from streamworker.postgres import Archive
from streamworker.redact import printable
from streamworker.telemetry.logs import get_logger
from streamworker.views.listing import PendingAction, StoredAction, outcome_of, pending_action, stored_action
from streamworker.views.rows import moment
from streamworker.web.bulk import BulkJob, What
from streamworker.web.forms import MOST_RATE, Form, FormRow
from streamworker.web.job_pages import pending_row
from streamworker.web.render import changer_of, client, monitor_of, schedules_of, who

log = get_logger("streamworker.web")

LOGGED: Final = 100
"""Rows that one line of the log names."""
_PAST: Final = {
    "release": "released", "bury": "moved to the dead letters", "drop": "deleted", "replay": "replayed",
    "erase": "deleted", "hasten": "made ready", "forget": "deleted",
}  # fmt: skip


async def do(request: Request) -> Response:
    """Do one of the things below."""
    what, form = request.path_params["what"], await Form.of(request)
    act = _ACTIONS.get(what)
    if act is None:
        return JSONResponse({"ok": False, "message": "There is no such thing to do."}, 404)
    monitor = monitor_of(request)
    ACTOR.set(Actor(who(request), "dashboard"))  # of this request, and of the tasks that it begins
    told: dict[str, Any] = {}
    try:
        told = await act(request, await monitor.operator(), form)
    except StreamworkerError as error:
        told = {"ok": False, "message": str(error)}
        raise
    finally:
        monitor.hurry()
        rows = [f"{row.queue}/{row.handle}" for row in form.rows()[:LOGGED]]
        named = {
            "queue": form.text("queue"),
            "worker": form.text("worker"),
            "id": form.text("id"),
            "schedule": form.text("name"),
            "group": form.text("group"),
            "rows": rows or None,
        }
        facts = {name: value for name, value in named.items() if value is not None}
        log.info(
            "dashboard_action", action=what, who=who(request), client=client(request),
            ok=told.get("ok", True), result=told.get("message", ""), **facts,
        )  # fmt: skip
    return JSONResponse({"ok": True, **told})


async def _pause(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    queue = _queue(form)
    changed = await operator.pause(queue, f"by {who(request)} at {moment(await operator.now() * 1000)}")
    return {"message": f"{queue} is paused" if changed else f"{queue} had been paused already"}


async def _resume(_: Request, operator: Operator, form: Form) -> dict[str, Any]:
    queue = _queue(form)
    changed = await operator.resume(queue)
    return {"message": f"{queue} goes on" if changed else f"{queue} was not paused"}


async def _purge(_: Request, operator: Operator, form: Form) -> dict[str, Any]:
    queue, wanted = _queue(form), form.must("place")
    place: Place | None = next((each for each in get_args(Place) if each == wanted), None)
    if place is None:
        raise UsageError("say what to purge: ready, delayed or dead")
    (depth,) = await operator.depth([queue])
    count = await operator.purge(queue, place, int(getattr(depth, place)))
    return {"message": f"{count:,} {place} of {queue} deleted"}


async def _prune(_: Request, operator: Operator, form: Form) -> dict[str, Any]:
    worker = form.must("worker")
    gone = await operator.prune(await operator.queues(), worker)
    return {"ok": gone, "message": f"{worker} is forgotten" if gone else f"{worker} lives, or holds jobs still"}


def _pending(what: PendingAction) -> Callable[[Request, Operator, Form], Awaitable[dict[str, Any]]]:
    async def act(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
        change = pending_action(operator, what, form.text("reason") or f"buried by {who(request)}")

        async def one(row: FormRow) -> tuple[str, str]:
            entry = await pending_row(operator, row.queue, row.handle)
            if entry is None or (entry.worker_id, entry.deliveries) != (row.worker, row.deliveries):
                return "gone", ""
            if entry.alive and not form.flag("force"):
                return "alive", ""
            return await outcome_of(change(entry))

        return await _each(form.rows(), one, _PAST[what])

    return act


def _stored(what: StoredAction) -> Callable[[Request, Operator, Form], Awaitable[dict[str, Any]]]:
    async def act(_: Request, operator: Operator, form: Form) -> dict[str, Any]:
        change = stored_action(operator, what)

        async def one(row: FormRow) -> tuple[str, str]:
            return await outcome_of(change(StoredJob(row.queue, row.level, row.handle, None, None, 0.0, None)))

        return await _each(form.rows(), one, _PAST[what])

    return act


async def _each(rows: list[FormRow], one: Callable[[FormRow], Awaitable[tuple[str, str]]], past: str) -> dict[str, Any]:
    """Act on each row; returns the counts by result, ``past`` for those that were changed."""
    if not rows:
        raise UsageError("nothing is ticked")
    tally: Counter[str] = Counter()
    refused = ""
    for row in rows:
        result, reason = await one(row)
        tally[result] += 1
        refused = reason or refused
    words = [f"{tally['done']:,} {past}"] if tally["done"] else []
    if tally["gone"]:
        words.append(f"{tally['gone']:,} had moved on and were left alone")
    if tally["alive"]:
        words.append(f"{tally['alive']:,} left alone: their workers live and may be running them")
    if tally["refused"]:
        words.append(f"{tally['refused']:,} refused: {refused}")
    return {"ok": not (tally["alive"] or tally["refused"]), "message": "; ".join(words)}


async def _bulk_job(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    """Change all that fit, at a rate, in the background."""
    wanted = form.must("what")
    what: What | None = next((each for each in get_args(What) if each == wanted), None)
    if what is None:
        raise UsageError("there is no such thing to do to many jobs")
    selection, rate = form.selection(), form.number("rate", MOST_RATE)
    change = partial(_changed, changer_of(request, operator), form.change()) if what == "change" else None
    monitor = monitor_of(request)
    look = await monitor.looked()
    expected = look.count(
        "dead" if what in ("replay", "erase") else "delayed" if what in ("hasten", "forget", "change") else "running",
        selection.queue,
    )
    if selection.worker is not None:
        expected = sum(each.pending for each in look.workers if each.worker_id == selection.worker)
    elif selection.narrows:
        expected = 0  # how many fit is known at the end
    bulk_job = BulkJob(what, selection, rate or None, who(request), expected, change=change)
    monitor.bulk_jobs.begin(operator, bulk_job)
    monitor.stir()
    return {"message": f"Begun: {bulk_job.told()['title'].lower()}", "campaign": bulk_job.id}


async def _changed(changer: JobChanger, change: JobChange, job: StoredJob) -> bool:
    return await changer.change(job, change)


async def _change(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    """Change the delayed jobs that are ticked."""
    changer, change = changer_of(request, operator), form.change()

    async def one(row: FormRow) -> tuple[str, str]:
        job = await operator.delayed_job(row.queue, row.handle)
        return ("gone", "") if job is None else await outcome_of(changer.change(job, change))

    return await _each(form.rows(), one, "changed")


async def _cancel(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    job_id, queue = form.must("id"), form.queue()
    archive = await monitor_of(request).archive()
    job = None if archive is None else await archive.find(job_id, queue)
    queue = job.queue if job is not None else queue
    answer = "ended" if queue is None else await cancel_job(archive, operator, queue, job_id)
    words = {"cancelled": "never runs", "asked": "is told to end", "ended": "has ended, or is not there"}
    return {"ok": answer != "ended", "message": f"{job_id} {words[answer]}"}


async def _again(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    archive, job_id = await _ledger(request), form.must("id")
    done = False
    if (job := await archive.find(job_id, form.queue())) is not None:
        await operator.uncancel(job.queue, job_id)
        done = await archive.retry(job.queue, job_id)
    return {"ok": done, "message": f"{job_id} is queued; a relay dispatches it" if done else f"{job_id} has not ended"}


async def _flow(request: Request, operator: Operator, form: Form) -> tuple[FlowOperator, FlowRecord]:
    archive, wanted = await _ledger(request), form.must("id")
    found = await archive.flows.find(wanted)
    if found is None:
        raise UsageError(f"the ledger knows no flow {printable(wanted)}")
    return FlowOperator(archive, operator), found


async def _flow_cancel(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    actions, flow = await _flow(request, operator, form)
    done = await actions.cancel(flow)
    return {"ok": done, "message": f"{flow.name} {'is cancelled' if done else 'has ended'}"}


async def _flow_retry(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    actions, flow = await _flow(request, operator, form)
    count = await actions.retry(flow)
    words = f"{count:,} job{' is' if count == 1 else 's are'} queued" if count else "no job of it has failed"
    return {"ok": bool(count), "message": f"{flow.name}: {words}"}


async def _flow_delete(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    actions, flow = await _flow(request, operator, form)
    done = await actions.delete(flow)
    return {"ok": done, "message": f"{flow.name} {'is deleted' if done else 'has not ended: cancel it first'}"}


async def _ledger(request: Request) -> Archive:
    archive = await monitor_of(request).archive()
    if archive is None:
        raise UsageError("there is no ledger: set DATABASE_URL, and run streamworker migrate up")
    return archive


async def _stop(request: Request, _: Operator, form: Form) -> dict[str, Any]:
    stopped = monitor_of(request).bulk_jobs.stop(form.must("id"))
    return {"message": "Stopped" if stopped else "It had ended already"}


async def _dismiss(request: Request, _: Operator, form: Form) -> dict[str, Any]:
    monitor_of(request).bulk_jobs.dismiss(form.must("id"))
    monitor_of(request).stir()
    return {"message": ""}


async def _mute(request: Request, operator: Operator, form: Form) -> dict[str, Any]:
    queue, group = _queue(form), form.must("group")
    changed = await operator.mute(queue, group, f"by {who(request)} at {moment(await operator.now() * 1000)}")
    return {"message": f"{group} is muted" if changed else f"{group} was muted already"}


async def _unmute(_: Request, operator: Operator, form: Form) -> dict[str, Any]:
    changed = await operator.mute(_queue(form), form.must("group"), "")
    return {"message": f"{form.must('group')} {'needs attention again' if changed else 'was not muted'}"}


async def _schedule_pause(request: Request, _: Operator, form: Form) -> dict[str, Any]:
    name = form.must("name")
    changed = await (await schedules_of(request)).pause(name, by=who(request))
    return {"message": f"{name} is paused" if changed else f"{name} had been paused already"}


async def _schedule_resume(request: Request, _: Operator, form: Form) -> dict[str, Any]:
    name = form.must("name")
    changed = await (await schedules_of(request)).resume(name)
    return {"message": f"{name} ticks again" if changed else f"{name} was not paused"}


async def _schedule_run(request: Request, _: Operator, form: Form) -> dict[str, Any]:
    name = form.must("name")
    return {"message": f"{name}: job {await (await schedules_of(request)).run_now(name)} is enqueued"}


async def _schedule_remove(request: Request, _: Operator, form: Form) -> dict[str, Any]:
    name = form.must("name")
    gone = await (await schedules_of(request)).remove(name)
    return {"ok": gone, "message": f"{name} is removed" if gone else f"{name} is not there any more"}


async def _schedule_edit(request: Request, _: Operator, form: Form) -> dict[str, Any]:
    name = form.must("name")
    changes = {"expression": form.must("expression"), "tz": form.must("tz")}
    await (await schedules_of(request)).edit(name, by=who(request), **changes)
    return {"message": f"{name} is changed"}


def _queue(form: Form) -> str:
    queue = form.queue()
    if queue is None:
        raise UsageError("queue is missing")
    return queue


_ACTIONS: Final[dict[str, Callable[[Request, Operator, Form], Awaitable[dict[str, Any]]]]] = {
    "pause": _pause,
    "resume": _resume,
    "purge": _purge,
    "prune": _prune,
    "release": _pending("release"),
    "bury": _pending("bury"),
    "drop": _pending("drop"),
    "replay": _stored("replay"),
    "erase": _stored("erase"),
    "hasten": _stored("hasten"),
    "forget": _stored("forget"),
    "campaign": _bulk_job,
    "cancel": _cancel,
    "again": _again,
    "flow-cancel": _flow_cancel,
    "flow-retry": _flow_retry,
    "flow-delete": _flow_delete,
    "stop": _stop,
    "dismiss": _dismiss,
    "change": _change,
    "mute": _mute,
    "unmute": _unmute,
    "schedule-pause": _schedule_pause,
    "schedule-resume": _schedule_resume,
    "schedule-run": _schedule_run,
    "schedule-remove": _schedule_remove,
    "schedule-edit": _schedule_edit,
}
