"""Do the servers answer? Asked over bare sockets, because importing a client costs more than the answer."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import BinaryIO

from streamworker.embedded.record import PG_PORT, PG_USER

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
        ``OK``, else the SQLSTATE of the first error, else "" if nobody answers.
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
