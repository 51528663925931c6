"""The documentation's site in a real browser: search, versions, phone width, dark mode, and no request to another host."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.web.chromium import Chromium, program
from tools.site import __main__ as building

pytestmark = [
    pytest.mark.all,
    pytest.mark.skipif(program() is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.timeout(600),
]

READY = "document.querySelector('.md-header') && document.documentElement.classList.contains('js')"
WIDTHS = (390, 1400)
WIDE = ("", "comparison/", "benchmarks/", "reference/settings/")

# Every visible element with text of its own whose contrast with what is painted below it is under 4.5:1 (WCAG 2.2,
# 1.4.3; 3:1 for large text). A canvas turns any notation of a color into four numbers.
POOR = """(() => {
  const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const parsed = color => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(n => top[n] * top[3] + below[n] * (1 - top[3])).concat(1);
  const ground = e => {
    if (!e) return [255, 255, 255, 1];
    const own = parsed(getComputedStyle(e).backgroundColor);
    return own[3] === 1 ? own : over(own, ground(e.parentElement));
  };
  const opacity = e => e ? +getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
  const light = color => [0.2126, 0.7152, 0.0722].reduce((sum, share, n) => {
    const part = color[n] / 255;
    return sum + share * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const poor = {};
  for (const e of document.body.querySelectorAll('*')) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
    const style = getComputedStyle(e);
    if (!text || e.closest('svg, .headerlink') || !e.checkVisibility({ visibilityProperty: true })) continue;
    const shade = opacity(e);
    if (shade === 0) continue;
    const below = ground(e);
    const ink = parsed(style.color);
    ink[3] *= shade;
    const [high, low] = [light(over(ink, below)), light(below)].sort((a, b) => b - a);
    const large = parseFloat(style.fontSize) >= 24;
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < (large ? 3 : 4.5)) poor[`${e.tagName}.${e.className} ${style.color}`] = `${ratio.toFixed(2)} ${text.slice(0, 40)}`;
  }
  return poor;
})()"""


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each request."""

    searched = True
    """Whether pages get the whole index of the search, which each of them reads: half of what it costs to open one."""

    def do_GET(self) -> None:
        if self.searched or not self.path.endswith("search_index.json"):
            super().do_GET()
            return
        index = json.loads(Path(self.translate_path(self.path)).read_bytes())
        short = json.dumps(index | {"docs": index["docs"][:1]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(short)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(short)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, with an older version beside it; built by the first process that needs it."""
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent
    into, told = run / "site", run / "site.built"
    with (run / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            (into / "0.0").mkdir(parents=True, exist_ok=True)
            (into / "0.0/index.html").write_text("<title>an older version</title>")
            told.write_text(str(building.build(into)))
        return Path(told.read_text())


@pytest.fixture(scope="module")
def url(built: Path) -> Iterator[str]:
    """Where the site is served: the folder of all versions."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    chromium = Chromium()
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser: Chromium, url: str) -> Iterator[Chromium]:
    """A browser that must not have asked another host for anything."""
    browser.complaints.clear()
    browser.requests.clear()
    yield browser
    asked = {urlsplit(one).netloc for one in browser.requests if urlsplit(one).scheme in ("http", "https", "ws", "wss")}
    assert asked == {urlsplit(url).netloc}
    assert browser.complaints == []


def pages(built: Path) -> list[str]:
    """Addresses of all pages, below that of the site."""
    return sorted(f"{path.parent.relative_to(built.parent).as_posix()}/" for path in built.rglob("index.html"))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_search_finds_a_page(page: Chromium, url: str, built: Path, width: int):
    page.size(width, 900)
    page.open(f"{url}{built.name}/", READY)
    if width < 600:
        page.click(".md-header label[for=__search]")
    else:
        page.click(".md-search__input")
    page.until("document.activeElement.matches('.md-search__input')")
    page.type("dead letter")
    page.press("s")  # the search listens for keys
    page.until("document.querySelector('.md-search-result__meta').innerText.match(/^[1-9][0-9]* matching/)")
    found = page.until("[...document.querySelectorAll('.md-search-result__link')].map(a => a.href)")
    assert all(one.startswith(f"{url}{built.name}/") for one in found)
    page.click(".md-search-result__link")
    page.until(f"location.pathname !== '/{built.name}/' && document.readyState === 'complete' && {READY}")
    assert page.value("document.querySelector('article').innerText.toLowerCase().includes('dead letter')")


def test_the_versions_are_in_a_selector(page: Chromium, url: str, built: Path):
    assert json.loads((built.parent / "versions.json").read_bytes())[0]["version"] == built.name
    page.size(1400, 900)
    page.open(url, READY)
    assert page.value("location.pathname") == f"/{built.name}/"
    page.until("document.querySelectorAll('.md-version__link').length === 2")
    shown = page.value("[...document.querySelectorAll('.md-version__link')].map(a => [a.textContent.trim(), a.href])")
    assert shown == [[built.name, f"{url}{built.name}/"], ["0.0", f"{url}0.0/"]]
    assert page.value("document.querySelector('.md-version__current').textContent.trim()") == built.name


@pytest.mark.parametrize("every", [pytest.param(False, id="wide-ones"), pytest.param(True, id="every-page")])
def test_no_page_is_wider_than_a_screen(
    page: Chromium, url: str, built: Path, every: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Quiet, "searched", False)
    wide = []
    for path in pages(built) if every else [f"{built.name}/{name}" for name in WIDE]:
        page.open(url + path, READY)
        for width in WIDTHS[:1] if every else WIDTHS:  # what fits a phone fits a desk; the widest ones are seen there
            page.size(width, 900)
            try:  # the layout follows with the next frame
                page.until(f"innerWidth === {width} && document.documentElement.scrollWidth <= {width}", timeout=3)
            except AssertionError:
                wide.append((path, width))
    assert wide == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: Chromium, url: str, built: Path, scheme: str):
    poor = {}
    for path in ("", "tutorial/", "comparison/", "reference/api/"):
        page.size(1400, 900, dark=scheme == "dark")
        page.open(f"{url}{built.name}/{path}", READY)
        found = "dark" if page.value("document.body.dataset.mdColorScheme") == "slate" else "light"
        assert found == scheme
        poor |= {f"{path} {where}": ratio for where, ratio in page.value(POOR).items()}
    assert poor == {}
