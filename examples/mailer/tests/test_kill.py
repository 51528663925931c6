"""Workers that are killed, as processes: what is certain stays certain, and what is not is counted."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import anyio
import pytest

from mailer.ingest import ingest

pytestmark = pytest.mark.anyio


class Fleet:
    """Workers on the servers of a world."""

    def __init__(self, world: Any, log: Path) -> None:
        settings = world.app.resolve(None)
        self._log = log.open("ab")
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("STREAMWORKER_")},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "REDIS_URL": settings.redis_url,
            "DATABASE_URL": settings.database_url,
            "STREAMWORKER_NAMESPACE": settings.namespace,
            "STREAMWORKER_LEASE": "2",
            "STREAMWORKER_MODE": settings.mode,
            "MAILER_SMTP_URL": f"smtp://127.0.0.1:{world.sink.port}",
            "MAILER_DOMAIN": "example.com",
            "MAILER_PER_DOMAIN": "100000",
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "streamworker", "worker", "mailer.app:app"],
            env=self._environment,
            stdout=self._log,
            stderr=self._log,
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._log.close()


@pytest.fixture
def fleet(world: Any, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(world, tmp_path / "workers.log")
    yield made
    made.close()


@pytest.mark.parametrize("mode", ["stream", "list"])
async def test_a_worker_that_dies_between_the_servers_250_and_our_commit(world: Any, fleet: Fleet):
    """The one place where a mail is sent twice: under the same name, and counted."""
    (delivery,) = await world.campaign("ann@example.org")
    world.sink.gate.clear()
    first = fleet.start()
    with anyio.fail_after(30):
        await world.sink.waiting.wait()  # it has the mail; its 250 never reaches anybody
    first.kill()
    world.sink.gate.set()
    fleet.start()
    await world.until(world.idle)
    mails = world.sink.arrived("ann@example.org")
    assert len(mails) == 2 and len({mail.message["Message-ID"] for mail in mails}) == 1
    row = await world.delivery(delivery)
    assert (row["status"], row["attempts"], row["uncertain"]) == ("sent", 2, 1)
    assert await world.events() == ["sent"]


@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_mailbox_and_a_campaign_through_workers_that_keep_dying(world: Any, fleet: Fleet, tmp_path: Path):
    """The promise of the whole example, at full size: MAILER_MESSAGES=10000 MAILER_RECIPIENTS=50000 pytest -m slow."""
    messages = int(os.environ.get("MAILER_MESSAGES", "1000"))
    recipients = int(os.environ.get("MAILER_RECIPIENTS", "5000"))
    every = float(os.environ.get("MAILER_KILL_EVERY", "5"))
    maildir = tmp_path / "Maildir"
    for folder in ("cur", "new", "tmp"):
        (maildir / folder).mkdir(parents=True)
    for number in range(messages):
        message = EmailMessage()
        message["From"], message["Subject"] = f"{number}@example.net", f"number {number}"
        message.set_content("hello")
        if number % 10 == 0:
            message.add_attachment(os.urandom(20_000), maintype="image", subtype="png", filename="x.png")
        (maildir / "cur" / f"{number}:2,").write_bytes(message.as_bytes())
    people = [f"{number}@{number % 50}.example" for number in range(recipients)]
    suppressed = set(people[::100])
    await world.pg.executemany("insert into mailer.suppressions values ($1, 'x')", [(each,) for each in suppressed])
    began = time.monotonic()
    done = await ingest(world.pg, world.app, maildir, "me@example.com")
    await world.campaign(*people[:1])
    await start_campaign(world, people[1:])
    assert done.new == messages

    workers = [fleet.start() for _ in range(4)]
    kills = 0
    async with anyio.create_task_group() as group:

        async def kill() -> None:
            nonlocal kills
            while True:
                await anyio.sleep(every)
                victim = random.randrange(4)
                workers[victim].send_signal(signal.SIGKILL)
                await asyncio.to_thread(workers[victim].wait)
                workers[victim] = fleet.start()
                kills += 1

        group.start_soon(kill)
        await world.until(world.idle, timeout=1700)
        group.cancel_scope.cancel()
    took = time.monotonic() - began

    assert await world.pg.fetchval("select count(*) from mailer.email_messages") == messages
    assert await world.pg.fetchval("select count(*) from mailer.email_attachments") == len(range(0, messages, 10))
    arrived = Counter(mail.recipient for mail in world.sink.mails)
    assert not suppressed & set(arrived)
    assert set(arrived) == set(people) - suppressed
    assert Counter(await world.events()) == {"sent": len(people) - len(suppressed), "suppressed": len(suppressed)}
    rows = await world.pg.fetch("select recipient, uncertain, status from mailer.email_deliveries")
    assert {row["status"] for row in rows} == {"sent", "suppressed"}
    uncertain = {row["recipient"]: row["uncertain"] for row in rows}
    for recipient, times in arrived.items():
        assert times - 1 <= uncertain[recipient]
    duplicates = sum(times - 1 for times in arrived.values())
    print(
        f"\n{messages} messages, {len(people)} mails, {kills} kills, {took:.0f} s: {duplicates} duplicates,"
        f" {sum(uncertain.values())} uncertain attempts"
    )


async def start_campaign(world: Any, people: list[str]) -> None:
    """A large one, without looking its deliveries up."""
    from mailer import campaigns

    await campaigns.start(
        world.pg,
        world.app,
        name="large",
        template="welcome",
        sender="shop@example.com",
        domain="example.com",
        recipients=[{"email": each, "name": "x"} for each in people],
    )
