"""``streamworker config``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from streamworker.cli.options import WORKER, Listing, WorkerFlags
from streamworker.cli.output import Column, show
from streamworker.settings import Described

_COLUMNS: Final[list[Column[Described]]] = [
    Column("name", lambda line: line.name),
    Column("value", lambda line: line.value_masked, fold=True),
    Column("from", lambda line: "" if line.source == "default" else line.source, fold=True),
]


def config(app: str | None = None, *, json: bool = False, flags: WorkerFlags = WORKER) -> int:
    """Show every setting, and where it came from; passwords are hidden.

    Args:
        app: module:attribute, as for the worker.
        json: One JSON object per line, for programs.
    """
    settings = flags.settings(app=app)

    async def rows() -> AsyncIterator[tuple[Described, None]]:
        for line in settings.describe():
            yield line, None

    async def main() -> int:
        return await show(
            Listing(json=json, limit=1000),
            rows,
            _COLUMNS,
            title="settings",
            json=lambda line: {"name": line.name, "value": line.value_masked, "source": line.source},
        )

    return asyncio.run(main())
