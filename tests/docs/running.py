"""Runs the modules that `snippets` wrote, in a process of its own: ``python -m tests.docs.running FOLDER PACKAGE...``."""

from __future__ import annotations

import asyncio
import importlib
import sys
import traceback
from pathlib import Path

import asyncpg

from streamworker import App
from tests.docs import names, snippets

TABLES = """
create table if not exists invoice (id uuid primary key, ready boolean not null default true, sent boolean not null default false);
create table if not exists customer (id bigserial primary key, address text unique, name text);
"""


async def main(folder: Path, packages: list[str], database: str) -> int:
    names.connection = await asyncpg.connect(database)
    await names.connection.execute(TABLES)
    failed = 0
    for package in packages:
        modules = sorted((folder / package).glob("line_*.py"), key=lambda path: int(path.stem.removeprefix("line_")))
        for path in modules:
            try:
                await run(f"{package}.{path.stem}")
            except BaseException:
                failed += 1
                print(f"--- {package} {path.stem}", traceback.format_exc(), sep="\n")
    await names.connection.close()
    return failed


async def run(name: str) -> None:
    module = await asyncio.to_thread(importlib.import_module, name)  # its code may block, as programs do
    fragment = getattr(module, snippets.FRAGMENT, None)
    if fragment is None:
        return
    app = getattr(module, "app", None)
    async with asyncio.timeout(30):
        if isinstance(app, App):
            async with app:
                await fragment()
        else:
            await fragment()


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    sys.exit(asyncio.run(main(Path(sys.argv[1]), sys.argv[3:], sys.argv[2])))
