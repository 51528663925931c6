"""Table of reactions: what a worker does about each error of a server. The first row that matches holds.

redis-py has classes for some errors, whose prefix it strips, and only text for others; errors of a script may all be
text, which Redis 6.2 wraps once more. So a row names both: classes, and words to look for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from redis import exceptions as redis_errors

from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable


class Reaction(enum.Enum):
    """What to do, from "try later" to "give up"."""

    WAIT = "back off and try again; what runs goes on, what is finished keeps its lease"
    RECONNECT = "give up the connections, find the address again, then as for WAIT"
    FATAL = "only people can change it: after a few tries the worker drains and exits 78"
    FULL = "finishing goes on; what would grow stays where it is until there is room"
    HEAL = "make the group again, from the first entry on"
    KEY = "say it, read around this key, serve all others"
    RELOAD = "send the script again: nothing was run"
    REFUSE = "say it and go on; the command is at fault"


class ErrorKind(NamedTuple):
    """One kind of error.

    Attributes:
        name: the server's name for it.
        reaction: what to do.
        classes: redis-py's exceptions.
        words: one of them in the message is enough.
    """

    name: str
    reaction: Reaction
    classes: tuple[type[Exception], ...] = ()
    words: tuple[str, ...] = ()


_DENIED: Final = ("NOPERM", "ACL failure in script", "can't run this command or subcommand")

TABLE: Final = (
    ErrorKind("WRONGPASS", Reaction.FATAL, (redis_errors.AuthenticationError,), ("WRONGPASS", "NOAUTH")),
    ErrorKind("NOPERM", Reaction.FATAL, (redis_errors.NoPermissionError,), _DENIED),
    ErrorKind("READONLY", Reaction.RECONNECT, (redis_errors.ReadOnlyError,), ("READONLY",)),
    ErrorKind("UNBLOCKED", Reaction.RECONNECT, (), ("UNBLOCKED",)),
    ErrorKind("LOADING", Reaction.WAIT, (redis_errors.BusyLoadingError,), ("LOADING",)),
    ErrorKind("MASTERDOWN", Reaction.WAIT, (redis_errors.MasterDownError,), ("MASTERDOWN",)),
    ErrorKind("CLUSTERDOWN", Reaction.WAIT, (redis_errors.ClusterDownError,), ("CLUSTERDOWN",)),
    ErrorKind("TRYAGAIN", Reaction.WAIT, (redis_errors.TryAgainError,), ("TRYAGAIN",)),
    ErrorKind("MISCONF", Reaction.WAIT, (), ("MISCONF",)),
    ErrorKind("NOREPLICAS", Reaction.WAIT, (), ("NOREPLICAS",)),
    ErrorKind("BUSY", Reaction.WAIT, (), ("BUSY Redis", "BUSY Valkey", "is busy running a script")),
    ErrorKind("OOM", Reaction.FULL, (redis_errors.OutOfMemoryError,), ("OOM command not allowed",)),
    ErrorKind("NOSCRIPT", Reaction.RELOAD, (redis_errors.NoScriptError,), ("NOSCRIPT",)),
    ErrorKind("NOGROUP", Reaction.HEAL, (), ("NOGROUP",)),
    ErrorKind("WRONGTYPE", Reaction.KEY, (), ("WRONGTYPE",)),
    ErrorKind(
        "no connection",
        Reaction.WAIT,
        (redis_errors.ConnectionError, redis_errors.TimeoutError, redis_errors.InvalidResponse, OSError),
    ),
)


SILENT: Final = "no answer"
"""Prefix of the reason why an ending was not stored on a node that does not answer."""


def row_of(error: BaseException | str) -> ErrorKind | None:
    """The row for an error, or for the text of an error that a script passed on; ``None`` if none matches."""
    text = str(error)
    for row in TABLE:
        if isinstance(error, row.classes) or any(word in text for word in row.words):
            return row
    return None


def cure_of(error: str) -> str:
    """What an operator can do about an error with which the server refuses to store an ending."""
    reaction = reaction_to(error)
    if reaction is Reaction.FULL:
        return "Redis is out of memory: raise maxmemory or delete keys"
    if reaction is Reaction.KEY:
        return "a key of this queue has a wrong type (streamworker check names it): rename or delete it"
    if "last possible ID" in error:
        return "a stream of this queue holds the last possible entry id and takes no more: rename or delete it"
    if error.startswith(SILENT):
        return "the node of the cluster that serves this queue is away: its jobs wait for it"
    return "see what is wrong with the keys of this queue: streamworker check names what it finds"


_REFUSALS: Final = {
    "MISCONF": "its last save to disk failed, and no job starts or ends: look at its log and its disk",
    "NOREPLICAS": "too few replicas follow it (min-replicas-to-write), and no job starts or ends: see to them",
    "OOM": "it is out of memory, and takes neither new jobs nor retries: raise maxmemory or delete keys",
    "READONLY": "it is a replica, and no job starts or ends: point REDIS_URL to its primary",
}


def refused(error: BaseException, address: object) -> str | None:
    """What a server that answers says of all writes with this error; ``None`` if it takes writes."""
    row = row_of(error)
    if row is None or row.name not in _REFUSALS:
        return None
    return f"Redis at {address} refuses writes ({row.name}): {_REFUSALS[row.name]}"


def reaction_to(error: BaseException | str) -> Reaction:
    """What to do about an error; without a row the command is at fault."""
    row = row_of(error)
    return row.reaction if row is not None else Reaction.REFUSE


def clustered(info: dict[str, Any]) -> bool:
    """Whether INFO's section "server" is that of a cluster's node; Valkey calls the field "server_mode"."""
    return "cluster" in (info.get("redis_mode"), info.get("server_mode"))


@contextmanager
def understood(address: object) -> Iterator[None]:
    """Turn redis-py's errors into ours by the table of reactions, one sentence each.

    Raises:
        ConfigurationError: the server refuses us for good: password, permissions, not a usable server.
        Unreachable: no server answers, what answers is not Redis, or it cannot serve us now.
        StreamworkerError: the server refuses a command for another reason.
    """
    try:
        yield
    except (redis_errors.RedisError, OSError) as error:
        raise _ours(error, address) from error


def _ours(error: Exception, address: object) -> StreamworkerError:
    row = row_of(error)
    name, reaction = (row.name, row.reaction) if row is not None else ("", Reaction.REFUSE)
    if isinstance(error, redis_errors.MovedError):
        return ConfigurationError(CLUSTER.format(address))
    if name == "WRONGPASS":
        return ConfigurationError(
            f"Redis at {address} refused the login ({error}): check the user and password in REDIS_URL"
        )
    if "DB index is out of range" in str(error):
        return ConfigurationError(
            f"Redis at {address} has no database of that number: choose a lower one in REDIS_URL, or raise `databases` "
            "in the server's configuration"
        )
    if reaction is Reaction.FATAL:
        return ConfigurationError(
            f"Redis at {address} denies a command this needs ({error}): extend the ACL of this user"
        )
    if name == "LOADING":
        return Unreachable(f"Redis at {address} is still loading its data: try again when it is up")
    if isinstance(error, redis_errors.InvalidResponse):
        return Unreachable(f"what answers at {address} is not Redis: check host and port in REDIS_URL")
    if name == "no connection":
        return _tls_trouble(error, address) or Unreachable(
            f"Redis at {address} does not answer ({_short(error)}): check that it runs and that REDIS_URL is right"
        )
    if reaction in (Reaction.WAIT, Reaction.RECONNECT):
        said = str(error) if str(error).startswith(name) else f"{name} {error}"
        return Unreachable(f"Redis at {address} can do nothing for us now ({_short(said)}): it is tried again")
    return StreamworkerError(f"Redis at {address} answered with an error: {error}")


def _tls_trouble(error: Exception, address: object) -> ConfigurationError | None:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return ConfigurationError(
            f"the certificate of Redis at {address} is not trusted ({_short(error)}): name the CA that signed it with "
            "ssl_ca_certs in REDIS_URL, and the host as the certificate has it"
        )
    if "CERTIFICATE_REQUIRED" in text:
        return ConfigurationError(
            f"Redis at {address} wants a client certificate: name it with ssl_certfile and ssl_keyfile in REDIS_URL"
        )
    return None


def _short(error: BaseException | str) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) < 200 else text[:200] + "…"


CLUSTER: Final = "Redis at {} is a node of a cluster: write redis+cluster:// instead of redis:// in REDIS_URL"
