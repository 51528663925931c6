"""The program as processes of the fork server whose output goes to files: many can be killed, and replaced, in a second."""

from __future__ import annotations

import os
from pathlib import Path

from tests import forkserver
from tests.forkserver import ROOT, Forked


class Nursery:
    """Starts commands; those that live at the end are killed.

    Args:
        settings: variables of every child's environment; all others of streamworker's are taken out of it.
    """

    def __init__(self, **settings: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("STREAMWORKER_", "REDIS", "DATABASE"))}
        self._environment = {**kept, **settings}
        self._children: list[Forked] = []

    def __enter__(self) -> Nursery:
        return self

    def start(self, *words: str, log: Path = Path(os.devnull), **settings: str) -> Forked:
        with log.open("a") as stream:
            child = forkserver.forked(
                words, cwd=ROOT, env={**self._environment, **settings}, stdout=stream, stderr=stream
            )
        self._children.append(child)
        return child

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
            child.wait()
