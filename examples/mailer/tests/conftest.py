"""Servers for the tests. Redis and PostgreSQL come from streamworker's pytest plugin."""

from __future__ import annotations

import asyncio
import io
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest

from mailer import campaigns, content, database
from mailer.app import app
from mailer.config import Config, Smtp
from mailer.jobs import ProcessIncoming
from mailer.services import Services
from mailer.smtp import EmailService
from mailer.testing import receiver, smtp
from mailer.testing.receiver import Receiver
from mailer.testing.smtp import Sink
from mailer.webhooks import WebhookClient
from streamworker import QueueWorker, Settings
from streamworker.testing import drain
from streamworker.worker.lease import RenewalProcess


def beside(work: Any) -> Any:
    """Run a coroutine in a thread: fixtures are made inside and outside of event loops."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Any]:
    pg = await asyncpg.connect(url)
    try:
        yield pg
    finally:
        await pg.close()


@pytest.fixture(scope="session")
def tables(streamworker_servers: Any) -> list[str]:
    """All tables, made as `mailer setup` makes them."""

    async def make() -> list[str]:
        url = streamworker_servers.database_url
        async with app.migrator(Settings(database_url=url)) as migrator:
            await migrator.up()
        async with connection(url) as pg:
            assert await database.migrate(pg) == ["0001_mailer.sql"]
            assert await database.migrate(pg) == []
            rows = await pg.fetch(
                "select format('%I.%I', schemaname, tablename) from pg_tables"
                " where schemaname in ('mailer', 'streamworker') and tablename not like '%migrations'"
            )
        return [row[0] for row in rows]

    return list(beside(make()))


@pytest.fixture
def database_url(streamworker_servers: Any, tables: list[str]) -> str:
    """A database with all tables, empty. Deleting a few rows is much faster than another database."""

    async def empty() -> None:
        async with connection(streamworker_servers.database_url) as pg:
            await pg.execute("set session_replication_role = replica")  # in any order, whatever refers to them
            await pg.execute(";".join(f"delete from {table}" for table in tables))
            await pg.execute("insert into mailer.analytics_progress default values")

    beside(empty())
    return str(streamworker_servers.database_url)


@pytest.fixture
async def pg(database_url: str) -> AsyncIterator[Any]:
    """A connection to it."""
    async with connection(database_url) as pg:
        yield pg


@pytest.fixture
def mode() -> Any:
    """Tests that name it as a parameter run in other modes too."""
    return "stream"


@pytest.fixture
def streamworker_settings(streamworker_settings: Settings, database_url: str, mode: Any) -> Settings:
    """Where the plugin puts the app."""
    return msgspec.structs.replace(streamworker_settings, database_url=database_url, mode=mode)


@pytest.fixture
def streamworker_app() -> Any:
    return app


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem`` and ``other.pem``, two authorities, and ``server.pem`` with its key, signed by the first."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl: apt-get install openssl")
    home = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=home, check=True, capture_output=True)

    elliptic = "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"  # made in a hundredth of the time of RSA
    for name in ("ca", "other"):
        openssl(
            *("req", "-x509", *elliptic, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
    openssl("req", *elliptic, "-nodes", "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server")
    (home / "extensions").write_text(
        "extendedKeyUsage=serverAuth\nsubjectAltName=IP:127.0.0.1,DNS:hooks.example.com\nauthorityKeyIdentifier=keyid\n"
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
    )
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"),
        *("-extfile", "extensions", "-out", "server.pem"),
    )
    return home


@pytest.fixture(scope="session")
def server_tls(certificates: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    return context


@pytest.fixture
def corpus() -> list[Path]:
    """The standard library's own messages, where Python came with its tests."""
    try:
        import test.test_email as tests
    except ImportError:
        pytest.skip("needs a Python with its own tests: build it, or apt-get install libpython3-testsuite")
    files = sorted(Path(tests.__file__).with_name("data").glob("msg_*.txt"))
    if not files:
        pytest.skip("needs a Python with its own tests: build it, or apt-get install libpython3-testsuite")
    return files


# -- the whole pipeline


class World:
    """A mail server, a receiver of webhooks, and the app on servers of its own.

    Attributes:
        app: open; enqueues.
        pg: a connection to its database.
        sink: the mail server.
        receiver: the receiver of webhooks.
        services: what handlers get.
    """

    def __init__(self, app: Any, pg: Any, polling: Any, sink: Sink, receiver: Receiver, services: Services) -> None:
        self.app, self.pg, self.sink, self.receiver, self.services = app, pg, sink, receiver, services
        self._polling = polling  # a connection of its own, so that tests may look while the world turns

    async def run(self) -> None:
        """Work until nothing is left, whatever waits for later included."""
        await drain(self.app, services=self.services, delayed=True)
        assert await self.left() == 0

    async def run_until(self, condition: Callable[[], Awaitable[Any]], *hasten: str) -> None:
        """Work until something holds; jobs run when they are due, those of the kinds ``hasten`` at once."""
        now = (
            "update streamworker.jobs set run_at = now() where status = 'queued' and kind = any($1) and run_at > now()"
            " returning pg_notify('streamworker', '')"
        )
        worker = QueueWorker(self.app, redis=None, database=None, services=self.services)
        async with anyio.create_task_group() as group:
            group.start_soon(worker.start)
            with anyio.fail_after(30):
                while not await condition():
                    await self._polling.execute(now, hasten)
                    await anyio.sleep(0.02)
            await worker.stop()

    async def run_patiently(self) -> None:
        """Work until nothing is left, each job when it is due."""
        await self.run_until(self.idle)

    async def run_kind(self, *kinds: str) -> None:
        """Work until no job of these kinds is left; they run at once, others when they are due."""

        async def condition() -> bool:
            return await self.left(*kinds) == 0

        await self.run_until(condition, *kinds)

    async def until(self, condition: Callable[[], Awaitable[Any]], timeout: float = 40) -> None:
        """Wait for something that workers elsewhere do."""
        with anyio.fail_after(timeout):
            while not await condition():  # noqa: ASYNC110 - the database does not tell
                await anyio.sleep(0.05)

    async def idle(self) -> bool:
        """Whether nothing is left; cheap among many thousands, because it is asked all the time."""
        return not await self._polling.fetchval(SOME_OPEN)

    async def left(self, *kinds: str) -> int:
        """How many jobs (of some kinds) are not finished."""
        find = "select count(*) from streamworker.jobs where status = any($1) and (kind = any($2) or $2 = '{}')"
        return int(await self._polling.fetchval(find, OPEN, kinds))

    async def enqueue(self, *jobs: Any) -> list[str]:
        """Enqueue in a transaction, as the mailer does everywhere; the ids."""
        async with self.pg.transaction():
            return [made.id for made in await self.app.enqueue_many(jobs, connection=self.pg)]

    async def jobs(self, kind: str) -> list[Any]:
        """The rows of all jobs of a kind, in the order they were made."""
        rows = await self.pg.fetch("select * from streamworker.jobs where kind = $1 order by created_at, id", kind)
        return list(rows)

    async def campaign(self, *recipients: str, called: str = "autumn", **variables: Any) -> list[Any]:
        """Start a campaign; the ids of its deliveries, in the order of the recipients."""
        await campaigns.put_template(self.pg, "welcome", "Hello {{name}}", "Dear {{name}}", "<p>Dear {{name}}</p>")
        await campaigns.start(
            self.pg,
            self.app,
            name=called,
            template="welcome",
            sender="shop@example.com",
            domain="example.com",
            recipients=[{"email": each, "name": each.partition("@")[0]} | variables for each in recipients],
        )
        find = "select id from mailer.email_deliveries where recipient = $1 order by created_at desc limit 1"
        return [await self.pg.fetchval(find, each) for each in recipients]

    async def delivery(self, delivery_id: Any) -> Any:
        """A delivery's row."""
        return await self.pg.fetchrow("select * from mailer.email_deliveries where id = $1", delivery_id)

    async def events(self) -> list[str]:
        """The types of all events, in order."""
        return [row["type"] for row in await self.pg.fetch("select type from mailer.email_events order by id")]

    async def receive(self, raw: bytes, mailbox: str = "me@example.com") -> None:
        """A message comes in."""
        async with self.pg.transaction():
            content_id = await content.store_file(self.pg, io.BytesIO(raw))
            job = ProcessIncoming(content_id=content_id, mailbox=mailbox)
            await self.app.enqueue(job, connection=self.pg)


OPEN = ["queued", "dispatching", "dispatched", "running", "retrying"]
# In the words of the ledger's partial indexes.
SOME_OPEN = """select exists (select from streamworker.jobs where status = 'queued')
    or exists (select from streamworker.jobs where status = 'dispatching')
    or exists (select from streamworker.jobs where status in ('dispatched', 'running', 'retrying'))"""


@pytest.fixture(autouse=True)
def no_renewing_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker starts one, for handlers that keep the interpreter lock for seconds; `drain` makes a worker a round."""
    monkeypatch.setattr(RenewalProcess, "sign", lambda _: None)


@pytest.fixture
async def world(streamworker_live_app: Any, pg: Any, database_url: str) -> AsyncIterator[World]:
    async with (
        smtp.serve() as sink,
        receiver.listen() as hooks,
        connection(database_url) as polling,
        streamworker_live_app as app,
    ):
        config = Config(
            smtp=Smtp("127.0.0.1", sink.port, "none"),
            domain="example.com",
            per_domain=10_000,
            webhook_networks=(ip_network("127.0.0.1/32"),),
        )
        email = EmailService(config.smtp, connections=config.connections, timeout=5)
        services = Services(
            app=app,
            config=config,
            email=email,
            webhooks=WebhookClient(allowed=config.webhook_networks, timeout=2),
            readers=anyio.CapacityLimiter(2),
        )
        yield World(app, pg, polling, sink, hooks, services)
        await email.close()
