"""Flows in the dashboard: the list, the graph of 5 nodes and of 500, on a phone, by keyboard, live; what operators do."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from streamworker import App, Flow, Settings, chain, group
from streamworker.web import Access, dashboard
from tests import forkserver
from tests.cli.conftest import ROOT, Running
from tests.conftest import eventually_blocking
from tests.postgres.conftest import database_url, migrated, pg, postgres
from tests.postgres.databases import beside
from tests.postgres.test_flows import Step, Sum, end, look, order, started, states
from tests.web.chromium import Chromium, program
from tests.web.conftest import HERE, LOOKS, Browser
from tests.web.test_browser import READ

__all__ = ["database_url", "migrated", "pg", "postgres"]

HOSTILE = "<script>alert(1)</script>\u202e"
needs_chromium = [
    pytest.mark.all,
    pytest.mark.skipif(program() is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.timeout(180),
]


@pytest.fixture
async def site(redis_url, database_url):
    site = dashboard(App(settings=Settings(redis_url=redis_url, database_url=database_url)), access=Access())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site), base_url=HERE) as client:
        yield Browser(client)
    await site.aclose()


async def test_flows_are_listed_filtered_and_paged(site, pg):
    assert "await app.start(flow, connection=pg)" in await site.text("/flows")
    for n in range(52):
        flow_id = await started(pg, chain(Step(n=n), Sum(), name="export" if n else HOSTILE, key=f"key-{n}"))
    await end(pg, flow_id, "step", "dead")
    page = await site.text("/flows")
    assert page.count("<tr data-open") == 50
    assert "2 failed" in page and "<script>alert" not in page and "\u202e" not in page
    older = page.split('rel="next" href="')[1].split('"')[0].replace("&amp;", "&")
    page = await site.text(older)
    assert page.count("<tr data-open") == 2 and 'rel="next"' not in page
    assert "key-51" in await site.text("/flows?status=failed")
    assert (await site.text("/flows?status=running&name=export")).count("<tr data-open") == 50
    assert "none that fit" in await site.text("/flows?status=completed")
    assert "key-7" in await site.text("/flows?id=key-7")  # by its key
    assert "Not in the ledger" in await site.text("/flows?id=none")
    for nonsense in ("/flows?status=odd", "/flows?after=x", "/flows?after=2026-01-01|x"):
        assert (await site.get(nonsense)).status_code == 400, nonsense


async def test_without_a_ledger_it_says_so(redis_url):
    site = dashboard(App(settings=Settings(redis_url=redis_url)), access=Access())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site), base_url=HERE) as client:
        assert "set DATABASE_URL" in await Browser(client).text("/flows?id=x")
    await site.aclose()


async def test_operators_cancel_retry_and_delete_and_viewers_look(redis_url, database_url, pg):
    flow_id = await started(pg, order()[0])
    await end(pg, flow_id, "charge")
    access = Access(user="ann", password="a", viewer="vic", viewer_password="v")
    site = dashboard(App(settings=Settings(redis_url=redis_url, database_url=database_url)), access=access)
    transport = httpx2.ASGITransport(app=site, client=("127.0.0.1", 5))
    try:
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, auth=("vic", "v")) as client:
            viewer = Browser(client)
            page = await viewer.text(f"/flows?id={flow_id}")
            assert "charge" in page and "data-do=" not in page
            token = await viewer.token()
            answer = await viewer.post("flow-cancel", {"id": flow_id}, {"x-csrf-token": token, "origin": HERE})
            assert answer.status_code == 403
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, auth=("ann", "a")) as client:
            ann = Browser(client)
            assert (await ann.do("flow-delete", id=flow_id)) == {
                "ok": False,
                "message": "order has not ended: cancel it first",
            }
            assert (await ann.do("flow-cancel", id=flow_id))["message"] == "order is cancelled"
            await look(pg)
            assert not (await ann.do("flow-cancel", id=flow_id))["ok"]
            assert (await ann.do("flow-retry", id=flow_id))["message"] == "order: 3 jobs are queued"
            assert (await states(pg, flow_id))["ship"] == "blocked"
            assert (await ann.do("flow-cancel", id=flow_id))["ok"]
            await look(pg)
            assert (await ann.do("flow-delete", id=flow_id))["ok"]
            assert (await ann.do("flow-delete", id=flow_id))["message"] == f"the ledger knows no flow {flow_id}"
    finally:
        await site.aclose()
    kept = await pg.fetch("select * from streamworker.audit where job_id = $1 order by id", flow_id)
    assert [(row["who"], row["source"], row["action"], row["result"]) for row in kept] == [
        ("ann", "dashboard", "delete flow", "gone"),
        ("ann", "dashboard", "cancel flow", "done"),
        ("ann", "dashboard", "cancel flow", "gone"),
        ("ann", "dashboard", "retry flow", "done"),
        ("ann", "dashboard", "cancel flow", "done"),
        ("ann", "dashboard", "delete flow", "done"),
    ]


async def test_a_flow_too_large_to_draw_is_cut_and_says_so(site, pg):
    await started(pg, chain(Step(), group(*(Step(n=n) for n in range(1200)), name="many"), key="large"))
    page = await site.text("/flows?id=large")
    assert "the first 998 of 1,201 jobs" in page
    wide = Flow("wide", key="wide")
    first = [wide.add(Step(n=n)) for n in range(150)]
    for n in range(150):
        wide.add(Step(n=n), after=first)
    await started(pg, wide)
    page = await site.text("/flows?id=wide")
    assert "it has too many edges to draw them" in page


# -- in Chromium


class Served:
    """The program ``streamworker dashboard`` with a ledger, and a page of it."""

    def __init__(self, url: str, page: Chromium) -> None:
        self.url, self.page = url, page

    def open(self, path: str) -> None:
        self.page.open(self.url + path)

    def yes(self) -> None:
        self.page.until("document.querySelector('#confirm').open")
        self.page.click("#confirm-yes")

    def shoot(self, name: str) -> None:
        if (shots := os.environ.get("STREAMWORKER_TEST_SHOTS")) is not None:
            self.page.screenshot(Path(shots) / f"{name}.png")


@pytest.fixture
def served(redis_url: str, database_url: str, chromium: Chromium, tmp_path: Path) -> Iterator[Served]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")}
    env = {**clean, "REDIS_URL": redis_url, "DATABASE_URL": database_url, "PYTHONPATH": str(ROOT)}
    running = Running(
        forkserver.forked(["dashboard", "--listen", "127.0.0.1:0"], cwd=tmp_path, env=env, constants=LOOKS)
    )
    eventually_blocking(lambda: running.saw("dashboard_ready"), 30)
    url = next(json.loads(line)["url"] for line in running.lines if "dashboard_ready" in line).rstrip("/")
    chromium.size(1400, 900)
    chromium.complaints.clear()
    yield Served(url, chromium)
    complaints = list(chromium.complaints)
    running.signal(signal.SIGTERM)
    try:
        assert running.wait(15) == 0
    finally:
        running.kill()
        chromium.leave()
        running.process.stderr.close()
    assert complaints == []


def five() -> Flow:
    flow = Flow("order", key="A-1017")
    charge = flow.add(Step(n=1), name="charge")
    pack, label = flow.add(Step(n=2), name="pack", after=charge), flow.add(Step(n=3), name="label", after=charge)
    flow.add(Step(n=4), name="ship", after=[pack, label])
    flow.add(Step(n=5), name="refund", after={charge: "ok", pack: "failed"})
    return flow


def drawn(size: int) -> Flow:
    """What has no structure to fold."""
    chance, flow, nodes = random.Random(3), Flow("drawn", key="drawn"), []
    for n in range(size):
        after = chance.sample(nodes, min(len(nodes), chance.randint(0 if n < 20 else 1, 3)))
        nodes.append(flow.add(Step(n=n), name=f"resize-{n}", after=after[-3:]))
    return flow


def fan(size: int) -> Flow:
    """One, many side by side, one."""
    return chain(Step(n=0), group(*(Step(n=n) for n in range(size - 2)), name="pages"), Sum(), name="export", key="fan")


async def prepared(database_url: str, flows: list[Flow], ends: Any = ()) -> list[str]:
    import asyncpg

    connection = await asyncpg.connect(database_url)
    try:
        ids = [await started(connection, flow) for flow in flows]
        for place, name, status in ends:
            await end(connection, ids[place], name, status)
        await connection.execute("update streamworker.jobs set started_at = finished_at - interval '140 ms' where status in ('completed', 'dead')")  # fmt: skip
        return ids
    finally:
        await connection.close()


def legible(served: Served, width: int) -> Any:
    """Nothing overlaps, nothing is cut off or too faint to read, and lines end at the nodes."""
    page = served.page
    page.until("document.querySelectorAll('[data-graph] path').length > 0")
    found = page.value(READ)
    assert (found["poor"], found["nameless"], found["wide"]) == ([], [], [])
    return page.value(
        """(() => {
  const rects = [...document.querySelectorAll('[data-graph] .node')].map((node) => node.getBoundingClientRect());
  let overlaps = 0;
  rects.forEach((a, i) => rects.slice(i + 1).forEach((b) => { overlaps += a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1; }));
  const inner = document.querySelector('[data-graph]').getBoundingClientRect();
  const sizes = [...document.querySelectorAll('[data-graph] b')].map((node) => parseFloat(getComputedStyle(node).fontSize));
  const upward = [...document.querySelectorAll('[data-graph] path')].filter((path) => { const box = path.getAttribute('d').match(/[\\d.]+/g).map(Number); return box[1] >= box[7]; });
  return { overlaps, boxes: rects.length, links: document.querySelectorAll('[data-graph] a').length, lines: document.querySelectorAll('[data-graph] path').length,
    outside: rects.filter((a) => a.left < inner.left || a.right > inner.right).length, smallest: Math.min(...sizes), upward: upward.length,
    cell: Math.min(...[...document.querySelectorAll('[data-graph] a')].map((a) => Math.min(a.getBoundingClientRect().width, a.getBoundingClientRect().height))),
    page: document.documentElement.scrollWidth, height: inner.height };
})()"""
    )


class TestInChromium:
    pytestmark = needs_chromium

    def test_graphs_are_legible_at_5_and_at_500_nodes(self, served, database_url):
        ends = [(0, "charge", "completed"), (0, "pack", "dead"), (1, "step", "completed"),
                *((1, f"pages/step-{n}", "dead" if n % 90 == 0 else "completed") for n in range(2, 300)),
                *((2, f"resize-{n}", "completed") for n in range(150))]  # fmt: skip
        beside(prepared, database_url, [five(), fan(500), drawn(500)], ends)
        for name, boxes, links in (("A-1017", 5, 5), ("fan", 3, 500), ("drawn", None, 500)):
            served.open(f"/flows?id={name}")
            for width, tone in served.page.looks(390, 1400):
                found = legible(served, width)
                served.shoot(f"flow-{name}-{width}-{tone}")
                look = (name, width, tone, found)
                assert (found["overlaps"], found["outside"], found["upward"], found["page"]) == (0, 0, 0, width), look
                assert found["links"] == links and found["cell"] >= 14 and found["smallest"] >= 11, look
                assert found["boxes"] == boxes or (boxes is None and found["boxes"] > 300), look
        served.open("/flows")
        for width, tone in served.page.looks(390, 1400):
            found = served.page.value(READ)
            served.shoot(f"flows-{width}-{tone}")
            assert (found["poor"], found["nameless"], found["wide"]) == ([], [], []), (width, tone)
            assert served.page.value("document.documentElement.scrollWidth") == width

    def test_it_is_live_and_leads_to_the_job_and_back(self, served, database_url):
        (flow_id,) = beside(prepared, database_url, [five()])
        served.open("/flows")
        page = served.page
        page.click("tbody tr td a")
        page.until("location.search.startsWith('?id=') && document.querySelectorAll('[data-graph] path').length === 6")
        page.until("[...document.querySelectorAll('.node.queued b')].map((b) => b.innerText).join() === 'charge'")
        beside(ended, database_url, flow_id, "charge")
        page.until("[...document.querySelectorAll('.node.queued b')].map((b) => b.innerText).join() === 'pack,label'")
        page.until("document.querySelectorAll('[data-graph] path').length === 6")  # the lines stay
        assert "ok · 140 ms" in page.value("document.querySelector('.node.ok').innerText")
        page.click(".node.ok a")
        page.until("location.pathname === '/jobs' && document.readyState === 'complete'")
        page.until("document.querySelector('.facts')?.innerText.includes('its node charge')")
        page.click(".facts a[href*='/flows']")
        page.until("location.pathname === '/flows' && !!document.querySelector('[data-graph]')")

    def test_it_is_used_with_the_keyboard_alone(self, served, database_url):
        beside(prepared, database_url, [five(), fan(500)], [(0, "charge", "completed")])
        served.open("/")
        page = served.page
        page.value("Date.now = (now => () => now)(Date.now())")
        page.press("g", "l")
        page.until("location.pathname === '/flows' && document.readyState === 'complete' && typeof htmx === 'object'")
        page.press("j", "j", "Enter")  # the older of two
        page.until("location.search.startsWith('?id=') && document.querySelectorAll('[data-graph] .node').length === 5")
        page.until("typeof htmx === 'object' && document.querySelectorAll('[data-graph] path').length === 6")
        assert page.value("document.querySelectorAll('[data-graph] a[tabindex=\"0\"]').length") == 1  # one stop of tab
        page.value("document.querySelector('[data-graph] a[tabindex=\"0\"]').focus()")
        at = "document.activeElement.innerText.split('\\n')[0]"
        assert page.value(at) == "charge"
        for key, name in (
            ("ArrowDown", ("pack", "label")),
            ("ArrowDown", ("ship", "refund")),
            ("ArrowUp", ("pack", "label")),
        ):
            page.press(key)
            assert page.value(at) in name, (key, page.value(at))
        assert page.value("document.querySelectorAll('[data-graph] path.on').length") >= 2  # its own lines stand out
        before = page.value(at)
        page.press("ArrowRight" if before == "pack" else "ArrowLeft")
        assert {before, page.value(at)} == {"pack", "label"}
        number = page.value("document.querySelector('#pulse').className")
        page.until("document.querySelector('#pulse').classList.contains('beat')")
        assert page.value(at) in ("pack", "label"), number  # a look has come, and the focus stayed
        page.press("Enter")
        page.until("location.pathname === '/jobs' && document.readyState === 'complete'")
        served.open("/flows?id=fan")
        page.until("document.querySelectorAll('[data-graph] path').length === 2")
        page.value("document.querySelector('[data-graph] .cell').focus()")
        label = "document.activeElement.getAttribute('aria-label')"
        assert page.value(label) == "pages/step: blocked"
        page.press("ArrowRight", "ArrowRight")
        assert page.value(label) == "pages/step-3: blocked"
        page.press("ArrowDown")
        assert page.value(label) not in ("pages/step-3: blocked", None)

    def test_cancel_and_retry_by_mouse(self, served, database_url):
        (flow_id,) = beside(prepared, database_url, [five()], [(0, "charge", "dead")])
        served.open(f"/flows?id={flow_id}")
        page = served.page
        page.until("!!document.querySelector('.status.failed')")
        page.click("[data-do=flow-retry]")
        served.yes()
        page.until("document.querySelector('.toast')?.innerText === 'order: 1 job is queued'")
        page.until("!!document.querySelector('.status.running')")
        page.click("[data-do=flow-cancel]")
        served.yes()
        page.until("[...document.querySelectorAll('.toast')].some((each) => each.innerText === 'order is cancelled')")
        beside(looked, database_url)
        page.until("!!document.querySelector('.status.cancelled')")
        page.click("[data-do=flow-delete]")
        served.yes()
        page.until("location.pathname === '/flows' && !location.search && document.readyState === 'complete'")
        page.until("document.querySelector('.empty h2')?.innerText === 'No flows'")

    def test_steps_and_waits_of_a_job(self, served, database_url):
        beside(waited, database_url)
        page = served.page
        for width in (390, 1400):
            page.size(width, 900)
            served.open("/jobs?id=job-w")
            page.until("document.querySelector('.facts').innerText.includes('the signal approved, until in')")
            steps = page.value(
                "[...document.querySelectorAll('.timeline li')].map((each) => each.innerText.replace(/\\s+/g, ' '))"
            )
            assert [step.split(" ")[0] for step in steps] == ["charge", "sleep", "approved"], steps
            assert "done" in steps[0] and "took 200 ms" in steps[0]
            assert "done" in steps[1] and "wait, waiting until in" in steps[2], steps
            found = page.value(READ)
            served.shoot(f"steps-{width}")
            assert (found["poor"], found["nameless"], found["wide"]) == ([], [], [])
            assert page.value("document.documentElement.scrollWidth") == width
        beside(signalled, database_url)  # the page is live
        page.until("!document.querySelector('.facts').innerText.includes('Waits for')")
        page.until("[...document.querySelectorAll('.timeline li')].at(-1).innerText.includes('wait, done')")


async def ended(database_url: str, flow_id: str, name: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(database_url)
    await end(connection, flow_id, name)
    await connection.execute("update streamworker.jobs set started_at = finished_at - interval '140 ms' where status in ('completed', 'dead')")  # fmt: skip
    await connection.close()


async def looked(database_url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(database_url)
    await look(connection)
    await connection.close()


async def waited(database_url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "insert into streamworker.jobs (id, queue_name, kind, payload, level, status, hop, waits_for, run_at) values"
        " ('job-w', 'q', 'k', '{}', 'normal', 'waiting', 1, 'approved', now() + interval '1 h')"
    )
    await connection.execute(
        "insert into streamworker.job_steps (job_id, queue_name, position, kind, name, value, made, hop, deliveries, until, started_at,"
        " recorded_at) values"
        " ('job-w', 'q', 0, 'step', 'charge', '1', 0, 0, 1, null, now() - interval '200 ms', now()),"
        " ('job-w', 'q', 1, 'sleep', '', null, 0, 0, 1, now() - interval '1 s', null, now()),"
        " ('job-w', 'q', 2, 'wait', 'approved', null, 0, 0, 1, now() + interval '1 h', null, now())"
    )
    await connection.close()


async def signalled(database_url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(database_url)
    assert await connection.fetchval("select streamworker.signal('job-w', 'approved', '1')")
    await connection.execute("update streamworker.jobs set status = 'completed', waits_for = null where id = 'job-w'")
    await connection.close()
