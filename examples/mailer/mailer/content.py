"""Bytes in PostgreSQL, each once, in chunks: nobody holds a whole message in memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Final
from uuid import UUID

from mailer.services import Connection

CHUNK: Final = 256 * 1024
_AT_ONCE: Final = 8


async def store(pg: Connection, sha256: bytes, size: int, pieces: Iterable[bytes]) -> UUID:
    """Store some bytes unless they are there already; returns their id.

    Args:
        pg: a connection in a transaction.
        sha256: of all pieces.
        size: of all pieces.
        pieces: the bytes, read only if they are new.
    """
    insert = "insert into mailer.email_content (sha256, size) values ($1, $2) on conflict do nothing returning id"
    found: UUID | None = await pg.fetchval(insert, sha256, size)
    if found is None:
        found = await pg.fetchval("select id from mailer.email_content where sha256 = $1", sha256)
        if found is None:
            raise RuntimeError("content was deleted while it was stored: run this again")
        return found
    batch: list[tuple[UUID, int, bytes]] = []
    for number, chunk in enumerate(_chunks(pieces)):
        batch.append((found, number, chunk))
        if len(batch) == _AT_ONCE:
            await _copy(pg, batch)
            batch.clear()
    await _copy(pg, batch)
    return found


async def store_file(pg: Connection, file: BinaryIO) -> UUID:
    """Store a file, from its beginning; read twice, because its name is the hash of its bytes."""
    sha256, size = await asyncio.to_thread(_measure, file)
    file.seek(0)
    return await store(pg, sha256, size, iter(lambda: file.read(CHUNK), b""))


async def load(pool: Any, content_id: UUID) -> AsyncIterator[bytes]:
    """The bytes, a chunk at a time; no connection is held in between."""
    number = 0
    while True:
        rows = await pool.fetch(
            "select data from mailer.email_content_chunks where content_id = $1 and n >= $2 order by n limit $3",
            content_id,
            number,
            _AT_ONCE,
        )
        for row in rows:
            yield row["data"]
        number += len(rows)
        if len(rows) < _AT_ONCE:
            return


@asynccontextmanager
async def spooled(pool: Any, content_id: UUID) -> AsyncIterator[BinaryIO | None]:
    """The bytes as a file on disk, or ``None`` if they are not there."""
    size = await pool.fetchval("select size from mailer.email_content where id = $1", content_id)
    if size is None:
        yield None
        return
    with TemporaryFile() as file:
        async for chunk in load(pool, content_id):
            file.write(chunk)
        yield file


def _chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of any size as chunks of one size."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        while len(rest) >= CHUNK:
            yield bytes(rest[:CHUNK])
            del rest[:CHUNK]
    if rest:
        yield bytes(rest)


def _measure(file: BinaryIO) -> tuple[bytes, int]:
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    while piece := file.read(CHUNK):
        digest.update(piece)
        size += len(piece)
    return digest.digest(), size


async def _copy(pg: Connection, batch: list[tuple[UUID, int, bytes]]) -> None:
    if batch:
        columns = ["content_id", "n", "data"]
        await pg.copy_records_to_table("email_content_chunks", schema_name="mailer", columns=columns, records=batch)
