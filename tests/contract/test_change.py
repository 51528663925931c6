"""Jobs that wait are changed as they were read, or not at all: their time, level, queue and payload."""

from __future__ import annotations

import json
import time

import pytest

from streamworker import App, Payload, Settings
from streamworker.errors import InvalidJob, UsageError
from streamworker.operators import JobChange
from streamworker.views.listing import DELAYED, READY, Selection
from tests.conftest import CLUSTER
from tests.contract.helpers import one


class Note(Payload, kind="note", queue="q"):
    text: str
    times: int = 1


def app_of(ground, redis_url: str) -> App:
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))

    @app.handler
    async def note(payload: Note) -> None: ...

    return app


def bodies(ground, raw, queue: str = "q") -> list[dict]:
    return [json.loads(body) for body in [*ground.waiting(queue=queue), *raw.hvals(f"stream:{{{queue}}}:bodies")]]


async def test_time_level_and_payload_of_a_delayed_job(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app:
        made = await app.enqueue(Note(text="a"), delay=600)
        assert await app.change(made.id, level="high", fields={"text": "b"}, delay=60)
        ((member, score),) = raw.zrange("stream:{q}:due", 0, -1, withscores=True)
        assert member.decode().startswith(f"high/{made.id}/")
        assert 50 < score / 1000 - time.time() <= 61
        (document,) = bodies(ground, raw)
        assert (document["id"], document["payload"], document["priority"]) == (made.id, {"text": "b", "times": 1}, 50)
        assert await app.change(made.id, payload={"text": "c", "times": 3})
        assert raw.zscore("stream:{q}:due", member) == score  # its time is as it was
        assert await app.change(made.id, delay=0)
        assert (ground.ready("high"), raw.zcard("stream:{q}:due"), raw.hlen("stream:{q}:bodies")) == (1, 0, 0)
        assert not await app.change("nothing", level="low")


async def test_what_makes_no_sense(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app:
        made = await app.enqueue(Note(text="a"), delay=600)
        with pytest.raises(InvalidJob, match="the payload is no Note"):
            await app.change(made.id, fields={"text": 7})
        with pytest.raises(UsageError, match="say what to change"):
            await app.change(made.id)
        with pytest.raises(UsageError, match="two answers"):
            await app.change(made.id, delay=1, run_at=5.0)
        keyed = await app.enqueue(Note(text="a"), delay=600, key="k")
        with pytest.raises(UsageError, match="a cluster keeps queues apart" if CLUSTER else "has a key of its queue"):
            await app.change(keyed.id, to_queue="other")
        assert {document["payload"]["text"] for document in bodies(ground, raw)} == {"a"}


@pytest.mark.skipif(CLUSTER, reason="a cluster keeps queues apart")
async def test_a_ready_job_and_another_queue(ground, redis_url, raw):
    async with app_of(ground, redis_url) as app:
        made = await app.enqueue(Note(text="a"))
        assert await app.change(made.id, fields={"times": 2}, to_queue="other", level="low")
        assert (ground.left(), ground.ready("low", queue="other")) == (0, 1)
        assert await app.change(made.id, queue="other", delay=300)
        assert (ground.left("low", queue="other"), raw.zcard("stream:{other}:due")) == (0, 1)
        (document,) = bodies(ground, raw, "other")
        assert (document["queue_name"], document["payload"]["times"]) == ("other", 2)


async def test_a_job_that_starts_meanwhile_stays_as_it_is(ground, redis_url, raw, broker_factory):
    async with app_of(ground, redis_url) as app, broker_factory("w") as broker, app.operator() as operator:
        made = await app.enqueue(Note(text="a"))
        (ready,) = [job async for job in READY.chosen(operator, Selection(queue="q"))]
        claim = await one(broker)
        assert claim.body is not None
        assert not await app.changer(operator).change(ready, JobChange(fields={"text": "b"}))
        assert [job async for job in READY.chosen(operator, Selection(queue="q"))] == []
        assert not await app.change(made.id, delay=60)
        assert raw.zcard("stream:{q}:due") == 0

        later = await app.enqueue(Note(text="a"), delay=600)
        (delayed,) = [job async for job in DELAYED.chosen(operator, Selection(queue="q"))]
        assert await app.change(later.id, fields={"text": "first"})
        assert not await app.changer(operator).change(delayed, JobChange(fields={"text": "second"}))
        await app.change(later.id, delay=0)
        assert not await app.changer(operator).change(delayed, JobChange(level="low"))
        assert ground.ready() == 1


async def test_all_ready_jobs_are_found(ground, redis_url):
    async with app_of(ground, redis_url) as app, app.operator() as operator:
        await app.enqueue_many([app.job(Note(text=str(n)), priority=("high", "low")[n % 2]) for n in range(1200)])
        found = [job async for job in READY.chosen(operator, Selection(queue="q"))]
        assert len({job.job_id for job in found}) == len(found) == 1200
        assert [job.level for job in found] == ["high"] * 600 + ["low"] * 600
