"""What an app offers around its database: the schema, and what the ledger remembers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from streamworker.durable import open_archive
from streamworker.errors import StreamworkerError, UsageError
from streamworker.postgres import Archive, JobRecord
from streamworker.postgres.migrate import Migrator, printed, shipped
from streamworker.settings import EMBEDDED, Settings
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")


class LedgerKeys:
    """Frees the deduplication keys that PostgreSQL remembers of jobs that were ended by hand in Redis.

    The ledger is looked for with the first of them: listings do not connect to PostgreSQL.

    Args:
        stack: closes what is opened.
        settings: whether there is a ledger.
        url: of the database, if there is one.
    """

    def __init__(self, stack: AsyncExitStack, settings: Settings, url: str | None) -> None:
        self._stack = stack
        self._url = url if settings.ledger != "off" else None
        self._archive: Archive | None = None

    async def __call__(self, queue: str, ids: Sequence[str]) -> None:
        """Free the keys of these jobs; what PostgreSQL refuses is logged, since the jobs have ended all the same."""
        if self._url is None:
            return
        try:
            if self._archive is None:
                self._archive = await open_archive(self._stack, self._url, required=False)
            if self._archive is None:
                self._url = None
            else:
                await self._archive.free_keys(queue, ids)
        except StreamworkerError as error:
            log.warning("keys_not_freed", queue=queue, jobs=len(ids), error=str(error))


class Archives:
    """Opens the ledger for people and programs that ask. An `App` says where it is."""

    def __init__(self) -> None:
        self._archive: Archive | None = None
        self._looked = False

    def resolve(self, settings: Settings | None) -> Settings:
        """The settings in force."""
        raise NotImplementedError

    def _opened(self) -> tuple[AsyncExitStack | None, Settings]:
        """What is closed with the app, ``None`` while it is not open; and the settings in force.

        Raises:
            UsageError: the app is open on another event loop.
        """
        raise NotImplementedError

    async def _database(self, stack: AsyncExitStack, settings: Settings) -> str:
        """The URL of the database; the embedded pair is started if that is what the settings say."""
        raise NotImplementedError

    async def find(self, job_id: str, *, queue: str | None = None) -> JobRecord | None:
        """What the ledger remembers of a job: status, attempts, result; ``None`` if it knows no such job.

        A job that was enqueued straight to Redis is known once it has run, or has been running for a second.

        Args:
            job_id: as `enqueue` returned it.
            queue: its queue; needed only where several queues have a job with this id.

        Raises:
            UsageError: the app is not open, or open on another event loop, or several queues have a job with this id.
            ConfigurationError: there is no database, or it has no schema streamworker.
            Unreachable: PostgreSQL does not answer.
        """
        stack, settings = self._opened()
        if stack is None:
            raise UsageError("the app is not open: find inside `async with app:`")
        if self._archive is None:
            self._keep(stack, await open_archive(stack, await self._database(stack, settings)))
        return None if self._archive is None else await self._archive.find(job_id, queue)

    async def _kept_archive(self) -> Archive | None:
        """The ledger, if the settings name one and it is there; looked for once."""
        stack, settings = self._opened()
        if stack is None:
            raise UsageError("the app is not open: do this inside `async with app:`")
        named = settings.database_url is not None or settings.redis_url == EMBEDDED
        if not self._looked and named and settings.ledger != "off":
            archive = await open_archive(stack, await self._database(stack, settings), required=settings.ledger == "on")
            self._keep(stack, archive)
        return self._archive

    def _keep(self, stack: AsyncExitStack, archive: Archive | None) -> None:
        self._archive, self._looked = archive, True
        stack.callback(self._forget_archive)

    def _forget_archive(self) -> None:
        self._archive, self._looked = None, False

    @asynccontextmanager
    async def archive(self, settings: Settings | None = None) -> AsyncIterator[Archive]:
        """What the ledger remembers, for the command line and the dashboard.

        Raises:
            ConfigurationError: no database is named, or it has no schema streamworker.
            Unreachable: PostgreSQL does not answer.
        """
        async with AsyncExitStack() as stack:
            archive = await open_archive(stack, await self._database(stack, self.resolve(settings)))
            if archive is None:
                raise AssertionError("a ledger that is required is there, or an error")
            yield archive

    @asynccontextmanager
    async def migrator(self, settings: Settings | None = None) -> AsyncIterator[Migrator]:
        """What brings the database's schema up to date, past any connection pooler.

        Raises:
            ConfigurationError: no database is named.
        """
        async with AsyncExitStack() as stack:
            settings = self.resolve(settings)
            yield Migrator(settings.database_direct_url or await self._database(stack, settings))

    @staticmethod
    def schema_sql() -> str:
        """All migrations as SQL."""
        return printed(shipped())
