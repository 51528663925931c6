"""Ask a worker of this machine for its health: ``python -m streamworker.telemetry.probe [/readyz] [host:port]``.

For containers (HEALTHCHECK) and service managers. It asks where ``STREAMWORKER_HTTP`` listens, prints the worker's
answer and exits with 0 if that is well, else with 1. It runs every few seconds beside every worker, so that it imports
next to nothing.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Final

PATIENCE: Final = 3.0
"""Seconds until no answer counts as a bad one."""
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a worker listens on, not what we do


def ask(arguments: Sequence[str], env: Mapping[str, str]) -> tuple[bool, str]:
    """(whether all is well, what to print).

    Args:
        arguments: a path that begins with a slash (``/healthz`` unless given), and an address.
        env: where ``STREAMWORKER_HTTP`` is looked up if no address is given.
    """
    path = next((word for word in arguments if word.startswith("/")), "/healthz")
    address = next((word for word in arguments if not word.startswith("/")), env.get("STREAMWORKER_HTTP", ""))
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isascii() or not port.isdigit():
        return False, "no worker to ask: set STREAMWORKER_HTTP=host:port, as for the worker"
    try:
        with socket.create_connection((_EVERYWHERE.get(host, host), int(port)), PATIENCE) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
            with connection.makefile("rb") as reader:
                reply = reader.read(65_536)
    except (OSError, OverflowError) as error:
        return False, f"no answer from {address}: {error}"
    head, _, body = reply.partition(b"\r\n\r\n")
    return head.split(b" ")[1:2] == [b"200"], body.decode(errors="replace").strip()


def main() -> int:
    """Ask, print, and return the exit code."""
    well, words = ask(sys.argv[1:], os.environ)
    print(words)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
