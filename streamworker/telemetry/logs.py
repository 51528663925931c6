"""Logs: one line per event on standard error, readable for people or as JSON for machines.

Nothing is configured at import. A program calls `configure` once; a library calls `get_logger` and nothing else. Until
`configure` was called (streamworker used as a library), events go to the standard library's logger
``streamworker``, or to structlog if that program configured it.

structlog is imported with the first event, or by `configure`: it brings rich and its tracebacks with it, and a command
that lists jobs has nothing to log. What a line looks like is in `streamworker.telemetry.processors`.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Protocol, TextIO, TypeAlias, cast

from streamworker.redact import text_of

if sys.platform != "win32":
    import fcntl

Format: TypeAlias = Literal["console", "json"]
Take: TypeAlias = Callable[[str, str], None]
_TURN: Final = 5.0
"""Seconds to wait for the other processes that write to the same pipe."""
_TURN_LOST: Final = 60.0
"""Seconds without waiting after one of them kept it for longer: it is frozen."""


class _Sink:
    """Writes lines to a stream; the end of every logger."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # Reentrant: a signal handler may log while its own thread is writing.
        self._lock = threading.RLock()
        self._turn = _Turn(stream)

    def renew(self) -> None:
        """In a forked child: locks that other threads of the parent held are not released there by anyone."""
        self._lock, self._turn = threading.RLock(), _Turn(self._stream)

    def msg(self, line: str) -> None:
        try:
            self._write(line + "\n")
        except UnicodeEncodeError:
            self._write(line.encode("ascii", "backslashreplace").decode() + "\n")

    def _write(self, text: str) -> None:
        try:
            with self._lock, self._turn:
                self._stream.write(text)
                self._stream.flush()
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError):
            # A closed pipe or a full disk must not fail jobs, and there is nowhere left to say so.
            pass

    log = debug = info = warn = warning = error = critical = fatal = exception = failure = err = msg


class _Turn:
    """A line of its own for each of several processes that write to one pipe or socket, as those of a supervisor do.

    The kernel writes up to PIPE_BUF bytes (4,096) in one piece; longer lines are cut into one another where the reader
    is slow. A record lock on the pipe itself excludes other processes, needs no file, and ends with its process.
    """

    def __init__(self, stream: TextIO) -> None:
        self._depth = 0
        self._again_at = 0.0
        self._number: int | None = None
        try:
            number = stream.fileno()
            mode = os.fstat(number).st_mode
        except (OSError, ValueError, AttributeError):
            return  # no file of the system's
        if sys.platform != "win32" and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            self._number = number

    def __enter__(self) -> None:
        self._depth += 1
        if self._number is None or self._depth > 1 or time.monotonic() < self._again_at:
            return
        give_up_at = time.monotonic() + _TURN
        while True:
            try:
                fcntl.lockf(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if time.monotonic() > give_up_at:
                    self._again_at = time.monotonic() + _TURN_LOST
                    return
                time.sleep(0.002)
            except OSError:
                self._number = None  # a system without locks on pipes
                return
            else:
                return

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._number is not None and not self._depth:
            try:
                fcntl.lockf(self._number, fcntl.LOCK_UN)
            except OSError:
                self._number = None


class _SinkHandler(logging.Handler):
    """Sends the standard library's records to the sink."""

    def __init__(self, sink: _Sink) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except BaseException:  # noqa: BLE001 - a bad record never reaches its caller, even if its __str__ raises SystemExit
            get_logger(text_of(record.name)).error("record_unprintable", file=record.pathname, line=record.lineno)
        else:
            self._sink.msg(line)


class Logger(Protocol):
    """The methods of structlog's loggers that this package uses. Each event is a word; its values are keywords."""

    def bind(self, **values: Any) -> Logger: ...
    def debug(self, event: str, /, **values: Any) -> Any: ...
    def info(self, event: str, /, **values: Any) -> Any: ...
    def warning(self, event: str, /, **values: Any) -> Any: ...
    def error(self, event: str, /, **values: Any) -> Any: ...
    def exception(self, event: str, /, **values: Any) -> Any: ...


class _Pipeline(NamedTuple):
    sink: _Sink
    processors: list[Any]
    wrapper: type
    level: int


class _Prepared(logging.Handler):
    """The root logger's handler of a program that has logged nothing so far: its first record configures the logs.

    Args:
        level: as `configure` takes it.
        format: the same.
    """

    def __init__(self, level: str, format: Format) -> None:  # noqa: A002 - as `configure` has it
        super().__init__()
        self.wanted: Final = (level, format)

    def emit(self, record: logging.LogRecord) -> None:
        configure(*self.wanted)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _SinkHandler):
                handler.handle(record)


_pipeline: _Pipeline | None = None
_prepared: _Prepared | None = None


def _after_fork_in_child() -> None:
    if _pipeline is not None:
        _pipeline.sink.renew()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork_in_child)


class _Logger:
    """Finds its configuration at the first event after `configure`, so that a module may hold one from import on."""

    __slots__ = ("_bound", "_bound_to", "_take", "_values")

    def __init__(self, values: dict[str, Any], take: Take | None = None) -> None:
        self._values = values
        self._take = take
        self._bound: Any = None
        self._bound_to: _Pipeline | None = None

    def _resolve(self) -> Any:
        from streamworker.telemetry import processors  # noqa: PLC0415 - it imports structlog

        if _pipeline is None:
            if _prepared is None:
                return processors.foreign_logger(self._values, self._take)
            configure(*_prepared.wanted)
        if self._bound_to is not _pipeline:
            sink, chain, wrapper, level = cast("_Pipeline", _pipeline)
            if self._take is not None:
                chain, wrapper = processors.tapped(chain, self._take, level)
            self._bound = processors.logger_of(sink, chain, wrapper, self._values)
            self._bound_to = _pipeline
        return self._bound

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # copy and friends ask before __init__ ran
        return getattr(self._resolve(), name)


def get_logger(name: str = "streamworker", **values: Any) -> Logger:
    """Return a structlog logger; cheap to make and safe to keep from import on.

    On a hot path keep the result of ``.bind(...)``, made after `configure`: an event below the level then costs one
    empty call.

    Args:
        name: shown as ``logger``.
        values: bound to every event.
    """
    return cast("Logger", _Logger({"logger": name, **values}))


def tapped_logger(take: Take, name: str, **values: Any) -> Logger:
    """A logger as `get_logger` returns it. ``take`` gets its lines, too, from info up, whatever the log's level is.

    Args:
        take: called with the level and the line's text, cleaned, in the thread that logs.
        name: shown as ``logger``.
        values: bound to every event.
    """
    return cast("Logger", _Logger({"logger": name, **values}, take))


def reporting_logger(report: Callable[[str, str, dict[str, str]], None]) -> Any:
    """A structlog logger that writes nothing: ``report`` gets level, event and values of each line, cleaned."""
    from streamworker.telemetry import processors  # noqa: PLC0415 - it imports structlog

    return processors.reporting_logger(report)


def configure(level: str = "info", format: Format = "json", stream: TextIO | None = None) -> None:  # noqa: A002
    """Set up logging for the whole process: our loggers, structlog's, and the standard library's root logger.

    May be called again; the last call holds. Handlers that others added to the root logger stay.

    Args:
        level: debug, info, warning, error or critical; events below it are dropped.
        format: ``console`` for people, ``json`` for machines (one object per line).
        stream: where lines go; ``None`` takes the present ``sys.stderr``.

    Raises:
        ValueError: the level or the format is unknown.
    """
    from streamworker.telemetry import processors  # noqa: PLC0415 - it imports structlog

    global _pipeline, _prepared
    number = _number(level, format)
    stream = sys.stderr if stream is None else stream
    sink = _Sink(stream)
    handler = _SinkHandler(sink)
    chain, wrapper = processors.configure(sink, number, format, stream, handler)
    _route_standard_library(handler, number)
    _pipeline, _prepared = _Pipeline(sink, chain, wrapper, number), None


def prepare(level: str, format: Format) -> None:  # noqa: A002
    """`configure` with the first event, for a command that runs no code of users and will probably log nothing.

    Args:
        level: as `configure` takes it.
        format: the same.

    Raises:
        ValueError: the level or the format is unknown.
    """
    global _pipeline, _prepared
    number = _number(level, format)
    _pipeline, _prepared = None, _Prepared(level, format)
    _route_standard_library(_prepared, number)


def configure_prepared() -> None:
    """Do now what `prepare` left for the first event: code of users is about to run, and may log by other ways."""
    if _prepared is not None:
        configure(*_prepared.wanted)


def _number(level: str, format: str) -> int:  # noqa: A002
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None or format not in ("console", "json"):
        raise ValueError(f"configure(level={level!r}, format={format!r}): no such level or format")
    return number


def _route_standard_library(handler: logging.Handler, level: int) -> None:
    root = logging.getLogger()
    # A new list: the first record is on its way over the old one.
    root.handlers = [old for old in root.handlers if not isinstance(old, _SinkHandler | _Prepared)]
    root.addHandler(handler)
    root.setLevel(level)
