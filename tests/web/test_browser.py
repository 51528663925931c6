"""The dashboard in a real browser: live, by mouse and by keyboard, light and dark, on a phone, and deaf to what payloads say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests import forkserver
from tests.cli.conftest import ROOT, Running
from tests.conftest import eventually_blocking
from tests.web.chromium import Chromium, program
from tests.web.conftest import LOOKS, held, letter

pytestmark = [
    pytest.mark.skipif(program() is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.timeout(180),
]

HOSTILE = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"


class Served:
    """The program ``streamworker dashboard``, and a page of it."""

    def __init__(self, url: str, page: Chromium, raw: Any) -> None:
        self.url, self.page, self.raw = url, page, raw

    def open(self, path: str) -> None:
        self.page.open(self.url + path)

    def yes(self) -> None:
        """Agree to what is asked."""
        self.page.until("document.querySelector('#confirm').open")
        self.page.click("#confirm-yes")


@pytest.fixture
def served(redis_url: str, raw: Any, chromium: Chromium, tmp_path: Path) -> Iterator[Served]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")}
    env = {**clean, "REDIS_URL": redis_url, "PYTHONPATH": str(ROOT)}
    running = Running(
        forkserver.forked(["dashboard", "--listen", "127.0.0.1:0"], cwd=tmp_path, env=env, constants=LOOKS)
    )
    eventually_blocking(lambda: running.saw("dashboard_ready"), 30)
    url = next(json.loads(line)["url"] for line in running.lines if "dashboard_ready" in line).rstrip("/")
    chromium.size(1280, 800)
    chromium.complaints.clear()
    yield Served(url, chromium, raw)
    complaints = list(chromium.complaints)
    running.signal(signal.SIGTERM)
    try:
        assert running.wait(15) == 0  # also while a page is watching, as each does
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    finally:
        chromium.leave()
        running.process.stderr.close()
    assert complaints == []  # no script failed, and the policy had nothing to forbid


def test_it_is_live_and_pauses_a_queue(served):
    served.raw.xadd("stream:{billing}", {"job": "{}"})
    served.open("/")
    page = served.page
    page.until("document.querySelector('#q-billing td.n').innerText === '1'")
    served.raw.xadd("stream:{billing}", {"job": "{}"})
    page.until("document.querySelector('#q-billing td.n').innerText === '2'")  # nobody loaded the page anew
    page.until("document.querySelector('#pulse').classList.contains('on')")
    page.until("document.querySelectorAll('.chart canvas').length === 4")
    page.click("#q-billing [data-do=pause]")
    page.until("document.querySelector('#q-billing .tag')?.innerText === 'paused'")
    assert served.raw.hexists("stream:{billing}:meta", "paused")
    page.click("#q-billing [data-do=resume]")
    page.until("!document.querySelector('#q-billing .tag')")
    assert not served.raw.hexists("stream:{billing}:meta", "paused")
    assert page.value("document.querySelector('#pulse').classList.contains('on')")  # and is when the server ends


@pytest.mark.all
def test_dead_letters_by_mouse(served):
    for n in range(5):
        letter(served.raw, id=f"d{n}", error=HOSTILE, reason=HOSTILE, kind="k",
               job=json.dumps({"id": f"d{n}", "payload": {"x": HOSTILE}}))  # fmt: skip
    served.open("/dead")
    page = served.page
    page.click("tbody tr:nth-child(2) input")
    page.until("document.querySelector('[data-picked]').innerText === '1 ticked'")
    page.click("[data-do=replay]")
    page.until("document.querySelector('.toast')?.innerText === '1 replayed'")
    page.until("document.querySelectorAll('#live tbody tr').length === 4")
    assert served.raw.xlen("stream:{q}") == 1

    page.click("tbody tr:first-child a.id")
    page.until("location.pathname === '/show' && document.readyState === 'complete'")
    assert "window.pwned" not in page.value("document.querySelector('#payload').innerText")
    page.click("#payload button")
    page.until("document.querySelector('pre.payload')?.innerText.includes('window.pwned')")
    assert page.value("window.pwned") is None

    served.open("/dead")
    page.click("[data-do=campaign][data-what=replay]")
    page.until("document.querySelector('#confirm').open")
    page.value("document.querySelector('#confirm [name=rate]').value = 50")
    served.yes()
    page.until("document.querySelector('.campaign')?.innerText.includes('done')")
    eventually_blocking(lambda: served.raw.xlen("stream:{q}") == 5)
    page.until("document.querySelector('.empty h2')?.innerText === 'No dead letters'")


def test_it_is_used_with_the_keyboard_alone(served):
    held(served.raw, 3)
    served.open("/")
    page = served.page
    page.value(
        "Date.now = (now => () => now)(Date.now())"
    )  # the second key has 1.5 s, which may pass between two keys here
    page.press("g", "p")
    page.until("location.pathname === '/pending' && document.readyState === 'complete' && typeof htmx === 'object'")
    page.until("document.querySelectorAll('tbody tr').length === 3")
    page.press("j", "j")
    page.until("document.querySelector('tr.at') === document.querySelectorAll('tbody tr')[1]")
    page.press(" ")
    page.until("document.querySelectorAll('tbody tr')[1].querySelector('input').checked")
    page.until("document.querySelector('[data-picked]').innerText === '1 ticked'")
    page.value("document.querySelector('[data-bar] [data-do=release]').focus()")
    page.press("Enter")
    page.until("document.querySelector('#confirm').open")
    page.press("Enter")  # the harmless answer has the focus
    page.until("document.querySelector('.toast')?.innerText === '1 released'")
    assert served.raw.xpending("stream:{q}", "workers")["pending"] == 2
    page.press("?")
    page.until("document.querySelector('#keys').open")
    page.press("Enter")
    page.until("!document.querySelector('#keys').open")
    page.press("/")
    page.until("document.activeElement.matches('[data-search]')")


@pytest.mark.all
def test_ticks_survive_what_happens_meanwhile(served):
    for n in range(3):
        letter(served.raw, id=f"d{n}")
    served.open("/dead")
    page = served.page
    page.click("tbody tr:nth-child(3) input")
    page.press("j", "j")
    page.until("document.querySelector('tr.at') === document.querySelectorAll('tbody tr')[1]")
    letter(served.raw, id="new")
    page.until("document.querySelectorAll('#live tbody tr').length === 4")
    page.until("document.querySelector('tr.at') === document.querySelectorAll('tbody tr')[2]")  # so does the place
    assert page.value("[...document.querySelectorAll('tbody input')].map(box => box.checked)") == [False] * 3 + [True]


@pytest.mark.all
def test_a_traceback_opens_and_stays_open(served):
    letter(served.raw, id="d1")
    served.open("/groups")
    page = served.page
    opened = "document.querySelector('#live details').open"
    page.click("#live summary")
    page.until(opened)
    letter(served.raw, id="d2")
    page.until("document.querySelector('#live tbody tr td.n').innerText === '2'")  # it was updated
    assert page.value(opened)
    page.press("j")
    page.until("(document.querySelector('#live summary').focus(), !!document.querySelector('#live tr.at'))")
    page.press("Enter")
    page.until(f"!{opened}")
    assert page.value("location.pathname") == "/groups"  # which no click and no Enter there has left


@pytest.mark.all
def test_light_and_dark(served):
    served.raw.xadd("stream:{q}", {"job": "{}"})
    page = served.page
    color = "getComputedStyle(document.documentElement).backgroundColor"
    served.open("/")
    light = page.value(color)
    page.size(1280, 800, dark=True)
    dark = page.until(f"{color} !== {light!r} && {color}")
    page.click("#theme")
    page.until(f"{color} === {light!r}")
    served.open("/dead")  # remembered, against the system's wish
    assert page.value(color) == light
    page.click("#theme")
    page.until(f"{color} === {dark!r}")
    page.value("localStorage.clear()")


READ = """
(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255).map((x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, at) => sum + x * [.2126, .7152, .0722][at], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const poor = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, :disabled, .skip")) continue;
    const [one, two] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => a - b);
    const ratio = (two + .05) / (one + .05);
    if (ratio < 4.5) poor.add(`${ratio.toFixed(2)} ${node.tagName}.${node.className} ${walker.currentNode.data.trim().slice(0, 30)}`);
  }
  const seen = [...document.querySelectorAll("input, select, button, a, th")].filter((node) => node.checkVisibility() && !node.querySelector("input"));
  const nameless = seen.filter((node) => !(node.getAttribute("aria-label") || node.innerText || node.labels?.length || "").toString().trim());
  const ticks = seen.filter((node) => node.name === "row").map((node) => node.getAttribute("aria-label"));
  const wide = [...document.querySelectorAll(".scroll, .two > *, nav, .bar")].filter((node) => node.scrollWidth > node.clientWidth + 1);
  return {
    poor: [...poor], nameless: nameless.map((node) => node.outerHTML.slice(0, 120)),
    twins: ticks.length - new Set(ticks).size, ticks: ticks.length,
    wide: wide.map((node) => `${node.scrollWidth} > ${node.clientWidth}: ${node.innerText.slice(0, 60)}`),
  };
})()
"""


@pytest.mark.all
def test_every_page_can_be_read_shows_all_its_columns_and_fits_a_phone(served):
    raw = served.raw
    held(raw, 2, worker="worker-with-a-rather-long-hostname.internal-12345-abcdefghi")
    for name in ("billing.invoices.europe", "quick"):
        raw.xadd(f"stream:{{{name}}}", {"job": json.dumps({"kind": "invoice.send", "payload": {}})})
        raw.hset(f"stream:{{{name}}}:meta", "paused", "by ada at 2026-11-24T00:00:00Z")
    ids = [
        letter(raw, id=f"0198f0c2-7d8e-7abc-8def-00000000000{n}", kind="invoice.send", error="E" * 400) for n in (1, 2)
    ]
    raw.zadd("stream:{q}:due", {"low/later-1/0": 4e12, "low/later-2/0": 1e12})
    raw.hset(
        "stream:{q}:bodies", mapping={f"low/later-{n}/0": '{"kind": "invoice.send", "payload": {}}' for n in (1, 2)}
    )
    for name in ("nightly-report-of-invoices", "paused"):
        raw.zadd("stream:schedules", {"q": 0})
        raw.zadd("stream:{q}:schedules", {name: 4e12 if name != "paused" else "inf"})
        kept = {"name": name, "expression": "*/5 3 * * 1-5", "tz": "Europe/Berlin", "queue": "q", "kind": "invoice.send",
                "paused": "by ada" if name == "paused" else "", "by": "ada@host"}  # fmt: skip
        raw.hset("stream:{q}:schedules:defined", name, json.dumps(kept))
    served.open("/")
    served.page.until("!!document.querySelector('#q-q .bad')")  # it has looked since
    for path in ("/", "/pending", "/dead", "/delayed", "/workers", "/queue?queue=q", "/cron", "/groups", "/jobs",
                 "/jobs?id=job-0",
                 f"/show?place=dead&queue=q&id={ids[0]}"):  # fmt: skip
        served.open(path)
        name = path.strip("/").split("?")[0] or "overview"
        for width, tone in served.page.looks(390, 1400):
            can_be_read(served.page, f"{path}, {width} {tone}", 2 if path in ("/pending", "/dead", "/delayed") else 0)
            if (shots := os.environ.get("STREAMWORKER_TEST_SHOTS")) is not None:
                served.page.screenshot(Path(shots) / f"{width}-{tone}-{name}.png")
        for _ in served.page.looks(375, height=740, tones=["light"]):
            assert served.page.until("document.documentElement.scrollWidth") <= 375, path
            assert served.page.value("parseFloat(getComputedStyle(document.documentElement).fontSize)") >= 13, path


def can_be_read(page: Chromium, look: str, ticks: int) -> None:
    found = page.value(READ)
    assert (found["poor"], found["nameless"], found["twins"], found["wide"]) == ([], [], 0, []), look
    assert found["ticks"] == ticks, look


@pytest.mark.all
def test_output_appears_as_it_comes(served):
    key, chunks = "stream:{q}:output:talker", ["one\n", HOSTILE, {"two": 2}, "three"]

    def emit(position: int, text: Any) -> None:
        piece = msgspec.msgpack.Ext(1, msgspec.json.encode(text)) if isinstance(text, dict) else text
        fields = {"run": 1, "attempt": 1, "stored": position, "from": position, "before": 0, "token": "t"}
        served.raw.xadd(key, {**fields, "chunks": msgspec.msgpack.encode([piece])}, id=f"{position}-0")
        served.raw.publish(key, str(position))

    served.open("/jobs?id=talker&queue=q")
    page = served.page
    page.click("[data-watch]")
    page.until("document.querySelector('[data-state]').innerText === 'waiting for output…'")
    for position, chunk in enumerate(chunks, 1):
        emit(position, chunk)
        word = '{"two":2}' if isinstance(chunk, dict) else chunk.strip()
        page.until(f"document.querySelector('[data-output] pre').textContent.includes({json.dumps(word)})")
    page.until("document.querySelector('[data-state]').innerText === 'attempt 1, live'")
    assert page.value("window.pwned") is None
    assert page.value("document.querySelectorAll('[data-output] pre *').length") == 0
    served.raw.set("stream:{q}:result:talker", '{"status":"completed"}')
    served.raw.publish("stream:{q}:result:talker", '{"status":"completed"}')
    page.until("document.querySelector('[data-state]').innerText === 'the job has ended'")
