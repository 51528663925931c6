"""What a scan of the dashboard must not find."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from streamworker.errors import ConfigurationError
from streamworker.web import Access
from tests.web.conftest import HERE, held, letter

PAGES = [
    "/",
    "/pending",
    "/dead",
    "/delayed",
    "/workers",
    "/jobs",
    "/queue?queue=q",
    "/history",
    "/points",
    "/static/app.js",
]
DEEDS = ["pause", "resume", "purge", "prune", "release", "bury", "drop", "replay", "erase", "hasten", "forget",
         "campaign", "stop", "dismiss", "nothing"]  # fmt: skip


@pytest.mark.parametrize("path", [*PAGES, "/events", "/nowhere"])
async def test_nothing_without_the_password(site_of, path):
    async with site_of(user="me", password="right") as browser:
        for header in (None, "Basic", "Basic !!!", "Bearer " + base64.b64encode(b"me:right").decode(),
                       "Basic " + base64.b64encode(b"me:wrong").decode(),
                       "Basic " + base64.b64encode(b"me:right ").decode()):  # fmt: skip
            answer = await browser.get(path, headers={"authorization": header} if header else {})
            assert answer.status_code == 401
            assert "Basic" in answer.headers["www-authenticate"]
            assert "set-cookie" not in answer.headers
    async with site_of(user="me", password="rücht:ig", auth=("me", "rücht:ig")) as browser:
        if path != "/events":
            assert (await browser.get(path)).status_code == (404 if path == "/nowhere" else 200)


@pytest.mark.parametrize("what", DEEDS)
async def test_forged_forms_do_nothing(site_of, raw, what):
    letter(raw)
    async with site_of() as browser:
        token = await browser.token()
        good = {"x-csrf-token": token, "origin": HERE}
        fields = {"queue": "q", "place": "dead", "worker": "w", "what": "erase"}
        for forged in (
            {}, {"origin": HERE}, {"x-csrf-token": token}, {**good, "x-csrf-token": token[:-1] + "?"},
            {**good, "origin": "https://evil.example"}, {**good, "origin": "null"}, {**good, "origin": "http://127.0.0.1:1"},
            {**good, "sec-fetch-site": "cross-site"}, {**good, "sec-fetch-site": "same-site"},
            {"x-csrf-token": "", "origin": HERE, "cookie": "streamworker_csrf="},
        ):  # fmt: skip
            answer = await browser.post(what, {**fields, "csrf": token, "x-csrf-token": token}, forged)
            assert answer.status_code == 403, forged
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            assert (await browser.client.request(method, f"/do/{what}", headers=good)).status_code == 405
        assert (await browser.get(f"/do/{what}", headers=good)).status_code == 405
        browser.client.cookies.clear()  # the token alone is not enough
        assert (await browser.post(what, fields, good)).status_code == 403
    assert raw.xlen("stream:{q}:dead") == 1
    assert not raw.exists("stream:{q}:meta")


async def test_read_only_is_read_only(site_of, raw):
    letter(raw)
    async with site_of(read_only=True) as browser:
        for path in PAGES:
            page = await browser.text(path)
            if path != "/static/app.js":
                assert "data-do=" not in page
        headers = {"x-csrf-token": await browser.token(), "origin": HERE}
        for what in DEEDS:
            answer = await browser.post(what, {"queue": "q", "place": "dead", "what": "erase"}, headers)
            assert answer.status_code == 403, what
            assert raw.xlen("stream:{q}:dead") == 1, what


async def test_other_names_for_this_machine_are_refused(site_of):
    """DNS rebinding: a page from elsewhere whose name suddenly means 127.0.0.1."""
    async with site_of() as browser:
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8787", "", "[::2]:8787",
                     "[::1].evil.example", "[::1].evil.example:80", "localhost:80@evil.example", "localhost@evil.example",
                     "127.0.0.1:80:80", "[::1", "[::1]]", "localhost/x", "[localhost]", "localhost:x"):  # fmt: skip
            assert (await browser.get("/", headers={"host": host})).status_code == 421, host
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8787"):
            assert (await browser.get("/", headers={"host": host})).status_code == 200, host
    async with site_of(user="me", password="x", auth=("me", "x")) as browser:
        assert (await browser.get("/", headers={"host": "ops.example.com"})).status_code == 200


@pytest.mark.parametrize("path", [*PAGES, "/nowhere", "/queue?queue=%7B", "/show?place=dead&queue=q&id=1-1"])
async def test_every_answer_carries_the_headers(browser, path):
    headers = (await browser.get(path)).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    if not path.startswith("/static"):
        assert headers["cache-control"] == "no-store"
    assert "server" not in headers


async def test_the_cookie_is_kept_from_scripts_and_other_sites(site_of):
    async with site_of() as browser:
        cookie = (await browser.get("/")).headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        answer = await browser.client.get("https://127.0.0.1:8787/", headers={"cookie": "streamworker_csrf=x<script>"})
        assert "Secure" in answer.headers["set-cookie"]
        assert "x<script>" not in answer.text


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}\x1b[2J\u202e\x00"


async def test_hostile_text_is_text(browser, raw):
    """Whatever producers, handlers and workers write: never markup, never a control character."""
    document = json.dumps({"id": HOSTILE, "kind": HOSTILE, "payload": {HOSTILE: HOSTILE}})
    entry = letter(raw, id=HOSTILE, kind=HOSTILE, reason=HOSTILE, error=HOSTILE + "\nline 2", worker=HOSTILE, job=document,
                   failed_at=HOSTILE, level=HOSTILE)  # fmt: skip
    (pending,) = held(raw, 1, "q", worker=HOSTILE, id=HOSTILE, kind=HOSTILE)
    member = f"normal/{HOSTILE}/abcd"
    raw.zadd("stream:{q}:due", {member: 5_000_000_000_000})
    raw.hset("stream:{q}:bodies", member, document)
    raw.hset("stream:{q}:meta", "paused", HOSTILE)
    raw.hset(f"streamworker:worker:{HOSTILE}2", mapping={"queues": f"q,{HOSTILE}", "hostname": HOSTILE, "pid": "1"})
    from urllib.parse import quote

    paths = [
        "/", "/pending", "/dead", "/delayed", "/workers", "/queue?queue=q", f"/show?place=dead&queue=q&id={entry}",
        f"/show?place=pending&queue=q&id={pending}", f"/payload?place=dead&queue=q&id={entry}",
        f"/payload?place=pending&queue=q&id={pending}",
        f"/dead?search={quote('<script>alert(1)</script>')}", f"/jobs?id={quote('<script>alert(1)</script>')}",
        f"/dead?search={quote(chr(34) + ' autofocus onfocus=alert(1) x=' + chr(34))}",
    ]  # fmt: skip
    for path in paths:
        page = await browser.text(path)
        assert "<script>alert" not in page, path
        assert "<img" not in page, path
        assert ' onfocus=alert(1) x="' not in page, path
        assert not set(page) & {"\x1b", "\u202e", "\x00"}, path
        assert "49" not in page or "{{7*7}}" in page or "7*7" not in page
    assert "alert(1)" in await browser.text(f"/show?place=dead&queue=q&id={entry}")  # it is shown, as text
    strange = await browser.get(f"/show?place=delayed&queue=q&id={quote(member.replace(chr(0), ''))}")
    assert "<script>alert" not in strange.text


@pytest.mark.parametrize(
    "path",
    ["/static/../access.py", "/static/..%2faccess.py", "/static/%2e%2e/access.py", "/static//etc/passwd",
     "/static/..%5caccess.py", "/static/%00", "/static", "/static/", "/templates/base.html", "/../../etc/passwd",
     "//evil.example/", "//evil.example/queue", "/do/../queue", "/./", "/\\evil.example", "/queue/"],
)  # fmt: skip
async def test_paths_lead_nowhere_else(browser, path):
    """As they are on the wire: clients would tidy them up before sending."""
    from urllib.parse import unquote

    sent = []
    headers = [(b"host", b"127.0.0.1")]
    scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": b"",
             "headers": headers, "scheme": "http", "root_path": "", "client": ("127.0.0.1", 1), "http_version": "1.1"}  # fmt: skip

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await browser.site(scope, receive, send)
    start = sent[0]
    location = dict(start["headers"]).get(b"location", b"").decode()
    assert start["status"] in (404, 405) or (start["status"] == 307 and re.match(r"/[^/\\]", location)), start
    body = b"".join(message.get("body", b"") for message in sent[1:])
    assert b"root:" not in body
    assert b"class Access" not in body


@pytest.mark.parametrize(
    "path",
    ["/queue?queue=a%7Db", "/pending?idle=-1", "/pending?idle=nan", "/pending?idle=1e999", "/pending?after=x",
     "/pending?after=q%7Chigh/zzz", "/dead?after=q%7Cnonsense", "/delayed?after=q%7Cnan/0", "/delayed?after=q%7C1/99999999999",
     "/dead?kind=" + "x" * 600, "/dead?kind=%1b%5b2J", "/show?place=elsewhere&queue=q&id=1", "/show?place=dead&queue=q",
     "/show?place=dead&queue=q&id=*", "/payload?place=pending&queue=q&id=" + "9" * 300,
     *(f"/{page}?place={place}&queue=q&id={name}" for page in ("show", "payload") for place in ("pending", "dead")
       for name in ("x", "9" * 23, "9" * 20 + "-1", "1-" + "9" * 20, "-", "1-1-1"))],
)  # fmt: skip
async def test_nonsense_is_answered_with_one_sentence(browser, raw, path):
    letter(raw)
    answer = await browser.get(path)
    assert answer.status_code == 400, answer.text
    assert "Traceback" not in answer.text
    assert not set(answer.text) & {"\x1b"}


async def test_forms_that_cannot_be_read(browser, raw):
    letter(raw)
    headers = {"x-csrf-token": await browser.token(), "origin": HERE}
    for row in ("", "{", '["q"]', '["q","1-1","huge"]', '["a}b","1-1"]', '["q","1-1","normal","w",1,2]', "[" * 5000):
        assert (await browser.post("erase", {"row": row}, headers)).status_code == 400, row
    assert (await browser.post("campaign", {"what": "format"}, headers)).status_code == 400
    assert (await browser.post("campaign", {"what": "erase", "rate": "-1"}, headers)).status_code == 400
    assert (await browser.post("nothing", {}, headers)).status_code == 404
    large = await browser.client.post("/do/erase", content=b"x" * 1_000_001, headers=headers)
    assert large.status_code == 413
    many = await browser.client.post("/do/erase", content=b"row=1&" * 3000, headers=headers)
    assert many.status_code == 400
    assert raw.xlen("stream:{q}:dead") == 1


async def test_payloads_are_hidden_until_asked_for(site_of, raw, capsys):
    entry = letter(raw)
    async with site_of() as browser:
        for path in ("/dead", f"/show?place=dead&queue=q&id={entry}", "/jobs?id=dead-1"):
            assert "s3cret" not in await browser.text(path)
        assert "s3cret" in await browser.text(f"/payload?place=dead&queue=q&id={entry}")
    async with site_of(read_only=True, public=True) as browser:
        answer = await browser.get(f"/payload?place=dead&queue=q&id={entry}")
        assert answer.status_code == 400
        assert "s3cret" not in answer.text


async def test_errors_are_shown_and_passwords_in_them_are_not(site_of, raw):
    """Also those that an older release stored as they were."""
    entry = letter(raw, error="no postgresql://shop:S3cr3t@db/shop for ada", reason="password=S3cr3t")
    async with site_of(read_only=True, public=True) as browser:
        for path in ("/", "/dead", f"/show?place=dead&queue=q&id={entry}"):
            page = await browser.text(path)
            assert "S3cr3t" not in page, path
        assert "for ada" in page


def test_who_may_be_reached_by_whom():
    with pytest.raises(ConfigurationError, match="STREAMWORKER_DASHBOARD_PASSWORD"):
        Access().for_bind("0.0.0.0")
    with pytest.raises(ConfigurationError, match="--read-only"):
        Access().for_bind("::")
    with pytest.raises(ConfigurationError):
        Access().for_bind("ops.example.com")
    for local in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert not Access().for_bind(local).public
    assert Access(read_only=True).for_bind("0.0.0.0").public
    assert not Access(read_only=True).for_bind("0.0.0.0").payloads
    both = Access(user="u", password="p")
    assert both.for_bind("0.0.0.0") is both
    for half in ({"user": "u"}, {"password": "p"}, {"public": True}):
        with pytest.raises(ConfigurationError):
            Access(**half)


@pytest.mark.parametrize(
    "wrong",
    [
        {"origins": ("ops.example.com",)}, {"origins": ("https://ops.example.com/dash",)}, {"prefix": "ops"},
        {"prefix": "/ops/"}, {"prefix": "//evil"}, {"prefix": '/"><b>'}, {"proxies": ("nginx",)},
    ],
)  # fmt: skip
def test_what_is_told_of_a_proxy_has_to_make_sense(wrong):
    with pytest.raises(ConfigurationError, match="must be"):
        Access(**wrong)


def test_access_comes_from_the_environment(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("from a file\n")
    names = {"STREAMWORKER_DASHBOARD_USER": "me", "STREAMWORKER_DASHBOARD_PASSWORD_FILE": str(secret)}
    assert Access.load(names) == Access(user="me", password="from a file")
    assert Access.load({}) == Access()
    with pytest.raises(ConfigurationError, match="neither of them"):
        Access.load({"STREAMWORKER_DASHBOARD_USER": "me"})


async def test_scripts_hold_the_page_until_all_of_them_are_there(browser):
    """htmx begins as soon as the document is loaded: an extension that is deferred may come too late to be live."""
    page = await browser.text("/")
    scripts = re.findall(r"<script([^>]*)>", page.partition("<body>")[2])
    assert [Path(re.search(r'src="([^"?]*)', each)[1]).name for each in scripts] == [
        "htmx.min.js", "hx-sse.min.js", "uplot.min.js", "app.js",
    ]  # fmt: skip
    assert not any(word in each for each in scripts for word in ("defer", "async", "module"))
