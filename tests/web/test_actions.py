"""What the buttons do, on a real server, and what is written down about it."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime

import anyio
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from streamworker import App, Settings
from streamworker.web import Access, actions, dashboard, job_pages, security
from tests.conftest import eventually
from tests.web.conftest import HERE, held, letter


@pytest.fixture
def logged(monkeypatch):
    """Lines of the dashboard's log."""
    lines = []

    class Log:
        def __getattr__(self, level):
            return lambda event, **facts: lines.append({"event": event, **facts})

    for module in (actions, security, job_pages):
        monkeypatch.setattr(module, "log", Log())
    return lines


async def test_pausing_resuming_purging(browser, raw, logged):
    raw.xadd("stream:{q}", {"job": "{}"})
    letter(raw)
    assert (await browser.do("pause", queue="q"))["message"] == "q is paused"
    assert b"by local at 20" in raw.hget("stream:{q}:meta", "paused")
    assert "Paused by local" in await browser.text("/queue?queue=q")
    assert (await browser.do("resume", queue="q"))["message"] == "q goes on"
    assert raw.hget("stream:{q}:meta", "paused") is None
    assert (await browser.do("purge", queue="q", place="dead"))["message"] == "1 dead of q deleted"
    assert (await browser.do("purge", queue="q", place="ready"))["message"] == "1 ready of q deleted"
    assert (await browser.do("purge", queue="q", place="running"))["ok"] is False
    assert [(line["action"], line["who"], line["ok"]) for line in logged] == [
        ("pause", "local", True), ("resume", "local", True), ("purge", "local", True), ("purge", "local", True),
        ("purge", "local", False),
    ]  # fmt: skip


async def test_pending_jobs_of_the_dead_and_of_the_living(browser, raw, logged):
    held(raw, 3)
    rows = await browser.rows("/pending?queue=q")
    assert len(rows) == 3
    assert "vanished and still holds 3 jobs" in await browser.text("/pending")
    told = await browser.do("release", row=[rows[0]])
    assert told == {"ok": True, "message": "1 released"}
    assert (await browser.do("release", row=[rows[0]]))["message"] == "1 had moved on and were left alone"
    assert (await browser.do("bury", row=[rows[1]], reason="because"))["ok"]
    assert raw.xrange("stream:{q}:dead")[0][1][b"reason"] == b"because"
    raw.hset("streamworker:worker:worker-gone", "pid", "1")  # it was only slow
    told = await browser.do("drop", row=[rows[2]])
    assert not told["ok"]
    assert "left alone: their workers live" in told["message"]
    assert raw.xpending("stream:{q}", "workers")["pending"] == 1
    assert (await browser.do("drop", row=[rows[2]], force="yes"))["ok"]
    assert raw.xpending("stream:{q}", "workers")["pending"] == 0
    assert logged[0]["rows"][0].startswith("q/1")
    assert (await browser.do("release"))["message"] == "nothing is ticked"


async def test_dead_letters(browser, raw, logged):
    for n in range(4):
        letter(raw, id=f"d{n}", error=f"Error {n}", job=json.dumps({"id": f"d{n}", "payload": {}, "attempt_count": 3}))
    page = await browser.text("/dead?search=ERROR+2")
    assert "d2" in page
    assert "Error 1" not in page
    rows = await browser.rows("/dead")
    told = await browser.do("replay", row=rows[:2])
    assert told == {"ok": True, "message": "2 replayed"}
    assert (await browser.do("erase", row=rows))["message"] == "2 deleted; 2 had moved on and were left alone"
    assert raw.xlen("stream:{q}:dead") == 0
    assert [json.loads(fields[b"job"])["hop"] for _, fields in raw.xrange("stream:{q}")] == [1, 1]


async def test_who_looked_who_failed_to_log_in_and_who_forged_is_logged(site_of, raw, logged):
    entry = letter(raw)
    async with site_of(user="ada", password="right", auth=("ada", "right")) as browser:
        await browser.text(f"/payload?place=dead&queue=q&id={entry}")
        assert [(line["event"], line["who"]) for line in logged] == [("dashboard_payload_shown", "ada")]
        assert "s3cret" not in str(logged)
        assert (await browser.get("/", auth=("ada", "wrong"))).status_code == 401
        assert (await browser.post("erase", {"row": "x"}, {"origin": "https://evil.example"})).status_code == 403
    assert [line["event"] for line in logged[1:]] == ["dashboard_login_refused", "dashboard_forged_request"]
    assert "wrong" not in str(logged)


async def test_delayed_jobs(browser, raw, logged):
    for name in ("a/1", "b"):
        raw.zadd("stream:{q}:due", {f"normal/{name}/x": 5_000_000_000_000})
        raw.hset("stream:{q}:bodies", f"normal/{name}/x", json.dumps({"id": name, "payload": {}}))
    rows = await browser.rows("/delayed")
    assert (await browser.do("hasten", row=[rows[0]]))["message"] == "1 made ready"
    assert (await browser.do("forget", row=[rows[1]]))["message"] == "1 deleted"
    assert raw.zcard("stream:{q}:due") == 0
    assert [json.loads(fields[b"job"])["id"] for _, fields in raw.xrange("stream:{q}")] == ["a/1"]


async def test_what_waits_behind_order_keys_is_shown(browser, raw):
    raw.xadd("stream:{q}", {"job": "{}"})
    raw.hset("stream:{q}:meta", "waiting", 1234)
    raw.hset("stream:{q}:halted", "k", "job")
    page = await browser.text("/")
    assert "+ 1,234</span>" in page and "1 halted</span>" in page


async def test_many_at_a_rate_in_the_background(browser, raw, logged):
    for n in range(30):
        letter(raw, id=f"d{n}", kind="good" if n % 2 else "bad")
    await browser.text("/")
    told = await browser.do("campaign", what="replay", queue="q", kind="good", rate="200")
    assert told["ok"]
    campaigns = browser.site.monitor.bulk_jobs
    await eventually(lambda: campaigns.told()[0]["state"] == "done")
    assert campaigns.told()[0] | {"done": 15, "gone": 0, "refused": 0, "who": "local"} == campaigns.told()[0]
    assert (raw.xlen("stream:{q}:dead"), raw.xlen("stream:{q}")) == (15, 15)

    await browser.do("campaign", what="erase", rate="1")
    await eventually(lambda: campaigns.told()[1]["done"] >= 1)
    name = campaigns.told()[1]["id"]
    assert (await browser.do("stop", id=name))["message"] == "Stopped"
    await eventually(lambda: campaigns.told()[1]["state"] == "stopped")
    assert raw.xlen("stream:{q}:dead") > 10
    assert (await browser.do("dismiss", id=name))["ok"]
    assert len(campaigns.told()) == 1
    assert {line["event"] for line in logged} == {"dashboard_action"}


async def test_everything_of_a_dead_worker_at_once(browser, raw):
    held(raw, 150)
    await browser.text("/")
    await browser.do("campaign", what="release", worker="worker-gone")
    await eventually(lambda: raw.xpending("stream:{q}", "workers")["pending"] == 0)
    assert raw.xlen("stream:{q}") == 150
    assert "worker-gone" in await browser.text("/workers")
    assert (await browser.do("prune", worker="worker-gone"))["message"] == "worker-gone is forgotten"
    assert raw.xinfo_consumers("stream:{q}", "workers") == []


async def test_delayed_jobs_due_at_the_same_moment_are_all_reached(browser, raw):
    pipe = raw.pipeline()
    for n in range(1200):
        pipe.zadd("stream:{q}:due", {f"normal/j{n}/x": 5_000_000_000_000})
        pipe.hset("stream:{q}:bodies", f"normal/j{n}/x", json.dumps({"id": f"j{n}", "payload": {}}))
    pipe.execute()
    await browser.text("/")
    await browser.do("campaign", what="forget", queue="q")
    await eventually(lambda: raw.zcard("stream:{q}:due") == 0, 30)


async def test_one_job_id_wherever_it_lies(browser, raw):
    letter(raw, id="job-0")
    held(raw, 1)
    page = await browser.text("/jobs?id=job-0")
    assert "Dead letters" in page
    assert "held by" in page
    assert "Not on the server" in await browser.text("/jobs?id=nobody")


async def test_whoever_watches_is_told(browser, raw):
    raw.xadd("stream:{q}", {"job": "{}"})
    monitor, told = browser.site.monitor, []
    events = monitor.events()
    with anyio.fail_after(20):
        while len(told) < 2:
            if await anext(events) and monitor.look is not None:
                told.append(monitor.told())
    assert (told[0]["counts"]["running"], told[0]["point"].ready) == (0, 1)
    assert monitor.watchers == 1
    await events.aclose()
    assert monitor.watchers == 0


async def test_streams_of_events_end_when_the_program_does(browser):
    monitor = browser.site.monitor
    with anyio.fail_after(20):
        async for _ in monitor.events():
            monitor.leave()
    assert monitor.watchers == 0


async def test_mounted_under_a_path(site_of, raw):
    entry = letter(raw)
    async with site_of(app=lambda site: Starlette(routes=[Mount("/ops/jobs", site)]), prefix="/ops/jobs") as browser:
        page = await browser.text("/dead")
        assert 'href="/ops/jobs/static/app.css' in page
        assert f"/ops/jobs/show?place=dead&amp;queue=q&amp;id={entry}" in page
        assert (await browser.get("/static/app.css")).status_code == 200
        browser.client.cookies.clear()
        assert "Path=/ops/jobs" in (await browser.get("/")).headers["set-cookie"]
        assert (await browser.do("erase", row=await browser.rows("/dead")))["ok"]
    assert raw.xlen("stream:{q}:dead") == 0


async def test_the_application_around_it_says_who_it_is(site_of, raw, logged):
    class User:
        display_name = "ada"

    def around(site):
        async def app(scope, receive, send):
            await site({**scope, "user": User()}, receive, send)

        return app

    async with site_of(app=around, outer=True) as browser:
        await browser.do("pause", queue="q")
        assert (await browser.get("/", headers={"host": "ops.example.com"})).status_code == 200
    assert logged[0]["who"] == "ada"


async def test_a_server_that_goes_away_is_said(own_server):
    with own_server.client() as client:
        client.xadd("stream:{q}", {"job": "{}"})
    site = dashboard(App(settings=Settings(redis_url=own_server.url)), access=Access())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site), base_url=HERE) as client:
        assert (await client.get("/")).status_code == 200
        own_server.kill()
        await eventually(lambda: site.monitor.trouble)
        assert "does not answer" in (await client.get("/")).text  # what was seen last, and why it is old
        answer = await client.get("/pending")
        assert answer.status_code == 503
        assert "does not answer" in answer.text
        own_server.start()
        await eventually(lambda: not site.monitor.trouble, 20)
        assert (await client.get("/pending")).status_code == 200
    await site.aclose()


async def test_a_server_that_refuses_writes_is_said_and_no_worker_has_vanished_by_that(own_server):
    """Reads go on, so that all looked well but the workers, whose heartbeats were refused, too."""
    with own_server.client() as client:
        held(client)
        site = dashboard(App(settings=Settings(redis_url=own_server.url, lease=1)), access=Access())
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site), base_url=HERE) as browser:
            assert "worker-gone vanished" in (await browser.get("/")).text
            client.config_set("min-replicas-to-write", 1)
            await eventually(lambda: site.monitor.alert, 20)
            for path in ("/", "/pending", "/workers", "/queue?queue=q"):
                page = (await browser.get(path)).text
                alert = re.search(r'role="alert"([^>]*)>([^<]*)', page)
                assert alert is not None and "hidden" not in alert[1]
                assert "refuses writes (NOREPLICAS): too few replicas follow it" in alert[2]
                assert "vanished" not in page, path
            assert "no sign of life" in page
            client.config_set("min-replicas-to-write", 0)
            await eventually(lambda: not site.monitor.alert, 20)

            async def vanished() -> bool:
                return "worker-gone vanished" in (await browser.get("/")).text

            await eventually(vanished, 20)  # it could say that it lives for a lease, and did not
        await site.aclose()


@pytest.mark.parametrize("ahead", [3600, -3600])
async def test_ages_and_moments_are_those_of_the_server(browser, raw, monkeypatch, ahead):
    """The clock of the dashboard's machine is an hour wrong."""
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + ahead)
    letter(raw)
    raw.zadd("stream:{q}:due", {"normal/later/0": (true() + 600) * 1000})
    raw.hset("stream:{q}:bodies", "normal/later/0", '{"id": "later", "payload": {}}')
    handle = raw.xrange("stream:{q}:dead")[0][0].decode()
    for path in ("/dead", f"/show?place=dead&queue=q&id={handle}"):
        shown = re.search(r'<time datetime="([^"]+)"[^>]*>([^<]+)', await browser.text(path))
        assert shown is not None
        assert abs(datetime.fromisoformat(shown[1]).timestamp() - true()) < 60, path
        assert re.fullmatch(r"[\d.]+s ago", shown[2]), shown[2]
    assert re.search(r">in (9m \d\ds|10m 00s)<", await browser.text("/delayed"))
    await browser.do("pause", queue="q")
    note = raw.hget("stream:{q}:meta", "paused").decode()
    assert abs(datetime.fromisoformat(note.split()[-1]).timestamp() - true()) < 60, note
    assert abs(json.loads((await browser.get("/points")).text)[-1][0] - true()) < 60


@pytest.mark.parametrize("cut", [False, True])
async def test_below_a_path_of_a_proxy(site_of, raw, cut):
    """The proxy passes the path on, or cuts it off: links, files, redirects, cookie and buttons are below it."""
    letter(raw)
    async with site_of(prefix="/ops") as browser:
        prefix, browser.prefix = browser.prefix, "" if cut else browser.prefix
        for path in ("/", "/dead", "/queue?queue=q", "/static/nope.css"):
            page = (await browser.get(path)).text
            links = re.findall(r'(?:href|src|hx-get)="(/[^"]*)', page)
            assert links
            assert all(link.startswith(f"{prefix}/") for link in links), links
            assert not any("/static/static" in link for link in links)
        assert 'aria-current="page">Dead' in await browser.text("/dead")
        assert (await browser.get("/static/app.css")).status_code == 200
        assert (await browser.get("/dead/")).headers["location"] == f"{prefix}/dead"
        assert (await browser.client.get(prefix)).headers["location"] == f"{prefix}/"
        browser.client.cookies.clear()
        assert f"Path={prefix};" in (await browser.get("/")).headers["set-cookie"]
        browser.prefix = prefix  # a browser sends the cookie there alone
        assert (await browser.do("erase", row=await browser.rows("/dead")))["ok"]
    assert raw.xlen("stream:{q}:dead") == 0


async def test_redirects_keep_the_browsers_scheme_and_host(browser):
    for path, place in (
        ("/dead/?queue=q", "/dead?queue=q"),
        ("//evil.example/dead/", None),
        ("/\\evil.example/", None),
    ):
        answer = await browser.get(path, headers={"x-forwarded-proto": "https"})
        found = answer.headers.get("location")
        assert found == place or (place is None and (found or "/x")[1] not in "/\\"), (path, found)


async def test_a_refused_origin_says_what_to_do(site_of, raw, logged):
    async with site_of(
        user="me", password="x", auth=("me", "x"), origins=("https://Ops.example.com:8443/",)
    ) as browser:
        good = {"x-csrf-token": await browser.token(), "host": "dash:8787", "sec-fetch-site": "same-origin"}
        told = await browser.post("pause", {"queue": "q"}, {**good, "origin": "https://other.example.com"})
        assert told.status_code == 403
        assert "start it with --origin https://other.example.com" in told.text
        assert logged[-1]["reason"] == told.text.strip()
        assert logged[-1]["host"] == "dash:8787"
        cross = await browser.post(
            "pause", {"queue": "q"}, {**good, "origin": "https://e.example", "sec-fetch-site": "cross-site"}
        )
        assert "Another site's page" in cross.text
        assert "--origin" not in cross.text
        stale = await browser.post(
            "pause", {"queue": "q"}, {**good, "origin": "https://dash:8787", "x-csrf-token": "x" * 43}
        )
        assert "load the page anew" in stale.text
        fine = await browser.post("pause", {"queue": "q"}, {**good, "origin": "https://ops.example.com:8443"})
        assert fine.status_code == 200


@pytest.mark.parametrize(
    ("proxies", "forwarded", "client"),
    [
        ((), "203.0.113.9", "127.0.0.1"),
        (("127.0.0.0/8",), "203.0.113.9", "203.0.113.9"),
        (("127.0.0.1", "10.0.0.0/8"), "6.6.6.6, 203.0.113.9, 10.1.2.3", "203.0.113.9"),
        (("127.0.0.1",), "203.0.113.9, 10.1.2.3", "10.1.2.3"),
        (("127.0.0.1",), "<script>", "127.0.0.1"),
        (("10.0.0.0/8",), "203.0.113.9", "127.0.0.1"),
    ],
)
async def test_the_log_names_the_browser_if_its_proxy_is_trusted(site_of, raw, logged, proxies, forwarded, client):
    async with site_of(proxies=proxies) as browser:
        headers = {"x-csrf-token": await browser.token(), "origin": HERE, "x-forwarded-for": forwarded}
        assert (await browser.post("pause", {"queue": "q"}, headers)).status_code == 200
        assert logged[-1]["client"] == client
        browser.client.cookies.clear()
        answer = await browser.get("/", headers={"x-forwarded-for": forwarded, "x-forwarded-proto": "https"})
        assert ("Secure" in answer.headers["set-cookie"]) is ("127" in str(proxies))


async def test_a_form_of_unknown_length_is_named(browser):
    async def chunks():
        yield b"queue=q"

    headers = {"x-csrf-token": await browser.token(), "origin": HERE}
    answer = await browser.client.post("/do/pause", content=chunks(), headers=headers)
    assert answer.status_code == 411
    assert "Content-Length" in answer.text


async def test_files_are_kept_for_as_long_as_they_are_the_present_ones(browser):
    for path in re.findall(r'"(/static/[^"]+)"', await browser.text("/")):
        answer = await browser.get(path)
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable", path
        again = await browser.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304
        for other in (path.partition("?")[0], path.partition("?")[0] + "?old"):
            assert (await browser.get(other)).headers["cache-control"] == "no-cache"
