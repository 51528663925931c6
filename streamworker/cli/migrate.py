"""``streamworker migrate``: the schema of the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import anyio
from cyclopts import App as Commands

from streamworker.app import App
from streamworker.cli import streams
from streamworker.cli.options import WORKER, Listing, WorkerFlags
from streamworker.cli.output import Column, show

migrate = Commands(name="migrate", help="The schema of the ledger in PostgreSQL: up, status, print.")

_COLUMNS: Final[list[Column[Any]]] = [
    Column("migration", lambda row: row.name),
    Column("state", lambda row: row.state),
    Column("applied", lambda row: row.applied_at or ""),
]


@migrate.default
@migrate.command
def up(*, flags: WorkerFlags = WORKER) -> int:
    """Apply what is missing; safe when several containers start at once.

    Uses STREAMWORKER_DATABASE_DIRECT_URL if it is set, else DATABASE_URL.
    """
    settings = flags.settings()

    async def main() -> list[str]:
        async with App[Any](settings=settings).migrator(settings) as migrator:
            return await migrator.up()

    done = anyio.run(main)
    for name in done:
        streams.write(f"applied {name}\n")
    if not done:
        streams.write("the schema is up to date\n")
    return 0


@migrate.command
def status(*, json: bool = False, flags: WorkerFlags = WORKER) -> int:
    """Show what is applied and what is missing; exits with 1 if a migration is missing or was changed.

    Args:
        json: One JSON object per line, for programs.
    """
    settings = flags.settings()
    code = 0

    async def main() -> int:
        nonlocal code
        async with App[Any](settings=settings).migrator(settings) as migrator:
            states = await migrator.status()
        code = int(any(state.state in ("missing", "drifted") for state in states))

        async def rows() -> AsyncIterator[tuple[Any, None]]:
            for state in states:
                yield state, None

        return await show(Listing(json=json), rows, _COLUMNS, title="migrations")

    return anyio.run(main) or code


@migrate.command(name="print")
def print_(*, flags: WorkerFlags = WORKER) -> int:
    """Print all migrations as SQL, for people who apply them by other means."""
    flags.settings()
    streams.write(App.schema_sql())
    return 0
