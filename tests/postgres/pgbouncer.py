"""Debian's PgBouncer, in front of a test's PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.postgres.servers import PostgresServer

_CONFIG = """
[databases]
* = host={host} port=5432 user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 500
server_reset_query_always = 0
logfile = {directory}/pgbouncer.log
pidfile = {directory}/pgbouncer.pid
"""


class PgBouncer:
    """One process; ``size`` server connections are shared by all clients, transaction by transaction unless ``mode`` differs.

    Its files are not in pytest's folders: each pytest that begins on this machine closes those to all other users.
    """

    def __init__(self, server: PostgresServer, *, mode: str = "transaction", size: int = 5) -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            pytest.skip("needs PgBouncer: apt-get install pgbouncer")
        self._directory = directory = Path(tempfile.mkdtemp(prefix="streamworker-bouncer-"))
        self.port = free_port()
        config = directory / "pgbouncer.ini"
        config.write_text(
            _CONFIG.format(host=server.socket_dir, port=self.port, directory=directory, mode=mode, size=size)
        )
        # It refuses to be root, as PostgreSQL does.
        become = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        if become:
            for path in (directory, config):
                os.chown(path, 65534, 65534)
            for path in (server.socket_dir, *server.socket_dir.parents, directory, *directory.parents):
                if path.owner() == "root" and str(path) not in ("/", "/tmp"):
                    path.chmod(path.stat().st_mode | 0o011)
            _open_to_all(server)
        self._command, self._become = [program, str(config)], become
        self._log, self._complaints = directory / "pgbouncer.log", directory / "pgbouncer.err"
        self.start()

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}?sslmode=disable"

    def start(self) -> None:
        # Another process of a busy machine may hold the port for a moment, as the near end of a connection.
        for attempt in range(5, 0, -1):
            with self._complaints.open("wb") as complaints:
                self._process = subprocess.Popen(self._command, stdout=complaints, stderr=complaints, **self._become)
            if self._is_up(last=attempt == 1):
                return
            time.sleep(0.2)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Stop it for good."""
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _is_up(self, *, last: bool) -> bool:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                log = self._log.read_text() if self._log.exists() else ""
                if self._process.poll() is not None:
                    assert not last, log + self._complaints.read_text()
                    return False
                assert time.monotonic() < deadline, log
                time.sleep(0.02)
            else:
                return True


def _open_to_all(server: PostgresServer) -> None:
    """The socket itself: PostgreSQL makes it for its own user."""
    for path in server.socket_dir.glob(".s.PGSQL.*"):
        path.chmod(0o777)
