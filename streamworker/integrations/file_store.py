"""FileStore: stored payloads as files of a folder that all producers and workers share (docs/offload.md)."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio.to_thread

from streamworker.errors import ConfigurationError, UsageError

T = TypeVar("T")
_MOST: Final = 1000
_DRAFT: Final = re.compile(r"\..+\.[0-9a-f]{8}")
_NAME: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


class FileStore:
    """A `streamworker.payload.SweptStore` of files: ``App(store=FileStore("/srv/payloads"))``.

    Args:
        folder: exists, and is the same for all producers and workers: a mounted volume, NFS.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    async def put(self, id: str, data: bytes, /) -> None:  # noqa: A002
        await self._in_thread(self._write, id, data)

    async def get(self, id: str, /) -> bytes | None:  # noqa: A002
        return await self._in_thread(self._read, id)

    async def delete(self, ids: Sequence[str], /) -> None:
        await self._in_thread(self._unlink, ids)

    async def idle(self, seconds: float, /) -> list[str]:
        return await self._in_thread(self._untouched, seconds)

    async def keep(self, ids: Sequence[str], /) -> None:
        await self._in_thread(self._touch, ids)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await anyio.to_thread.run_sync(function, *args)

    def _path(self, id: str) -> Path:  # noqa: A002
        if not id or not set(id) <= _NAME or id.startswith("."):
            raise UsageError(f"{id!r} is no id of a stored payload")
        return self._folder / id

    def _write(self, id: str, data: bytes) -> None:  # noqa: A002
        path = self._path(id)
        draft = path.with_name(f".{id}.{secrets.token_hex(4)}")
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # the job that is sent next must not outlive the name of its data
        finally:
            os.close(folder)

    def _read(self, id: str) -> bytes | None:  # noqa: A002
        path = self._path(id)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if not self._folder.is_dir():  # a volume that is not mounted has lost nothing
                raise ConfigurationError(f"the folder of stored payloads is not there: {self._folder}") from None
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def _unlink(self, ids: Sequence[str]) -> None:
        for each in ids:
            self._path(each).unlink(missing_ok=True)

    def _untouched(self, seconds: float) -> list[str]:
        before, found = time.time() - seconds, []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if not entry.is_file() or entry.stat().st_mtime >= before:
                        continue
                    if _DRAFT.fullmatch(entry.name):  # of a process that died: nothing refers to it
                        (self._folder / entry.name).unlink()
                    elif not entry.name.startswith("."):
                        found.append(entry.name)
                if len(found) == _MOST:
                    break
        return found

    def _touch(self, ids: Sequence[str]) -> None:
        for each in ids:
            with suppress(FileNotFoundError):
                os.utime(self._path(each))
