"""``streamworker keys``: keys of encryption, and what still uses them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Final

import msgspec
from cyclopts import App

from streamworker.cli import streams
from streamworker.cli.options import LISTING, WORKER, Listing, WorkerFlags, opener, run
from streamworker.cli.output import Column, show
from streamworker.cli.streams import say
from streamworker.encryption import new_key
from streamworker.errors import ConfigurationError
from streamworker.settings import EMBEDDED
from streamworker.views.opened import KeyOpener

keys = App(name="keys", help="Keys of encryption: new, check.")


class KeyRow(msgspec.Struct, frozen=True):
    """How many values in one place are sealed with a key; ``known``: the app has that key."""

    key: str
    place: str
    count: int
    known: bool


_COLUMNS: Final[list[Column[KeyRow]]] = [
    Column("key", lambda row: row.key),
    Column("where", lambda row: row.place),
    Column("values", lambda row: f"{row.count:,}", right=True),
    Column("", lambda row: "" if row.known else "the app does not have it", rest=True),
]


@keys.command
def new() -> int:
    """Print a fresh key: 32 random bytes as base64. Keep it where you keep passwords."""
    streams.write(new_key() + "\n")
    return 0


@keys.default
@keys.command
def check(*, listing: Listing = LISTING, flags: WorkerFlags = WORKER) -> int:
    """Find what is still sealed with which key, in Redis and in the ledger; 1 if the app lacks one of these keys.

    It reads everything that is stored: on a large fleet that takes a while.
    """
    settings = flags.settings()

    async def main() -> int:
        from streamworker.operators import open_operator, require_archive  # noqa: PLC0415 - see `run`

        found = opener(settings)
        if not isinstance(found, KeyOpener):
            raise ConfigurationError("the app has no encryption=Keys(...): name the one that has in STREAMWORKER_APP")
        async with AsyncExitStack() as stack:
            operator = await stack.enter_async_context(open_operator(settings))
            uses = {(use.place, use.key): use.count for use in await operator.key_uses()}
            if settings.ledger != "off" and (settings.database_url or settings.redis_url == EMBEDDED):
                archive = await require_archive(stack, settings)
                uses |= {(use.place, use.key): use.count for use in await archive.key_uses()}
        known = found.keys.ids
        used = [KeyRow(key, place, count, key in known) for (place, key), count in sorted(uses.items())]

        async def rows() -> AsyncIterator[tuple[KeyRow, None]]:
            for row in sorted(used, key=lambda row: (row.known, row.key)):
                yield row, None

        await show(listing, rows, _COLUMNS, title="sealed values")
        for name in sorted(known - {row.key for row in used} - {found.keys.current}):
            say(f"nothing is sealed with the key {name}: it can go, if no producer seals with it any more")
        lacking = sorted({row.key for row in used if not row.known})
        if lacking:
            say(f"the app lacks {', '.join(lacking)}: add them to Keys(keys=...), or their jobs cannot run")
        return int(bool(lacking))

    return run(main)
