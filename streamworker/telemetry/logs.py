"""Logs: one line per event on standard error, readable for people or as JSON for machines.

Nothing is configured at import. A program calls `configure` once; a library calls `get_logger` and nothing else. Until
`configure` was called (streamworker used inside somebody else's program), events go to the standard library's logger
``streamworker``, or to structlog if that program configured it.

Every line of ours is cleaned: passwords of URLs become ``***``, values under keys that hold payloads or secrets are not
written at all, controls are spelled out, and texts are bounded. A value that cannot be shown fails nobody.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, TextIO, cast

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from streamworker.redact import MAX_CHARS, clean_block, clean_json, cut, cut_lines, describe, redact, text_of
from streamworker.redact import clean as one_line

if sys.platform != "win32":
    import fcntl

_REFUSED_KEYS = frozenset({"payload", "body", "bodies", "password", "passwd", "secret", "authorization"})
_REFUSED = "[not logged]"
_MAX_DEPTH = 12  # the frames of an exception in a group in a group need all of it
_MAX_ITEMS: Final = 100
"""Items of one list or dictionary that are written."""
_MAX_BLOCK: Final = 16_000
"""Characters of a traceback or a stack."""
_BLOCKS = ("exception", "stack")
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


class _Pipeline(NamedTuple):
    sink: _Sink
    processors: list[Processor]
    wrapper: type[FilteringBoundLogger]


_pipeline: _Pipeline | None = None


def _after_fork_in_child() -> None:
    if _pipeline is not None:
        _pipeline.sink.renew()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork_in_child)


class _Logger:
    """Finds its configuration at the first event after `configure`, so that a module may hold one from import on."""

    __slots__ = ("_bound", "_bound_to", "_values")

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self._bound: Any = None
        self._bound_to: _Pipeline | None = None

    def _resolve(self) -> Any:
        if _pipeline is None:
            return _foreign_logger(self._values)
        if self._bound_to is not _pipeline:
            self._bound = _make(_pipeline, self._values)
            self._bound_to = _pipeline
        return self._bound

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # copy and friends ask before __init__ ran
        return getattr(self._resolve(), name)


def get_logger(name: str = "streamworker", **values: Any) -> FilteringBoundLogger:
    """Return a structlog logger; cheap to make and safe to keep from import on.

    On a hot path keep the result of ``.bind(...)``, made after `configure`: an event below the level then costs one
    empty call.

    Args:
        name: shown as ``logger``.
        values: bound to every event.
    """
    return cast("FilteringBoundLogger", _Logger({"logger": name, **values}))


def configure(level: str = "info", format: Literal["console", "json"] = "json", stream: TextIO | None = None) -> None:  # noqa: A002
    """Set up logging for the whole process: our loggers, structlog's, and the standard library's root logger.

    May be called again; the last call holds. Handlers that others added to the root logger stay.

    Args:
        level: debug, info, warning, error or critical; events below it are dropped.
        format: ``console`` for people, ``json`` for machines (one object per line).
        stream: where lines go; ``None`` takes the present ``sys.stderr``.

    Raises:
        ValueError: the level or the format is unknown.
    """
    global _pipeline  # noqa: PLW0603 - logging is per process, and here alone
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None or format not in ("console", "json"):
        raise ValueError(f"configure(level={level!r}, format={format!r}): no such level or format")
    stream = sys.stderr if stream is None else stream
    sink = _Sink(stream)
    head, tail = _chains(format, stream)
    pipeline = _Pipeline(sink, [*head, *tail], structlog.make_filtering_bound_logger(number))
    structlog.configure(
        processors=pipeline.processors,
        wrapper_class=pipeline.wrapper,
        # Positional arguments of structlog.get_logger("name") arrive here; the sink is the same for all names.
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=True,
    )
    _route_standard_library(sink, number, head, tail)
    _pipeline = pipeline


def _chains(format: str, stream: TextIO) -> tuple[list[Processor], list[Processor]]:  # noqa: A002
    """Return the processors that add to an event, and those that turn it into a line."""
    head: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.StackInfoRenderer(),
    ]
    if format == "json":
        head.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
        # Locals of the frames hold payloads and passwords.
        transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        return head, [structlog.processors.ExceptionRenderer(cast("Any", _safely(transformer))), clean, _to_json]
    head.append(structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False))
    renderer = structlog.dev.ConsoleRenderer(
        colors=_wants_colors(stream), exception_formatter=structlog.dev.plain_traceback
    )
    text = structlog.processors.ExceptionRenderer(cast("Any", _safely(_formatted)))
    return head, [text, clean, _escape_controls, renderer]


def _safely(formatter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A formatter of exceptions that shows what can be shown of one whose own methods raise."""

    def safe(exc_info: Any) -> Any:
        try:
            return formatter(exc_info)
        except BaseException:  # noqa: BLE001 - a user's __str__ or __repr__ may raise SystemExit, too
            return describe(exc_info[1]) if formatter is _formatted else _safely(_formatted)(exc_info)

    return safe


def _formatted(exc_info: Any) -> str:
    return "".join(traceback.format_exception(*exc_info)).removesuffix("\n")


def _route_standard_library(sink: _Sink, level: int, head: list[Processor], tail: list[Processor]) -> None:
    handler = _SinkHandler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*head, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
        )
    )
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _SinkHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)


def _make(pipeline: _Pipeline, values: dict[str, Any]) -> Any:
    # bind() takes the values, for "logger" is also a parameter of wrap_logger().
    return structlog.wrap_logger(pipeline.sink, pipeline.processors, pipeline.wrapper, dict).bind(**values)


def _foreign_logger(values: dict[str, Any]) -> Any:
    if structlog.is_configured():
        return structlog.get_logger().bind(**values)
    return structlog.wrap_logger(
        logging.getLogger("streamworker"),
        processors=[structlog.stdlib.filter_by_level, clean, _to_standard_library],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    ).bind(**{key: value for key, value in values.items() if key != "logger"})


def _wants_colors(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def clean(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hide passwords, drop payloads, and turn what JSON does not know into text; a structlog processor."""
    exc_info = event.pop("exc_info", None)
    cleaned: EventDict = {
        key: _REFUSED if key.lower() in _REFUSED_KEYS else _clean(value, _MAX_DEPTH) for key, value in event.items()
    }
    for name in _BLOCKS:
        if type(block := event.get(name)) is str:
            cleaned[name] = cut_lines(redact(cut_lines(block, 2 * _MAX_BLOCK)), _MAX_BLOCK)
    if exc_info is not None:
        cleaned["exc_info"] = exc_info  # rendered by the next processor, which needs the exception itself
    return cleaned


def _clean(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is str:
        return value if len(value) < 3 else _bounded(value)
    if kind in (int, float, bool) or value is None:
        return value
    if depth == 0:
        return "..."
    if kind is dict:
        pairs = ((text_of(key), item) for key, item in list(value.items())[:_MAX_ITEMS])
        cleaned = {
            cut(key): _REFUSED if key.lower() in _REFUSED_KEYS else _clean(item, depth - 1) for key, item in pairs
        }
        return cleaned if len(value) <= _MAX_ITEMS else {**cleaned, "…": f"{len(value) - _MAX_ITEMS:,} more"}
    if kind in (list, tuple, set, frozenset):
        items = [_clean(item, depth - 1) for item in list(value)[:_MAX_ITEMS]]
        return items if len(value) <= _MAX_ITEMS else [*items, f"… {len(value) - _MAX_ITEMS:,} more"]
    return _bounded(text_of(value, how=repr if issubclass(kind, BaseException) else str))


def _bounded(text: str) -> str:
    """Of a text of 20 MB only the beginning is searched for passwords."""
    if len(text) <= MAX_CHARS:
        return redact(text)
    return f"{redact(text[: 2 * MAX_CHARS])[:MAX_CHARS]}… ({len(text) - MAX_CHARS:,} characters more)"


def _to_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    try:
        line = orjson.dumps(event).decode()
    except TypeError:
        # Integers above 64 bits and lone surrogates, which the slower one writes.
        return json.dumps(event)
    return clean_json(line)


def _escape_controls(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = clean_block(value) if key in _BLOCKS else one_line(value)
    return event


def _to_standard_library(_logger: WrappedLogger, _method: str, event: EventDict) -> tuple[tuple[str], dict[str, Any]]:
    exc_info = event.pop("exc_info", None)
    text = str(event.pop("event", ""))
    fields = " ".join(f"{key}={value!r}" for key, value in event.items())
    return (f"{text} {fields}".rstrip(),), {"exc_info": exc_info}
