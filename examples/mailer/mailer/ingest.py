"""Mailboxes into jobs: mbox files, Maildirs, single messages.

Bytes go to PostgreSQL and the job holds their id, both in one transaction: a job without its message, or a message that
nobody processes, cannot be. Whoever is interrupted runs it again; what is known is passed over.
"""

from __future__ import annotations

import mailbox
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from mailer import content
from mailer.jobs import ProcessIncoming
from mailer.services import Connection
from streamworker import App

BATCH: Final = 100
"""Messages of one transaction."""


class NoMailbox(ValueError):
    """Nothing there that holds messages."""


@dataclass
class Ingested:
    """What became of a mailbox: how many messages it has, and how many of them were new."""

    messages: int = 0
    new: int = 0


async def ingest(pg: Connection, app: App[Any], path: Path, name: str) -> Ingested:
    """Enqueue a job for every message.

    Args:
        pg: a connection that is in no transaction.
        app: enqueues.
        path: an mbox file, a Maildir with its folders, or one message.
        name: the mailbox that the messages belong to, such as an address.

    Raises:
        NoMailbox: it is none of these.
    """
    done = Ingested()
    with opened(path) as messages:
        while batch := list(islice(messages, BATCH)):
            new = await _take(pg, app, batch, name)
            done.messages += len(batch)
            done.new += new
    return done


async def _take(pg: Connection, app: App[Any], batch: list[Message], name: str) -> int:
    async with pg.transaction():
        ids = []
        for message in batch:
            with closing(message.open()) as file:
                ids.append(await content.store_file(pg, file))
        known = await pg.fetch(
            "select raw_content_id from mailer.email_messages where mailbox = $1 and raw_content_id = any($2)",
            name,
            ids,
        )
        new = sorted(set(ids) - {row["raw_content_id"] for row in known})
        jobs = [app.job(ProcessIncoming(content_id=each, mailbox=name), key=f"{name}:{each}") for each in new]
        return sum(answer.new for answer in await app.enqueue_many(jobs, connection=pg))


@dataclass(frozen=True)
class Message:
    """One message where it lies; opened when its turn has come."""

    box: Any
    key: Any

    def open(self) -> BinaryIO:
        """Its raw bytes."""
        if self.box is None:
            return cast("Path", self.key).open("rb")
        return cast("BinaryIO", self.box.get_file(self.key))


@contextmanager
def opened(path: Path) -> Iterator[Iterator[Message]]:
    """The messages of a mailbox, to be opened while it is open.

    Raises:
        NoMailbox: it is none.
    """
    if path.is_dir():
        if not (path / "cur").is_dir():
            raise NoMailbox(f"{path} is no Maildir: it has no folder cur")
        maildir = mailbox.Maildir(path, create=False)
        boxes = [maildir, *(maildir.get_folder(folder) for folder in sorted(maildir.list_folders()))]
        yield (Message(box, key) for box in boxes for key in sorted(box.keys()))
        return
    if not path.is_file():
        raise NoMailbox(f"{path} is neither a file nor a Maildir")
    with path.open("rb") as file:
        start = file.read(5)
    if start != b"From ":
        yield iter([Message(None, path)] if start else [])
        return
    with closing(mailbox.mbox(path, create=False)) as mbox:
        yield (Message(mbox, key) for key in mbox.iterkeys())
