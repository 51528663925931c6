"""Bridges as processes of their own, forked from one that has imported everything: many can be killed in a second."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerProcess
from typing import Any

import anyio

from streamworker import App
from streamworker.bridging import Bridging
from streamworker.settings import Settings


class Nursery:
    """Starts bridges; whoever lives at the end is killed."""

    def __init__(self, url: str, *queues: str, **settings: Any) -> None:
        self._arguments = (url, queues, settings)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._children: list[ForkServerProcess] = []

    def __enter__(self) -> Nursery:
        return self

    def start(self) -> ForkServerProcess:
        child = self._context.Process(target=_main, args=self._arguments, daemon=True)
        child.start()
        self._children.append(child)
        return child

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
            child.join()


def _main(url: str, queues: tuple[str, ...], settings: dict[str, Any]) -> None:
    async def run() -> None:
        app: App[Any] = App(settings=Settings(redis_url=url, **settings))
        async with app.bridge(queues) as mover:
            await Bridging(mover).run()

    anyio.run(run)
