"""The page of the history: the numbers of the command line, drawn by the server."""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from pathlib import Path

import httpx2
import pytest

from streamworker import App, Settings
from streamworker.broker.redis import redis_history
from streamworker.cli import main
from streamworker.postgres.ledger_history import packed
from streamworker.telemetry.run_history import DAY, HOUR, MINUTE, RunTally, bucket_of
from streamworker.views.history import RANGES
from streamworker.web import dashboard
from tests.cli.test_history import ROWS, ran, written
from tests.postgres.conftest import *  # noqa: F403 - the fixtures of databases
from tests.web.chromium import program
from tests.web.conftest import HERE, Browser
from tests.web.test_browser import Served, served

__all__ = ["served"]


async def test_the_numbers_are_those_of_the_command_line(browser, redis_url, capsys, monkeypatch):
    await written(redis_url, ROWS)
    page = await browser.text("/history")
    monkeypatch.setenv("REDIS_URL", redis_url)
    import asyncio

    assert await asyncio.to_thread(main, ["history", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cells = [
        re.findall(r"<td[^>]*>(?:<[^>]+>)*([^<]*)", row)
        for row in re.findall(r'<tr id="h-\d+".*?</tr>', page, re.DOTALL)
    ]
    assert [(row[0], row[1], row[2]) for row in cells] == [
        (row["kind"], row["queue"], f"{row['done']:,}") for row in rows
    ]
    from streamworker.views.history import duration, percent

    for row, told in zip(cells, rows, strict=True):
        times = [duration(told[f"{what}_p{share}_s"]) for what in ("run", "wait") for share in (50, 95, 99)]
        assert row[-6:] == times
        week = told["week_before_per_s"]
        assert row[6].strip() == percent(None if week is None else told["done_per_s"] / week - 1)
    assert f"<b>{sum(row['done'] for row in rows)}</b>" in page
    # The picture has a table behind it, and says itself in a sentence.
    assert page.count('role="img"') == 3
    assert "Jobs done per second, the last 24 hours: at most" in page
    assert page.count("<tr><td>20") == 24


async def test_ranges_kinds_queues_and_the_week_before(browser, redis_url):
    await written(redis_url, ROWS)
    for name, range_ in RANGES.items():
        page = await browser.text(f"/history?range={name}")
        assert page.count("<tr><td>20") == range_.seconds // range_.coarse[1]
        assert f'aria-current="true" aria-label="{range_.words}"' in page
    page = await browser.text("/history?range=24h&queue=bills&kind=invoice.send")
    assert page.count("<tr><td>20") == 144
    assert "letter.print" not in page
    assert "a week before</li>" in page
    page = await browser.text("/history?compare=no")
    assert "a week before</li>" not in page
    assert '<th class="n lo">Week' not in page
    assert "letter.print" not in await browser.text("/history?queue=bills")
    assert 'href="/history?queue=bills">History</a>' in await browser.text("/queue?queue=bills")
    assert "Nothing ran" in await browser.text("/history?queue=nope")
    assert (await browser.get("/history?range=2h")).status_code == 400
    part = await browser.get("/history", headers={"hx-request": "true"})
    assert "<html" not in part.text and 'role="img"' in part.text


async def test_what_kinds_are_called_is_only_text(browser, redis_url):
    odd = "</td><script>window.pwned = 1</script>\u202e{{ 7 * 7 }}"
    await written(redis_url, [(90, "q", odd, ran(5))])
    page = await browser.text("/history")
    assert "<script>window" not in page
    assert "\u202e" not in page
    assert "{{ 7 * 7 }}" in page


KINDS = 40
LIMIT = 0.15
"""Seconds that no page takes; asserted loosely, since the machine of the tests is shared: see the printed ones."""


def busy(chance: random.Random) -> RunTally:
    """A thousand runs of about 20 ms that waited about 5 ms."""
    made = RunTally(1000, 990, 10, 5)
    for counts, typical in ((made.run, 0.02), (made.wait, 0.005)):
        for _ in range(100):
            bucket = bucket_of(chance.lognormvariate(0, 0.7) * typical)
            counts[bucket] = counts.get(bucket, 0) + 10
    return made


def spans(now: float):
    """(span, its begins) of sixty days."""
    for span, most in ((MINUTE, 2 * DAY), (HOUR, 60 * DAY), (DAY, 60 * DAY)):
        yield span, range(int(now // span * span - most), int(now), span)


async def page_times(site, capsys, where: str) -> dict[str, float]:
    """Milliseconds of each page, the look back read anew each time."""
    transport = httpx2.ASGITransport(app=site, client=("127.0.0.1", 5))
    seen: dict[str, float] = {}
    try:
        async with httpx2.AsyncClient(transport=transport, base_url=HERE) as client:
            browser = Browser(client)
            await browser.text("/")
            for name in RANGES:
                for more in ("", "&queue=queue3", "&queue=queue3&kind=kind.number.3"):
                    times = []
                    for _ in range(5):
                        site._site.state.history._looks.clear()
                        begun = time.perf_counter()
                        page = await browser.text(f"/history?range={name}{more}")
                        times.append((time.perf_counter() - begun) * 1000)
                        assert "Nothing ran" not in page
                    seen[f"{name}{more}"] = statistics.median(times)
    finally:
        await site.aclose()
    with capsys.disabled():
        print(f"\n{where}: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in seen.items()))
    return seen


@pytest.mark.slow
async def test_sixty_days_of_forty_kinds_in_redis(redis_url, raw, capsys):
    chance, now = random.Random(3), time.time()
    tallies = [redis_history.packed(busy(chance)) for _ in range(200)]
    keys = redis_history.QueueKeys
    for span, begins in spans(now):
        length = redis_history.PAGES[span]
        pipe = raw.pipeline(transaction=False)
        for at in begins:
            for queue in range(8):
                name = keys(f"queue{queue}").history(span, at // length * length)
                kinds = range(queue, KINDS, 8)
                pipe.hset(name, mapping={f"{at} kind.number.{kind}": chance.choice(tallies) for kind in kinds})
        pipe.execute()
    raw.zadd("stream:history", {f"queue{queue}": now for queue in range(8)})
    with capsys.disabled():
        print(f"\n{raw.info('memory')['used_memory_dataset'] / 1e6:.0f} MB in Redis")
    site = dashboard(App(settings=Settings(redis_url=redis_url)))
    seen = await page_times(site, capsys, "Redis")
    assert max(seen.values()) < 20 * LIMIT * 1000


FILL = """
insert into streamworker.history
select $1, to_timestamp(at), 'queue' || kind % 8, 'kind.number.' || kind, 1000, 990, 10, 5,
  ($4::text[])[1 + (at / $1 + kind) % 200]::numeric, ($5::text[])[1 + (at / $1 + kind) % 200]::numeric
from generate_series($2::bigint, $3::bigint, $1) as at, generate_series(0, 39) as kind"""


@pytest.mark.slow
async def test_sixty_days_of_forty_kinds_in_postgresql(redis_url, database_url, pg, capsys):
    chance, now = random.Random(3), time.time()
    tallies = [busy(chance) for _ in range(200)]
    runs, waits = [packed(each.run) for each in tallies], [packed(each.wait) for each in tallies]
    for span, begins in spans(now):
        await pg.execute(FILL, span, begins[0], begins[-1], runs, waits)
    await pg.execute("vacuum analyze streamworker.history")
    size = await pg.fetchval("select pg_total_relation_size('streamworker.history')")
    with capsys.disabled():
        print(f"\n{size / 1e6:.0f} MB in PostgreSQL")
    site = dashboard(App(settings=Settings(redis_url=redis_url, database_url=database_url)))
    seen = await page_times(site, capsys, "PostgreSQL")
    assert max(seen.values()) < 20 * LIMIT * 1000


@pytest.mark.all
@pytest.mark.skipif(program() is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.timeout(180)
class TestInChromium:
    async def test_by_mouse_and_by_keyboard_light_and_dark_wide_and_narrow(
        self, served: Served, redis_url, tmp_path: Path
    ):
        chance = random.Random(1)
        await written(redis_url, [
            (hours * HOUR + 60, "billing" if number < 2 else "post", kind,
             ran(int(200 * (1 + number) * chance.uniform(0.5, 1.5)), run=chance.lognormvariate(number - 4, 0.5),
                 wait=chance.lognormvariate(-3, 1), failed=chance.choice([0, 0, 3])))
            for hours in range(24 * 9)
            for number, kind in enumerate(["invoice.send", "invoice.remind", "letter.print", "user.delete"])
        ])  # fmt: skip
        page = served.page
        served.open("/")
        page.until("document.querySelector('#pulse').classList.contains('on')")
        page.press("g", "h")
        page.until("location.pathname === '/history' && document.querySelectorAll('.plot svg path.done').length === 1")
        wide = "document.documentElement.scrollWidth <= innerWidth"
        for width in (1400, 390):
            for dark in (False, True):
                page.size(width, 900, dark=dark)
                page.until(wide)
                page.screenshot(tmp_path / f"history-{width}-{'dark' if dark else 'light'}.png")
        page.size(1400, 900)
        page.click('.ranges a[aria-label="the last 7 days"]')
        page.until(
            "location.search.includes('range=7d') && document.querySelector('.ranges [aria-current]').innerText === '7d'"
        )
        page.until("document.querySelectorAll('path.before').length >= 3")
        page.click("[aria-pressed]")
        page.until("location.search.includes('compare=no') && !document.querySelector('path.before')")
        # To a kind by the keys of every listing, and to the numbers behind the picture by the tab key alone.
        page.until("document.readyState === 'complete' && document.querySelector('#pulse').classList.contains('on')")
        page.press("j", "Enter")
        page.until(
            "location.search.includes('kind=user.delete') && document.querySelector('h1').innerText.includes('user.delete')"
        )
        page.screenshot(tmp_path / "history-kind.png")
        page.until("document.readyState === 'complete' && document.querySelector('#pulse').classList.contains('on')")
        page.until("(document.querySelector('.numbers summary').focus(), document.activeElement.tagName === 'SUMMARY')")
        page.press("Enter")
        page.until(
            "document.querySelector('.numbers').open && document.querySelectorAll('.numbers tbody tr').length === 84"
        )
        assert ": done " in page.value("document.querySelector('.plot rect title').textContent")
