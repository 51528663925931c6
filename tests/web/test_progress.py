"""How far a running job has come, as the dashboard shows it: said by a handler, told by its worker, read off the page."""

from __future__ import annotations

import html

import anyio
import httpx2

from streamworker import App, Context, Payload, Settings
from streamworker.web import Access, dashboard
from tests.conftest import eventually
from tests.contract.helpers import working
from tests.web.conftest import HERE, Browser


class Load(Payload, kind="load", queue="q"):
    name: str = ""


async def test_pending_jobs_and_the_job_itself_show_how_far_it_is(redis_url, ground):
    app = App(settings=Settings(redis_url=redis_url, mode=ground.mode, lease=3))
    step, end = anyio.Event(), anyio.Event()

    @app.handler
    async def load(payload: Load, ctx: Context) -> None:
        if payload.name:
            ctx.progress(37, 100, "reading <b>")
            await step.wait()
            ctx.progress(100, 100, "writing")
        await end.wait()

    site = dashboard(app, access=Access())
    try:
        async with (
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site), base_url=HERE) as client,
            app,
            working(app),
        ):
            browser = Browser(client)
            made = await app.enqueue(Load(name="a"))
            await app.enqueue(Load())  # says nothing: nothing is shown

            async def on_page(path: str, text: str) -> bool:
                return html.escape(text) in await browser.text(path)

            # Its worker says it with a heartbeat, one a second: a page each 5 ms says no more.
            await eventually(lambda: on_page("/pending?queue=q", "37 of 100 (37 %) reading <b>"), interval=0.05)
            page = await browser.text("/pending")
            assert page.count('title="progress"') == 1
            (row,) = [each for each in page.split("<tr") if 'title="progress"' in each]
            one = html.unescape(row.split('data-open="')[1].split('"')[0])
            shown = await browser.text(one)
            assert made.id in shown
            assert html.escape("37 of 100 (37 %) reading <b>") in shown
            step.set()
            await eventually(lambda: on_page(one, "100 of 100 (100 %) writing"), interval=0.05)
            end.set()
            await eventually(ground.empty)
            assert 'title="progress"' not in await browser.text("/pending")
    finally:
        step.set()
        end.set()
        await site.aclose()
