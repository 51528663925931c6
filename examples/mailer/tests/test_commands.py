"""Mailboxes into jobs, lists into campaigns: all or nothing, and twice is once."""

import asyncio
import hashlib
import mailbox
import os
import subprocess
import sys
from contextlib import closing
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from mailer import campaigns, content
from mailer.__main__ import main
from mailer.app import app
from mailer.campaigns import CampaignError
from mailer.ingest import BATCH, NoMailbox, ingest, opened
from mailer.templates import TemplateError

pytestmark = pytest.mark.anyio


def message(number: int) -> EmailMessage:
    made = EmailMessage()
    made["From"], made["Subject"] = "a@example.com", f"number {number}"
    made.set_content("From here on\nhello\n")
    return made


def mbox_of(path: Path, count: int) -> Path:
    box = mailbox.mbox(path)
    for number in range(count):
        box.add(message(number))
    box.close()
    return path


async def jobs(pg: Any) -> int:
    return int(await pg.fetchval("select count(*) from streamworker.jobs where queue_name = 'email:processing'"))


async def test_an_mbox_becomes_jobs_once(pg: Any, tmp_path: Path):
    path = mbox_of(tmp_path / "box", BATCH * 2 + 7)
    done = await ingest(pg, app, path, "me@example.com")
    assert (done.messages, done.new, await jobs(pg)) == (207, 207, 207)
    again = await ingest(pg, app, path, "me@example.com")
    assert (again.messages, again.new, await jobs(pg)) == (207, 0, 207)
    # The same mail in another mailbox is another message, and its bytes are stored once.
    assert (await ingest(pg, app, path, "you@example.com")).new == 207
    assert await pg.fetchval("select count(*) from mailer.email_content") == 207
    with closing(mailbox.mbox(path)) as box:
        raw = box.get_bytes(0)
    stored = await pg.fetchval("select id from mailer.email_content where sha256 = $1", hashlib.sha256(raw).digest())
    assert b"".join([chunk async for chunk in content.load(pg, stored)]) == raw


async def test_a_maildir_and_its_folders(pg: Any, tmp_path: Path):
    box = mailbox.Maildir(tmp_path / "Maildir")
    folder = box.add_folder("Sent")
    for number in range(3):
        box.add(message(number))
        folder.add(message(10 + number))
    done = await ingest(pg, app, tmp_path / "Maildir", "me@example.com")
    assert (done.messages, done.new) == (6, 6)


async def test_what_is_no_mailbox(tmp_path: Path):
    (tmp_path / "message.eml").write_bytes(b"Subject: x\n\nhello")
    (tmp_path / "empty").touch()
    for name, count in (("message.eml", 1), ("empty", 0)):
        with opened(tmp_path / name) as messages:
            assert len(list(messages)) == count
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(NoMailbox), opened(path):
            pass


async def test_an_interrupted_batch_leaves_nothing_behind(pg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = mbox_of(tmp_path / "box", 3)

    class Dies:
        job = staticmethod(app.job)

        async def enqueue_many(self, *_: Any, **__: Any) -> Any:
            raise ConnectionError("the machine was switched off")

    with pytest.raises(ConnectionError):
        await ingest(pg, Dies(), path, "me@example.com")
    assert await pg.fetchval("select count(*) from mailer.email_content") == await jobs(pg) == 0
    assert (await ingest(pg, app, path, "me@example.com")).new == 3


async def test_content_of_any_size(pg: Any):
    for size in (0, 1, content.CHUNK, content.CHUNK * 20 + 1):
        data = os.urandom(size)
        async with pg.transaction():
            stored = await content.store(pg, hashlib.sha256(data).digest(), size, [data[:100], b"", data[100:]])
            same = await content.store(pg, hashlib.sha256(data).digest(), size, iter([]))
        assert same == stored
        assert b"".join([chunk async for chunk in content.load(pg, stored)]) == data


# -- campaigns


async def start(pg: Any, recipients: list[dict[str, Any]], **options: str) -> campaigns.Started:
    given = {"name": "autumn", "template": "welcome", "sender": "shop@example.com", "domain": "example.com", **options}
    return await campaigns.start(pg, app, recipients=recipients, **given)


@pytest.fixture
async def welcome(pg: Any) -> None:
    await campaigns.put_template(pg, "welcome", "Hello {{name}}", "Dear {{name}}", None)


@pytest.mark.usefixtures("welcome")
async def test_ten_thousand_recipients(pg: Any):
    started = await start(pg, [{"email": f"{number}@example.org", "name": "x"} for number in range(10_000)])
    assert started.recipients == 10_000 and started.left_out == []
    assert await pg.fetchval(
        "select count(*) from mailer.email_deliveries delivery join streamworker.jobs job"
        " on (job.payload ->> 'delivery_id')::uuid = delivery.id"
        " where delivery.status = 'queued' and job.status = 'queued' and job.level = 'low'"
        " and job.queue_name = 'email-sending' and job.kind = 'email.send'"
    ) == 10_000  # fmt: skip
    assert await pg.fetchval("select recipients from mailer.campaigns") == 10_000


@pytest.mark.usefixtures("welcome")
async def test_lists_are_never_clean(pg: Any):
    rows = [
        {"email": "ann@example.org", "name": "Ann \x00", None: ["more", "fields"]},
        {"email": "ANN@example.org", "name": "Ann again"},
        {"email": "no address"},
        {"email": "b@example.org\r\nBcc: c@example.org"},
        {"email": None},
        {},
        {"email": "ben@example.org", "name": "\\u0000"},
    ]
    started = await start(pg, rows)
    assert started.recipients == 2 and len(started.left_out) == 5
    found = await pg.fetch("select variables ->> 'name' as name from mailer.email_deliveries order by recipient")
    assert [row["name"] for row in found] == ["Ann ", "\\u0000"]


@pytest.mark.usefixtures("welcome")
async def test_a_campaign_that_fails_is_not_there(pg: Any):
    def rows() -> Any:
        yield {"email": "ann@example.org"}
        raise OSError("the disk with the list is gone")

    with pytest.raises(OSError, match="the list is gone"):
        await start(pg, rows())
    for table in ("mailer.campaigns", "mailer.email_deliveries", "streamworker.jobs"):
        assert await pg.fetchval(f"select count(*) from {table}") == 0
    await start(pg, [{"email": "ann@example.org"}])
    with pytest.raises(CampaignError, match="started before"):
        await start(pg, [{"email": "ann@example.org"}])
    with pytest.raises(CampaignError, match="no template"):
        await start(pg, [], name="x", template="y")
    assert await pg.fetchval("select count(*) from streamworker.jobs") == 1


async def test_a_template_is_checked_when_it_is_stored(pg: Any):
    with pytest.raises(TemplateError):
        await campaigns.put_template(pg, "x", "{{#a}}", "", None)
    assert await pg.fetchval("select count(*) from mailer.email_templates") == 0


# -- the command line


@pytest.mark.usefixtures("streamworker_live_app")
async def test_the_commands(
    database_url: str, pg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.chdir(tmp_path)

    async def mailer(*words: str, code: int = 0) -> str:
        assert await asyncio.to_thread(main, words) == code
        said = capfd.readouterr()
        return said.out + said.err

    (tmp_path / "text").write_text("Dear {{name}}")
    (tmp_path / "list.csv").write_text("\ufeffemail,name\nann@example.org,Ann\nnobody,x\n", encoding="utf-8")
    assert "everything is there" in await mailer("setup")
    await mailer("template", "welcome", "--subject", "Hi", "--text", "text")
    said = await mailer(
        "campaign", "one", "--template", "welcome", "--sender", "a@example.com", "--recipients", "list.csv"
    )
    assert "1 mails, 1 lines left out" in said and "recipient 2" in said
    assert "queued" in await mailer("report", "one")
    mbox_of(tmp_path / "box", 2)
    assert "2 messages, 2 of them new" in await mailer("ingest", "box", "--mailbox", "me@example.com")
    await mailer("count", "--every", "3600")
    assert (await mailer("webhook", "https://example.com/hook")).startswith("whsec_")
    await mailer(
        "warmup", "new@example.com", "--seeds", "s@example.net", "--template", "welcome", "--reply-template", "welcome"
    )
    kinds = await pg.fetch("select distinct kind from streamworker.jobs order by kind")
    assert [row["kind"] for row in kinds] == ["analytics.count", "email.process", "email.send", "warmup.outbound"]
    assert "no template" in await mailer(
        "campaign", "two", "--template", "x", "--sender", "a@example.com", "--recipients", "list.csv", code=1
    )
    await mailer("ingest", "nowhere", "--mailbox", "x", code=1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "mailer", "nonsense"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 2
