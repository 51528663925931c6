"""The program as processes forked from one that has imported everything: many can be killed, and replaced, in a second."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from streamworker.cli import main

for _command in ("bridge", "worker"):
    importlib.import_module(f"streamworker.cli.{_command}")


class Nursery:
    """Starts commands; whoever lives at the end is killed.

    Args:
        settings: variables of every child's environment; all others of streamworker's are taken out of it.
    """

    def __init__(self, **settings: str) -> None:
        self._settings = settings
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._children: list[ForkServerProcess] = []

    def __enter__(self) -> Nursery:
        return self

    def start(self, *words: str, log: Path = Path(os.devnull), **settings: str) -> ForkServerProcess:
        child = self._context.Process(target=_main, args=(words, {**self._settings, **settings}, log), daemon=True)
        child.start()
        self._children.append(child)
        return child

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
            child.join()


def _main(words: tuple[str, ...], settings: dict[str, str], log: Path) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    for name in list(os.environ):
        if name.startswith(("STREAMWORKER_", "REDIS", "DATABASE")):
            del os.environ[name]
    os.environ.update(settings)
    sys.exit(main(words))
