"""Sealed jobs in the dashboard: opened where it has the keys."""

from __future__ import annotations

import json

import httpx2
import pytest

from streamworker import App, Keys, Settings
from streamworker.encryption import new_key
from streamworker.job import Job
from streamworker.web import Access, dashboard
from tests.web.conftest import HERE, Browser, letter

KEYS = Keys(current="one", keys={"one": new_key()})


@pytest.mark.parametrize("keys", [KEYS, None], ids=["keys", "no keys"])
async def test_a_payload_and_an_error_are_shown_where_the_key_is(redis_url, raw, keys):
    sealed = KEYS.sealed_job(Job(id="dead-1", queue="q", kind="k", payload=b'{"text":"s3cret"}'))  # type: ignore[arg-type]
    body = {"id": "dead-1", "kind": "k", "payload": json.loads(bytes(sealed.payload))}
    entry = letter(raw, job=json.dumps(body), error=f"ValueError: {KEYS.sealed_text('dead-1', 'br0ken')}")
    site = dashboard(App(settings=Settings(redis_url=redis_url), encryption=keys), access=Access())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site), base_url=HERE) as client:
        browser = Browser(client)
        page = await browser.text("/dead")
        shown = await browser.text(f"/payload?place=dead&queue=q&id={entry}")
        (row,) = await browser.rows("/dead")
        assert (await browser.do("replay", row=row))["ok"]
    await site.aclose()
    assert ("s3cret" in shown) is ("br0ken" in page) is (keys is not None)
    assert ("[sealed one]" in page) is (keys is None)
    (_, fields) = raw.xrange("stream:{q}")[0]
    assert b"s3cret" not in fields[b"job"]
