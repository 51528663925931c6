"""Who did what to which jobs, from Python, the command line and the dashboard."""

from __future__ import annotations

import json

import httpx2

from streamworker import App, Settings
from streamworker.operators import JobChange
from streamworker.operators.audit_trail import ACTOR, Actor
from streamworker.web import Access, dashboard
from tests.conftest import eventually
from tests.web.conftest import HERE, Browser, letter


async def rows(pg):
    return [dict(row) for row in await pg.fetch("select * from streamworker.audit order by id")]


async def test_each_change_is_a_row(redis_url, database_url, pg, raw):
    letter(raw, id="d1")
    raw.zadd("stream:{q}:due", {"low/later/0": 4e12})
    raw.hset(
        "stream:{q}:bodies", "low/later/0", json.dumps({"id": "later", "kind": "k", "payload": {"secret": "s3cret"}})
    )
    app = App(settings=Settings(redis_url=redis_url, database_url=database_url))
    async with app.operator() as operator:
        await operator.pause("q", "by me")
        (job,) = (await operator.dead("q")).rows
        assert await operator.replay(job)
        assert not await operator.replay(job)
        ACTOR.set(Actor("ann", "python"))
        (later,) = (await operator.delayed("q")).rows
        assert await app.changer(operator).change(later, JobChange(level="high"))
        (later,) = (await operator.delayed("q")).rows
        assert await operator.forget(later)
        await operator.cancel("q", "nothing")
    found = await rows(pg)
    told = [(row["action"], row["queue_name"], row["job_id"], row["result"]) for row in found]
    assert told == [
        ("pause", "q", None, "done"), ("replay", "q", "d1", "done"), ("replay", "q", "d1", "gone"),
        ("change", "q", "later", "done"), ("forget", "q", "later", "done"), ("cancel", "q", "nothing", "gone"),
    ]  # fmt: skip
    assert [row["who"] for row in found[3:]] == ["ann"] * 3
    assert "@" in found[0]["who"]
    assert "s3cret" not in str(found)


async def test_the_dashboard_keeps_who_signed_in_and_viewers_change_nothing(redis_url, database_url, pg, raw):
    letter(raw, id="d1")
    letter(raw, id="d2")
    access = Access(user="ann", password="a", viewer="vic", viewer_password="v")
    site = dashboard(App(settings=Settings(redis_url=redis_url, database_url=database_url)), access=access)
    transport = httpx2.ASGITransport(app=site, client=("127.0.0.1", 5))
    try:
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, auth=("vic", "v")) as client:
            viewer = Browser(client)
            page = await viewer.text("/dead")
            assert "d1" in page
            assert 'data-do="replay"' not in page
            token = await viewer.token()
            answer = await viewer.post("pause", {"queue": "q"}, {"x-csrf-token": token, "origin": HERE})
            assert (answer.status_code, answer.text) == (403, "Viewers change nothing: ask an operator.\n")
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, auth=("ann", "a")) as client:
            operator = Browser(client)
            assert (await operator.do("pause", queue="q"))["ok"]
            await operator.do("campaign", what="replay", queue="q")

            async def kept():
                return [(row["who"], row["source"], row["action"]) for row in await rows(pg)]

            await eventually(lambda: raw.xlen("stream:{q}:dead") == 0)

            async def all_kept():
                return await kept() == [("ann", "dashboard", "pause"), *[("ann", "dashboard", "replay")] * 2]

            await eventually(all_kept)
    finally:
        await site.aclose()


async def test_the_header_of_a_trusted_proxy_and_of_nobody_else(redis_url):
    access = Access(user_header="X-Forwarded-User", proxies=("10.0.0.0/8",), operators=("ann",))
    site = dashboard(App(settings=Settings(redis_url=redis_url)), access=access)
    try:
        for peer, headers, expected in (
            ("10.1.2.3", {"x-forwarded-user": "ann"}, (200, True)),
            ("10.1.2.3", {"x-forwarded-user": "vic"}, (200, False)),
            ("10.1.2.3", {}, (401, False)),
            ("192.0.2.7", {"x-forwarded-user": "ann"}, (401, False)),
        ):
            transport = httpx2.ASGITransport(app=site, client=(peer, 5))
            async with httpx2.AsyncClient(transport=transport, base_url=HERE, headers=headers) as client:
                answer = await client.get("/delayed")
                assert (answer.status_code, "read-only" not in answer.text and answer.status_code == 200) == expected
    finally:
        await site.aclose()
