"""Errors of asyncpg, classified and translated: an outage, one row's fault, or a server that cannot serve now.

Errors of other libraries, met on connections of users, are classified by their SQLSTATE, and by the class names of the
Python Database API (PEP 249).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import asyncpg

from streamworker.errors import ConfigurationError, NoConnection, StreamworkerError, Unreachable

_NO_SERVER: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.IdleSessionTimeoutError,
)
_STATEMENT_MODE: Final = "statement pooling mode"
# PgBouncer, about settings in a URL that its configuration neither passes on nor ignores.
_OPTIONS: Final = (
    _STATEMENT_MODE,
    "unsupported startup parameter",
    # The server, about a setting in the URL that it does not know, or not in this form, or not at this time.
    "unrecognized configuration parameter",
    "invalid value for parameter",
    "cannot be changed now",
    "cannot be changed without restarting",
)
_LIBRARIES: Final = ("sqlalchemy", "psycopg", "psycopg_pool", "psycopg2", "django")
_MISSING: Final = ("3F000", "42P01", "42883")  # schema, table, function
_REFUSED: Final = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)
_ROW_FAULTS: Final = ("22", "23", "54")
_UNABLE: Final = ("53", "57", "58", "F0", "XX")
_VALUES: Final = (ValueError, ArithmeticError, TypeError, RecursionError, struct.error)
# Errors of poolers that cannot reach a server, and of clients whose connection broke.
_BROKEN: Final = ("connection is closed", "connection was closed", "pool is clos", "released back to the pool")
_ENDING: Final = ("cannot switch to state", "not connected")
_NO_SERVER_CODES: Final = ("08", "57P01", "57P02", "57P03", "57P05", "25P03", "53300")


def is_outage(error: BaseException) -> bool:
    """Whether the server could not be reached, as opposed to refusing the statement."""
    error = _of_driver(error)
    if isinstance(error, NoConnection) or _is_misconfigured(error):
        return False  # the pool is exhausted; or every try fails alike
    if isinstance(error, _NO_SERVER):
        return True
    if isinstance(error, asyncpg.ProtocolViolationError):  # PgBouncer: "server conn crashed?", "query_wait_timeout"
        return True
    if isinstance(error, asyncpg.InterfaceError):
        return any(words in str(error) for words in _BROKEN)
    if isinstance(error, asyncpg.InternalClientError):  # the server has said goodbye, and its end is not read yet
        return str(error).startswith(_ENDING)
    return not isinstance(error, asyncpg.PostgresError) and _breaks_foreign(error)


def _breaks_foreign(error: BaseException) -> bool:
    """`is_outage` for an error of another library than asyncpg."""
    if code := sqlstate(error):
        return code.startswith(_NO_SERVER_CODES)
    names = [cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in _LIBRARIES]
    return "OperationalError" in names or ("InterfaceError" in names and any(words in str(error) for words in _BROKEN))


def _of_driver(error: BaseException) -> BaseException:
    """The driver's error inside one of SQLAlchemy's or Django's."""
    root = type(error).__module__.partition(".")[0]
    inner = getattr(error, "orig", None) if root == "sqlalchemy" else error.__cause__ if root == "django" else None
    return inner if isinstance(inner, BaseException) else error


def _is_misconfigured(error: BaseException) -> bool:
    """Whether options of the URL, or the pooler it names, make every connection fail alike."""
    if not isinstance(error, asyncpg.InterfaceError | asyncpg.PostgresError):
        return False
    wrong = asyncpg.exceptions.ClientConfigurationError  # asyncpg, of a value in the URL
    return isinstance(error, wrong) or any(words in str(error) for words in _OPTIONS)


def reason(error: BaseException) -> str:
    """The error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def sqlstate(error: BaseException) -> str:
    """The SQLSTATE (PostgreSQL documentation, appendix A); empty if the error has none."""
    error = _of_driver(error)
    if isinstance(error, asyncpg.PostgresError):
        return error.sqlstate or ""
    if type(error).__module__.partition(".")[0] not in _LIBRARIES:
        return ""
    code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return code if isinstance(code, str) else ""


def is_one_rows_fault(error: BaseException) -> bool:
    """Whether one row, or one value, is at fault, and the rest of its batch would succeed without it.

    Of the server's errors these are the classes 22 (data exception), 23 (integrity constraint violation) and 54
    (program limit exceeded) of PostgreSQL's appendix A. An error on our side of the connection, such as
    an OverflowError of a time that Python cannot hold, is about a value, too. All others concern the server.
    """
    if isinstance(error, StreamworkerError) or is_outage(error):
        return False
    if isinstance(error, asyncpg.PostgresError):
        return sqlstate(error)[:2] in _ROW_FAULTS
    return isinstance(error, _VALUES)


def is_unable(error: BaseException) -> bool:
    """Whether the server refuses the statement from every client now: it is read-only, full, out of memory, broken.

    These are 25006 and, of PostgreSQL's appendix A, the classes 53 (insufficient resources), 57 (operator intervention)
    without 57014, which ends a single query, 58 (system error), F0 (configuration file) and XX (internal error).
    """
    code = sqlstate(error)
    return code == "25006" or (code[:2] in _UNABLE and code != "57014")


def is_gone(connection: Any) -> bool:
    """Whether a connection broke; one of a pool is back in the pool then, and refuses every statement."""
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:
        return True


def break_off(connection: Any) -> None:
    """End a connection at once; pending statements fail. From any thread, if it blocks."""
    if hasattr(connection, "terminate"):
        with suppress(asyncpg.InterfaceError):
            connection.terminate()
        return
    with suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Translate errors of asyncpg into ours.

    Args:
        what: what is being done, for the sentence.
    """
    try:
        yield
    except StreamworkerError:
        raise
    except Exception as error:
        raise translated(error, what) from error


def translated(error: Exception, what: str) -> Exception:
    """Our error for an error of asyncpg; any other as it is."""
    if is_outage(error):
        return Unreachable(f"PostgreSQL does not answer while {what}: {reason(error)}")
    if _STATEMENT_MODE in str(error):
        return ConfigurationError(
            f"the connection pooler of DATABASE_URL is in statement mode, which has no transactions ({reason(error)}): "
            "let it pool by transaction or by session, or name PostgreSQL itself"
        )
    if _is_misconfigured(error):
        return ConfigurationError(
            f"DATABASE_URL cannot be used for {what}: {reason(error)}; correct or remove that option"
        )
    if isinstance(error, _REFUSED):
        return ConfigurationError(f"PostgreSQL refuses {what}: {reason(error)}; check DATABASE_URL")
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return ConfigurationError(
            f"PostgreSQL refuses {what}: {reason(error)}; grant it to this user, or use another one"
        )
    if isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError | asyncpg.InternalClientError):
        return StreamworkerError(f"PostgreSQL failed while {what}: {reason(error)}")
    return error


@contextmanager
def schema_expected(verb: str) -> Iterator[None]:
    """Say what is missing in the database of a user's connection.

    Args:
        verb: what is being done there: enqueue, or complete a job.
    """
    try:
        yield
    except Exception as error:
        code = sqlstate(error)
        if code in _MISSING:
            raise ConfigurationError(
                "the database of this connection has no schema streamworker: run `streamworker migrate up` on it"
            ) from error
        if code == "22P05":
            raise ConfigurationError(
                f"this database cannot hold what the job says ({reason(error)}): use one that is encoded in UTF8"
            ) from error
        if code == "42501":
            raise ConfigurationError(
                f"this connection may not {verb} ({reason(error)}): grant its user usage of the schema streamworker, "
                "select and insert on streamworker.jobs, and select, insert, update on streamworker.job_keys"
            ) from error
        raise
