"""What a process is told that renews a worker's claims while the worker cannot: see `streamworker.renewer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from streamworker.broker import scripts
from streamworker.broker.client import Address


class Server(msgspec.Struct, frozen=True):
    """One server, how to log in there, and what to send it.

    Attributes:
        login: as `Address.bare` tells it.
        commands: each a list of words, or (index of a script, keys, arguments).
    """

    login: dict[str, Any]
    commands: list[list[Any]]


def standby(
    address: Address,
    script: scripts.Script,
    calls: Sequence[tuple[list[str], list[Any]]],
    heartbeat: str,
    *,
    lease: float,
    longest: float,
) -> bytes | None:
    """The line that tells everything; ``None`` if a program without redis-py cannot log in.

    Args:
        address: where Redis is.
        script: what renews.
        calls: its (keys, arguments), one a call.
        heartbeat: key of the worker's heartbeat, which goes on, too.
        lease: seconds.
        longest: seconds of silence after which the worker counts as hung for good.
    """
    commands: list[tuple[str, list[Any]]] = [(keys[0], [0, keys, args]) for keys, args in calls]
    commands.append((heartbeat, ["PEXPIRE", heartbeat, max(1000, int(lease * 1000))]))
    servers: dict[object, Server] = {}
    for key, command in commands:
        home = address.home(key)
        server = servers.get(home)
        if server is None:
            login = (address if home is None else address.at(home)).bare()
            if login is None:
                return None
            server = servers[home] = Server(login, [])
        server.commands.append(command)
    told = {
        "lease": lease,
        "longest": longest,
        "scripts": [script.text],
        "servers": [{**server.login, "commands": server.commands} for server in servers.values()],
    }
    return msgspec.json.encode(told)
