"""The output of a job as server-sent events: from Last-Event-ID to the end."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import anyio
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamworker import App, Context, Payload, Settings
from streamworker.errors import UsageError
from streamworker.web import Access, dashboard
from streamworker.web.events import output_events
from tests.conftest import eventually
from tests.contract.helpers import working
from tests.web.conftest import HERE


class Talk(Payload, kind="talk", queue="q"):
    pass


def parsed(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in re.split("[\r\n]", block) if line and line[0] != ":")
        if fields:
            events.append(fields | {"data": json.loads(fields["data"])})
    return events


async def test_output_as_server_sent_events_with_last_event_id(redis_url, ground):
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))

    @app.handler
    async def talk(_: Talk, ctx: Context) -> None:
        for chunk in ("a\nb", b"\xff", {"to": "day"}):
            await ctx.emit(chunk)

    async def route(request: Request) -> Response:
        try:
            return output_events(app, request, request.path_params["id"])
        except UsageError as error:
            return Response(str(error), 400)

    site = Starlette(routes=[Route("/output/{id}", route)])
    transport = httpx2.ASGITransport(app=site)
    async with app, working(app), httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
        made = await app.enqueue(Talk())
        answer = await client.get(f"/output/{made.id}")
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = parsed(answer.text)
        assert [each["event"] for each in events] == ["output", "output", "output", "end"]
        first, second, third = (each["data"] for each in events[:3])
        assert first == {"attempt": 1, "chunk": "a\nb", "restart": False, "missed": 0}
        assert (second["chunk"], second["encoding"], third["chunk"]) == ("/w==", "base64", {"to": "day"})
        again = await client.get(f"/output/{made.id}", headers={"last-event-id": events[0]["id"]})
        assert parsed(again.text) == events[1:]
        later = await client.get(f"/output/{made.id}", params={"after": events[1]["id"]})
        assert parsed(later.text) == events[2:]
        for bad in ("-1", "x", "9" * 17):
            assert (await client.get(f"/output/{made.id}", headers={"last-event-id": bad})).status_code == 400


@pytest.mark.parametrize("chunk", ["\r\n\r\nevent: end\r\n", "\u2028data: x"])
async def test_no_chunk_is_taken_for_another_event(redis_url, ground, chunk):
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))

    @app.handler
    async def talk(_: Talk, ctx: Context) -> None:
        await ctx.emit(chunk)

    async with app, working(app):
        made = await app.enqueue(Talk())
        request = Request({"type": "http", "headers": [], "query_string": b""})
        sent = b"".join([part async for part in output_events(app, request, made.id).body_iterator])
    events = parsed(sent.decode())
    assert [each["event"] for each in events] == ["output", "end"]
    assert events[0]["data"]["chunk"] == chunk


async def test_a_browser_that_goes_away_leaves_nothing_behind(redis_url, ground, monkeypatch):
    monkeypatch.setattr("streamworker.web.events.HEARTBEAT", 0.05)
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))
    async with app:
        request = Request({"type": "http", "headers": [], "query_string": b""})
        parts = output_events(app, request, "never", queue="q").body_iterator
        assert await anext(parts) == b": here\n\n"
        await parts.aclose()
        assert not app._connection._broker._subscriber._by_channel


HOSTILE = "<b>\u202e\x1b[31m"


@pytest.mark.parametrize("known", [True, False], ids=["app", "no app"])
async def test_the_dashboard_shows_output_as_it_comes(redis_url, ground, known, caplog):
    settings = Settings(redis_url=redis_url, mode=ground.mode, lease=3)
    app, go = App(settings=settings), anyio.Event()

    @app.handler
    async def talk(_: Talk, ctx: Context) -> None:
        for chunk in ("a\nb", HOSTILE, b"\xff", {"to": "day"}):
            await ctx.emit(chunk)
        await go.wait()
        await ctx.emit("last")

    site = dashboard(app if known else App(settings=settings), access=Access())
    transport = httpx2.ASGITransport(app=site, client=("127.0.0.1", 5))
    async with app, working(app), httpx2.AsyncClient(transport=transport, base_url=HERE) as client:
        made = await app.enqueue(Talk())
        page = await client.get(f"/jobs?id={made.id}&queue=q")
        assert f'data-output="/output?id={made.id}&amp;queue=q"' in page.text
        reader = asyncio.create_task(client.get(f"/output?id={made.id}&queue=q"))
        await eventually(lambda: "dashboard_output_shown" in caplog.text or not logging.getLogger().isEnabledFor(20))
        go.set()
        events = parsed((await reader).text)
        assert [each["data"].get("chunk") for each in events] == [
            "a\nb",
            "<b>\\u202e\\x1b[31m",
            "\\xff",
            '{"to":"day"}\n',
            "last",
            None,
        ]
        assert events[-1]["event"] == "end"
        again = await client.get(f"/output?id={made.id}&queue=q", headers={"last-event-id": events[-2]["id"]})
        assert [each["event"] for each in parsed(again.text)] == ["end"]
    await site.aclose()


async def test_the_dashboard_shows_the_log_of_a_job(redis_url, ground):
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3, job_log="ctx"))

    @app.handler
    async def talk(_: Talk, ctx: Context) -> None:
        ctx.log.info(HOSTILE)
        ctx.log.warning("second")

    site = dashboard(app, access=Access())
    transport = httpx2.ASGITransport(app=site, client=("127.0.0.1", 5))
    async with app, working(app), httpx2.AsyncClient(transport=transport, base_url=HERE) as client:
        made = await app.enqueue(Talk())
        assert f'data-output="/log?id={made.id}&amp;queue=q"' in (await client.get(f"/jobs?id={made.id}&queue=q")).text
        events = parsed((await client.get(f"/log?id={made.id}&queue=q")).text)
        first, second, end = (each["data"].get("chunk", "") for each in events)
        assert first.startswith("attempt 1, hop 0, delivery 1\n20")
        assert first.endswith("info     <b>\\u202e\\x1b[31m\n")
        assert second.endswith("warning  second\n")
        assert (events[-1]["event"], end) == ("end", "")
        again = await client.get(f"/log?id={made.id}&queue=q", headers={"last-event-id": "1"})
        assert [each["data"].get("chunk") for each in parsed(again.text)] == [second, None]
    await site.aclose()


async def test_the_dashboard_says_why_it_shows_no_output(redis_url):
    site = dashboard(App(settings=Settings(redis_url=redis_url)), access=Access())
    transport = httpx2.ASGITransport(app=site, client=("127.0.0.1", 5))
    async with httpx2.AsyncClient(transport=transport, base_url=HERE) as client:
        (event,) = parsed((await client.get("/output?id=x")).text)
        assert (event["event"], event["data"]) == (
            "trouble",
            {"message": "the queue of this job is not known here: say queue="},
        )
    await site.aclose()
    public = dashboard(App(settings=Settings(redis_url=redis_url)), access=Access(public=True, read_only=True))
    transport = httpx2.ASGITransport(app=public, client=("127.0.0.1", 5))
    async with httpx2.AsyncClient(transport=transport, base_url=HERE) as client:
        answer = await client.get("/output?id=x&queue=q")
        assert answer.status_code == 400
        assert "payloads are shown only where" in answer.text
    await public.aclose()
