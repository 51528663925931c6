"""Single connections past any pooler: for migrations and for LISTEN, which poolers in transaction mode cannot serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import asyncpg

from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

CONNECT_TIMEOUT: Final = 10.0
"""Seconds a connection may take to come about."""

_NO_SERVER: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.ConnectionDoesNotExistError,
)
_NOT_ALLOWED: Final = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Turn what asyncpg raises into our errors.

    Args:
        what: what was being done, for the sentence.
    """
    try:
        yield
    except StreamworkerError:
        raise
    except _NO_SERVER as error:
        raise Unreachable(f"PostgreSQL does not answer while {what}: {_reason(error)}") from error
    except _NOT_ALLOWED as error:
        raise ConfigurationError(f"PostgreSQL refuses {what}: {_reason(error)}; check DATABASE_URL") from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise ConfigurationError(
            f"PostgreSQL refuses {what}: {_reason(error)}; grant it to this user, or use another one"
        ) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StreamworkerError(f"PostgreSQL failed while {what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


async def connect(url: str, what: str) -> Connection:
    """One connection.

    Args:
        url: where.
        what: what it is for, shown by pg_stat_activity.

    Raises:
        Unreachable: no server answers.
        ConfigurationError: it refuses this user or this database.
    """
    options: dict[str, Any] = {"server_settings": {"application_name": f"streamworker {what}"}}
    with understood(f"connecting for {what}"):
        # No cached statements: the URL may lead through a pooler all the same.
        return await asyncpg.connect(url, timeout=CONNECT_TIMEOUT, statement_cache_size=0, **options)
