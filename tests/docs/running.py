"""Runs the modules that `snippets` wrote, in a process of its own: ``python -m tests.docs.running FOLDER PACKAGE...``."""

from __future__ import annotations

import asyncio
import importlib
import sys
import traceback
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg

from streamworker import App, QueueWorker
from tests.docs import names, snippets
from tests.postgres.stacks import Django

TABLES = """
create table if not exists invoice (id uuid primary key, ready boolean not null default true, sent boolean not null default false);
create table if not exists customer (id bigserial primary key, address text unique, name text);
"""


async def main(folder: Path, packages: list[str], database: str) -> int:
    Django().configure(database)
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
    async with asyncio.timeout(45), AsyncExitStack() as stack:
        if isinstance(app, App):
            await stack.enter_async_context(app)
            if app.queues:  # what is enqueued runs, as on a reader's machine
                worker = QueueWorker(app, redis=None, database=None, services=None)
                running = asyncio.create_task(worker.run())
                stack.push_async_callback(wait_for, running)
                stack.push_async_callback(worker.stop)
        await fragment()


async def wait_for(task: asyncio.Task[int]) -> None:
    await task


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    sys.exit(asyncio.run(main(Path(sys.argv[1]), sys.argv[3:], sys.argv[2])))
