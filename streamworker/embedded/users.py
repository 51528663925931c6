"""How a user joins: take the users' lock, see that a supervisor lives, wait until the servers answer.

The process that holds the supervisor's lock *is* the supervisor, or hands the lock to the one it spawns. So there is
never a second one, and never a moment in which a dead one counts as alive; a published record is only believed if the
servers in it answer.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from streamworker.embedded.binaries import Binaries
from streamworker.embedded.layout import (
    DATABASE,
    FAILED,
    PG_PORT,
    PG_USER,
    READY,
    Layout,
    Lock,
    Record,
    last_line,
    open_log,
    read_record,
)
from streamworker.errors import ConfigurationError, Unreachable

LINGER = 1.0  # seconds the servers outlive their last user, so that commands typed in a row share one start
POLL = 0.005  # seconds
SPAWNS = 3  # supervisors one call starts before it gives up: something kills them

# All the supervisor and the servers get of the environment: PGPORT, PGTZ and their like would change PostgreSQL, and
# secrets do not belong into a process that outlives their owner.
_KEPT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_FIXED = {"LC_ALL": "C", "TZ": "UTC"}


def join_users(layout: Layout, deadline: float) -> Lock:
    """Take a share of the users' lock, waiting out a supervisor that is stopping its servers.

    Args:
        layout: the private directory.
        deadline: in terms of ``time.monotonic()``.

    Raises:
        Unreachable: the deadline passed.
    """
    while True:
        lock = Lock(layout.users_lock)
        try:
            if lock.try_shared() and lock.is_current():
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()
        if time.monotonic() > deadline:
            raise Unreachable(f"The embedded servers of {layout.root} take too long to stop: see {layout.log}.")
        time.sleep(POLL)


def await_servers(layout: Layout, binaries: Binaries, deadline: float) -> Record:
    """Wait for servers that answer, spawning a supervisor whenever there is none. The caller holds the users' lock.

    Args:
        layout: the private directory.
        binaries: what a spawned supervisor runs.
        deadline: in terms of ``time.monotonic()``.

    Raises:
        ConfigurationError: there is no Python to run a supervisor with.
        Unreachable: the servers failed to start, or the deadline passed.
    """
    spawned = 0
    while True:
        supervisor = Lock(layout.supervisor_lock)
        try:
            if supervisor.try_exclusive():  # no supervisor lives: the record is that of a dead one
                _give_up_after(spawned, layout)
                layout.record.unlink(missing_ok=True)
                _spawn(layout, binaries, supervisor)
                spawned += 1
        finally:
            supervisor.close()
        record = read_record(layout.record)
        # Asked last, because the servers of a supervisor that was just killed may still answer.
        if record is not None and record.state == READY and _answers(record) and is_supervised(layout):
            return record
        if time.monotonic() > deadline:
            last = last_line(layout.log)
            raise Unreachable(f"The embedded servers are not ready in time; last word in {layout.log}: {last}.")
        time.sleep(POLL)


def is_supervised(layout: Layout) -> bool:
    """Whether a supervisor lives. If not, asking takes its lock for an instant; a user would just look again."""
    if not layout.supervisor_lock.exists():
        return False
    lock = Lock(layout.supervisor_lock)
    try:
        return not lock.try_shared()
    finally:
        lock.close()


def _give_up_after(spawned: int, layout: Layout) -> None:
    """Raise if a supervisor of ours said that it failed, or if one after the other died."""
    record = read_record(layout.record)
    if spawned >= SPAWNS or (spawned and record is not None and record.state == FAILED):
        reason = (record.error if record else "") or f"see {layout.log}"
        raise Unreachable(f"The embedded servers did not start: {reason}.")


def _answers(record: Record) -> bool:
    return (
        redis_answers(record.redis_port, record.redis_password)
        and postgres_answers(Path(record.socket_dir), DATABASE) == OK
    )


def _spawn(layout: Layout, binaries: Binaries, lock: Lock) -> None:
    """Start a supervisor that inherits the lock: it is held without a gap, and for as long as the supervisor lives."""
    if not sys.executable:
        raise ConfigurationError("REDIS_URL=embedded needs a Python interpreter to run: set REDIS_URL to a server.")
    program = Path(__file__).with_name("supervisor.py")
    arguments = (layout.root, lock.fd, LINGER, binaries.valkey, binaries.postgres)
    with open_log(layout.log) as log:
        starter = subprocess.Popen(  # noqa: S603 - this Python and a file of ours, no shell
            [sys.executable, "-I", "-S", str(program), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={name: os.environ[name] for name in _KEPT if name in os.environ} | _FIXED,
            pass_fds=(lock.fd,),
            start_new_session=True,
        )
    starter.wait()  # it forks the supervisor and ends; a failure shows as a lock that is free again


OK = "00000"  # PostgreSQL's own word for success
NO_SUCH_DATABASE = "3D000"

_PROTOCOL_3 = 196608


def redis_answers(port: int, password: str, timeout: float = 1.0) -> bool:
    """Whether *our* Redis serves commands there: it knows the password and has loaded its data.

    Args:
        port: on 127.0.0.1.
        password: what AUTH sends.
        timeout: seconds for each step.
    """
    commands = (("AUTH", password), ("PING",))
    request = "".join(f"*{len(c)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in c) for c in commands)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout) as connection, connection.makefile("rb") as replies:
            connection.sendall(request.encode())
            return replies.readline() == b"+OK\r\n" and replies.readline() == b"+PONG\r\n"
    except OSError:
        return False


def postgres_answers(socket_dir: Path, database: str, statement: str = "", timeout: float = 1.0) -> str:
    """Log in to PostgreSQL, run one statement if asked to, log out.

    Args:
        socket_dir: the directory of the Unix socket.
        database: the database to log in to.
        statement: SQL without parameters.
        timeout: seconds for each step.

    Returns:
        ``OK``, else the SQLSTATE of the first error, else "" if no server answers.
    """
    fields = f"user\0{PG_USER}\0database\0{database}\0\0".encode()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(socket_dir / f".s.PGSQL.{PG_PORT}"))
            connection.sendall(struct.pack("!ii", 8 + len(fields), _PROTOCOL_3) + fields)
            with connection.makefile("rb") as replies:
                answer = _until_ready(replies)
                if answer == OK and statement:
                    query = statement.encode() + b"\0"
                    connection.sendall(b"Q" + struct.pack("!i", 4 + len(query)) + query)
                    answer = _until_ready(replies)
            if answer == OK:  # after a FATAL the other side is gone already
                connection.sendall(b"X" + struct.pack("!i", 4))
            return answer
    except OSError:
        return ""


def _until_ready(replies: BinaryIO) -> str:
    """Read messages up to ReadyForQuery or the first error."""
    while len(head := replies.read(5)) == 5:
        body = replies.read(struct.unpack("!i", head[1:])[0] - 4)
        if head[:1] == b"Z":
            return OK
        if head[:1] == b"E":
            codes = [field[1:].decode() for field in body.split(b"\0") if field[:1] == b"C"]
            return codes[0] if codes else ""
    return ""
