"""What the supervisor tells the users: one small JSON file, replaced as a whole."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from streamworker.embedded.layout import private_file

STARTING = "starting"  # also while a server that died is being started again
READY = "ready"
FAILED = "failed"

DATABASE = "streamworker"
PG_USER = "postgres"
PG_PORT = 5432  # names the socket file; nothing listens on TCP


class Record(NamedTuple):
    """One published state of the pair. The file is private, so it may hold the password."""

    state: str
    supervisor_pid: int
    redis_pid: int | None = None
    postgres_pid: int | None = None
    redis_port: int = 0
    redis_password: str = ""
    socket_dir: str = ""
    error: str = ""

    @property
    def redis_url(self) -> str:
        return f"redis://:{self.redis_password}@127.0.0.1:{self.redis_port}/0"

    @property
    def masked_redis_url(self) -> str:
        return self._replace(redis_password="***").redis_url  # noqa: S106 - a mask

    @property
    def database_url(self) -> str:
        # The port is written out because clients would otherwise take PGPORT from the user's environment.
        return f"postgresql://{PG_USER}@/{DATABASE}?host={quote(self.socket_dir)}&port={PG_PORT}"

    def write(self, path: Path) -> None:
        private_file(path, json.dumps(self._asdict()))


def read_record(path: Path) -> Record | None:
    """The published state; None if there is none, or one of another release that we cannot read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        fields: dict[str, Any] = json.loads(path.read_bytes())
        return Record(**fields)
    return None
