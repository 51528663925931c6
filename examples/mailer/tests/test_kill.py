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
            "STREAMWORKER_LEASE": "4",  # a machine that is busy must not lose what a living worker holds
            # Twice the connections. Whatever a worker holds has met one death more when it dies, and a job that met two
            # runs alone: workers that hold a hundred and die every few seconds would do little else.
            "STREAMWORKER_CONCURRENCY": "20",
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


@pytest.mark.all
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


@pytest.mark.all
@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.timeout(300)
async def test_workers_that_die_at_work(world: Any, fleet: Fleet, tmp_path: Path):
    """The promise of the whole example, in small: two workers, each killed once while mail goes out."""
    recipients = 100
    storm = Storm(world, tmp_path, messages=20, recipients=recipients)
    await storm.begin()
    workers = [fleet.start() for _ in range(2)]
    for number, victim in enumerate(workers, 1):

        async def so_many(mails: int = number * recipients // 4) -> bool:
            return len(world.sink.mails) >= mails

        await world.until(so_many, timeout=120)
        await storm.kill(victim)
        fleet.start()
    await world.until(world.idle, timeout=120)
    await storm.holds()


@pytest.mark.parametrize("mode", ["stream", "list"])
@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_mailbox_and_a_campaign_through_workers_that_keep_dying(world: Any, fleet: Fleet, tmp_path: Path):
    """The same at full size: MAILER_MESSAGES=10000 MAILER_RECIPIENTS=50000 pytest -m slow."""
    storm = Storm(
        world,
        tmp_path,
        messages=int(os.environ.get("MAILER_MESSAGES", "1000")),
        recipients=int(os.environ.get("MAILER_RECIPIENTS", "5000")),
    )
    every = float(os.environ.get("MAILER_KILL_EVERY", "5"))
    began = time.monotonic()
    await storm.begin()
    workers = [fleet.start() for _ in range(4)]
    async with anyio.create_task_group() as group:

        async def kill() -> None:
            while True:
                await anyio.sleep(every)
                victim = random.randrange(4)
                await storm.kill(workers[victim])
                workers[victim] = fleet.start()

        group.start_soon(kill)
        await world.until(world.idle, timeout=1700)
        group.cancel_scope.cancel()
    print(f"\n{await storm.holds()}, {time.monotonic() - began:.0f} s")


class Storm:
    """A mailbox and a campaign, workers that are killed, and what has to be so afterwards.

    Args:
        world: the mailer, its servers and its mail server.
        home: where the mailbox is made.
        messages: in the mailbox; every tenth has an attachment.
        recipients: of the campaign; every hundredth is suppressed.
    """

    def __init__(self, world: Any, home: Path, *, messages: int, recipients: int) -> None:
        self._world, self._maildir, self._messages = world, home / "Maildir", messages
        self._people = [f"{number}@{number % 50}.example" for number in range(recipients)]
        self._suppressed = set(self._people[::100])
        self._kills = 0

    async def begin(self) -> None:
        """Enqueue all of it."""
        self._write_mailbox()
        pg = self._world.pg
        suppress = "insert into mailer.suppressions values ($1, 'x')"
        await pg.executemany(suppress, [(each,) for each in self._suppressed])
        done = await ingest(pg, self._world.app, self._maildir, "me@example.com")
        assert done.new == self._messages
        await self._world.campaign(*self._people[:1])
        await start_campaign(self._world, self._people[1:])

    def _write_mailbox(self) -> None:
        for folder in ("cur", "new", "tmp"):
            (self._maildir / folder).mkdir(parents=True)
        for number in range(self._messages):
            message = EmailMessage()
            message["From"], message["Subject"] = f"{number}@example.net", f"number {number}"
            message.set_content("hello")
            if number % 10 == 0:
                message.add_attachment(os.urandom(20_000), maintype="image", subtype="png", filename="x.png")
            (self._maildir / "cur" / f"{number}:2,").write_bytes(message.as_bytes())

    async def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """SIGKILL; returns when it is dead."""
        worker.send_signal(signal.SIGKILL)
        await asyncio.to_thread(worker.wait)
        self._kills += 1

    async def holds(self) -> str:
        """Every message stored once, every delivery recorded once, duplicates only by kills, the suppressed never mailed."""
        world, pg = self._world, self._world.pg
        assert await pg.fetchval("select count(*) from mailer.email_messages") == self._messages
        attachments = await pg.fetchval("select count(*) from mailer.email_attachments")
        assert attachments == len(range(0, self._messages, 10))
        arrived = Counter(mail.recipient for mail in world.sink.mails)
        mailed = set(self._people) - self._suppressed
        assert set(arrived) == mailed
        assert Counter(await world.events()) == {"sent": len(mailed), "suppressed": len(self._suppressed)}
        rows = await pg.fetch("select recipient, uncertain, status from mailer.email_deliveries")
        assert Counter(row["status"] for row in rows) == {"sent": len(mailed), "suppressed": len(self._suppressed)}
        assert {row["recipient"] for row in rows if row["status"] == "suppressed"} == self._suppressed
        # A mail came twice only where its delivery says so, and only as many deliveries say so as a dying worker can have
        # had between the server's 250 and its commit.
        uncertain = {row["recipient"]: row["uncertain"] for row in rows}
        assert [each for each, times in arrived.items() if times - 1 > uncertain[each]] == []
        names = {(mail.recipient, mail.message["Message-ID"]) for mail in world.sink.mails}
        assert len(names) == len(mailed)
        doubtful, duplicates = sum(uncertain.values()), sum(times - 1 for times in arrived.values())
        assert doubtful <= self._kills * world.services.config.connections
        return (
            f"{self._messages} messages, {len(mailed)} mails, {len(self._suppressed)} suppressed, {self._kills} kills:"
            f" {duplicates} duplicates, {doubtful} uncertain attempts"
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
