"""The jobs of the ledger in the dashboard: found, with all their attempts, cancelled and queued again."""

from __future__ import annotations

import json

import httpx2
import pytest

from streamworker import App, Settings
from streamworker.web import Access, dashboard
from tests.postgres.conftest import database_url, migrated, pg, postgres
from tests.web.conftest import HERE, Browser, letter

__all__ = ["database_url", "migrated", "pg", "postgres"]

HOSTILE = "<script>alert(1)</script>\u202e"


@pytest.fixture
async def ledger(redis_url, database_url):
    site = dashboard(App(settings=Settings(redis_url=redis_url, database_url=database_url)), access=Access())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site), base_url=HERE) as client:
        yield Browser(client)
    await site.aclose()


async def remember(pg, job_id, status="completed", queue="q", kind="k", made="now()", error=None):
    await pg.execute(
        "insert into streamworker.jobs (id, queue_name, kind, payload, level, status, hop, created_at, last_error, result) "
        f"values ($1, $2, $3, $4, 'normal', $5, 1, {made}, $6, $7)",
        job_id, queue, kind, json.dumps({"secret": "s3cret"}), status, error, json.dumps("the r3sult"),
    )  # fmt: skip


async def attempt(pg, job_id, hop, outcome, error=None):
    await pg.execute(
        "insert into streamworker.job_logs (job_id, hop, deliveries, attempt, worker_id, started_at, finished_at, outcome, "
        "error) values ($1, $2::bigint, 1, ($2::bigint + 1)::int, 'worker-a', now() - interval '3 s', now(), $3, $4)",
        job_id, hop, outcome, error,
    )  # fmt: skip


async def test_one_job_with_all_its_attempts(ledger, pg, raw):
    await remember(pg, "job-1", "dead", kind=HOSTILE, error=HOSTILE)
    await attempt(pg, "job-1", 0, "raised", f"Traceback\n  line\nValueError: {HOSTILE}")
    await attempt(pg, "job-1", 1, "timed_out")
    letter(raw, id="job-1")
    page = await ledger.text("/jobs?id=job-1")
    assert page.index("attempt 1") < page.index("attempt 2")
    assert "timed out" in page
    assert "ValueError" in page
    assert "Dead letters" in page  # and where it lies now
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert "s3cret" not in page
    assert "r3sult" not in page
    shown = await ledger.text("/remembered?id=job-1")
    assert "s3cret" in shown
    assert "the r3sult" in shown
    assert "Nobody knows this job" in await ledger.text("/jobs?id=nobody")


async def test_jobs_are_found_by_what_they_are(ledger, pg):
    for n in range(150):
        await remember(pg, f"job-{n:03}", "dead" if n % 2 else "completed", made=f"now() - interval '{n} s'")
    await remember(pg, "other", queue="r", kind="else")
    page = await ledger.text("/jobs?queue=q")
    assert "job-000" in page
    assert "id=job-100" not in page
    assert "id=other" not in page
    older = page.split('rel="next" href="')[1].split('"')[0].replace("&amp;", "&")
    page = await ledger.text(older)
    assert "job-100" in page
    assert "job-149" in page
    assert "id=job-099" not in page
    assert 'rel="next"' not in page
    page = await ledger.text("/jobs?status=dead&kind=k")
    assert "job-001" in page
    assert "id=job-000" not in page
    for nonsense in ("/jobs?status=alive", "/jobs?after=x", "/jobs?after=2026-01-01|x", "/remembered?id=nobody"):
        assert (await ledger.get(nonsense)).status_code == 400


@pytest.mark.parametrize(
    "after",
    ["0001-01-01T00:00:00+14:00|q|x", "9999-12-31T23:59:59-14:00|q|x", "0001-01-01T00:00:00+00:00|q|x", "now|q|x"],
)
async def test_a_page_that_begins_nowhere_is_one_sentence(ledger, after):
    answer = await ledger.get("/jobs", params={"after": after})
    assert answer.status_code == 400, answer.text
    assert "no page begins there" in answer.text


async def test_rows_with_what_python_does_not_have_are_shown(ledger, pg):
    for n, moment in enumerate(("0044-03-15 BC", "-infinity", "infinity", "20000-01-01")):
        await pg.execute(
            "insert into streamworker.jobs (id, queue_name, created_at, run_at, started_at, finished_at, headers, result) "
            f"values ($1, 'q', '{moment}', '{moment}', '{moment}', '{moment}', '{{\"a\": 1e5000}}', '1e5000')",
            f"odd-{n}",
        )
    page = await ledger.get("/jobs")
    assert page.status_code == 200 and all(f"odd-{n}" in page.text for n in range(4))
    for n in range(4):
        assert (await ledger.get("/jobs", params={"id": f"odd-{n}"})).status_code == 200


async def test_cancelling_and_queueing_again(ledger, pg):
    await remember(pg, "waits", "queued")
    await remember(pg, "died", "dead")
    assert (await ledger.do("cancel", id="waits"))["message"] == "waits never runs"
    assert not (await ledger.do("cancel", id="waits"))["ok"]
    assert (await ledger.do("again", id="died"))["ok"]
    assert [tuple(row) for row in await pg.fetch("select id, status from streamworker.jobs order by id")] == [
        ("died", "queued"), ("waits", "cancelled"),
    ]  # fmt: skip


async def test_a_ledger_that_cannot_be_opened_is_said(redis_url, raw):
    settings = Settings(redis_url=redis_url, database_url="postgresql://127.0.0.1:1/none")
    site = dashboard(App(settings=settings), access=Access())
    letter(raw, id="job-1")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site), base_url=HERE) as client:
        browser = Browser(client)
        page = await browser.text("/jobs?id=job-1")
        assert "Dead letters" in page  # Redis is looked at all the same
        assert "banner" in page
        assert (await browser.get("/")).status_code == 200
    await site.aclose()


async def test_what_a_job_waits_for_and_its_steps(ledger, pg):
    await remember(pg, "job-w", "waiting")
    await pg.execute(
        "update streamworker.jobs set waits_for = $1, run_at = now() + interval '1 h' where id = 'job-w'", HOSTILE
    )
    await pg.execute(
        "insert into streamworker.job_steps (job_id, queue_name, position, kind, name, value, made, hop, deliveries, until) values "
        "('job-w', 'q', 0, 'step', 'charge', '\"s3cret\"', 0, 0, 1, null), "
        "('job-w', 'q', 1, 'wait', $1, null, 0, 0, 1, now() + interval '1 h')",
        HOSTILE,
    )
    page = await ledger.text("/jobs?id=job-w")
    assert "Waits for" in page and "the signal" in page and "until" in page
    assert page.index("<h2>Steps") < page.index("charge")
    assert 'data-do="cancel"' in page
    assert "<script>alert" not in page and "\u202e" not in page and "s3cret" not in page
