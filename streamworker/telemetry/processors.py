"""Structlog's side of the logs: the processors that turn an event into a line, and loggers made of them.

Every line of ours is cleaned: passwords of URLs become ``***``, values under keys that hold payloads or secrets are not
written at all, controls are spelled out, and texts are bounded. A value that cannot be shown raises nothing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TextIO, cast

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from streamworker.redact import MAX_CHARS, clean_block, clean_json, cut, cut_lines, describe, printable, redact, text_of

Take = Callable[[str, str], None]
_REFUSED_KEYS = frozenset({"payload", "body", "bodies", "password", "passwd", "secret", "authorization"})
_REFUSED = "[not logged]"
_MAX_DEPTH = 12  # the frames of an exception in a group in a group need all of it
_MAX_ITEMS: Final = 100
"""Items of one list or dictionary that are written."""
_MAX_BLOCK: Final = 16_000
"""Characters of a traceback or a stack."""
_BLOCKS = ("exception", "stack")


def configure(
    sink: Any,
    level: int,
    format: str,  # noqa: A002 - as `logs.configure` has it
    stream: TextIO,
    handler: logging.Handler,
) -> tuple[list[Processor], type[FilteringBoundLogger]]:
    """Configure structlog, and the handler of the standard library's records; returns what makes a logger.

    Args:
        sink: takes the lines.
        level: the least level that is written.
        format: console or json.
        stream: where the sink writes, which decides about colours.
        handler: gets its formatter.
    """
    head, tail = _chains(format, stream)
    processors, wrapper = [*head, *tail], structlog.make_filtering_bound_logger(level)
    structlog.configure(
        processors=processors,
        wrapper_class=wrapper,
        # Positional arguments of structlog.get_logger("name") arrive here; the sink is the same for all names.
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=True,
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*head, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
        )
    )
    return processors, wrapper


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


def logger_of(sink: Any, processors: list[Processor], wrapper: type[Any], values: dict[str, Any]) -> Any:
    """A logger that writes to the sink."""
    # bind() takes the values, for "logger" is also a parameter of wrap_logger().
    return structlog.wrap_logger(sink, processors, wrapper, dict).bind(**values)


def foreign_logger(values: dict[str, Any], take: Take | None = None) -> Any:
    """The logger of a program that configured none of ours: structlog's if that is configured, else `logging`'s."""
    if structlog.is_configured():
        if take is None:
            return structlog.get_logger().bind(**values)
        theirs = structlog.get_config()["processors"]
        return structlog.wrap_logger(None, [_tap(take, logging.DEBUG), *theirs]).bind(**values)
    return structlog.wrap_logger(
        logging.getLogger("streamworker"),
        processors=[
            *([] if take is None else [_tap(take, logging.INFO)]),
            structlog.stdlib.filter_by_level,
            clean,
            _to_standard_library,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    ).bind(**{key: value for key, value in values.items() if key != "logger"})


MOST_LINE: Final = 8000
"""Characters of a line that is kept with a job; an exception has many lines in it."""
_OF_THE_JOB: Final = frozenset({"logger", "job_id", "kind", "queue", "worker_id", "attempt", "trace_id"})
"""Names that say whose line it is, which its reader knows."""


def tapped(processors: list[Processor], take: Take, level: int) -> tuple[list[Processor], type[Any]]:
    """Processors and wrapper of a logger of which ``take`` gets the lines from info up, whatever the log's level is."""

    def from_level(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if _number(method) < level:
            raise structlog.DropEvent
        return event

    least = min(level, logging.INFO)
    return [_tap(take, least), from_level, *processors], structlog.make_filtering_bound_logger(least)


def _number(method: str) -> int:
    return logging.getLevelNamesMapping().get(method.upper(), logging.ERROR)


def _tap(take: Take, least: int) -> Processor:
    def tap(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        with suppress(Exception):  # it must not keep the line from the log
            if _number(method) >= least:
                take(method, line_of(event))
        return event

    return tap


def line_of(event: EventDict) -> str:
    """An event as a text for people: its name, its values, and under them an exception; cleaned as a log line is."""
    cleaned = clean(None, "", _rendered(structlog.contextvars.merge_contextvars(None, "", dict(event))))
    words = [_word(cleaned.pop("event", ""))]
    words += [f"{key}={_word(each)}" for key, each in cleaned.items() if key not in _OF_THE_JOB and key not in _BLOCKS]
    blocks = [clean_block(text_of(cleaned[name])) for name in _BLOCKS if name in cleaned]
    return cut_lines("\n".join([" ".join(words), *blocks]), MOST_LINE)


def _rendered(event: EventDict) -> EventDict:
    """An event with its exception, and its ``%`` arguments, as text."""
    if args := event.pop("positional_args", ()):
        with suppress(TypeError, ValueError, KeyError):
            event["event"] = event["event"] % args
    exc_info = event.pop("exc_info", None)
    if exc_info:
        raised = exc_info if isinstance(exc_info, BaseException) else None
        told = (type(raised), raised, raised.__traceback__) if raised is not None else exc_info
        told = told if isinstance(told, tuple) else sys.exc_info()
        if told[1] is not None:
            event["exception"] = _safely(_formatted)(told)
    return event


def reporting_logger(report: Callable[[str, str, dict[str, str]], None]) -> Any:
    """`streamworker.telemetry.logs.reporting_logger`."""

    def told(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        with suppress(Exception):  # it must not reach the code that logs
            cleaned = clean(None, "", _rendered(event))
            text = _word(cleaned.pop("event", ""))
            report(method, text, {key: cut_lines(text_of(each), MOST_LINE) for key, each in cleaned.items()})
        raise structlog.DropEvent

    return structlog.wrap_logger(None, [told], structlog.make_filtering_bound_logger(0), dict)


def text_of_record(record: logging.LogRecord) -> str:
    """A record of the standard library as `line_of` writes an event."""
    text = text_of(record, how=lambda each: cast("logging.LogRecord", each).getMessage())
    event: EventDict = {"event": text, "logger_name": record.name}
    if record.exc_info:
        event["exc_info"] = record.exc_info
    return line_of(event)


def _word(value: Any) -> str:
    return printable(value if type(value) is str else text_of(value, how=repr))


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
            event[key] = clean_block(value) if key in _BLOCKS else printable(value)
    return event


def _to_standard_library(_logger: WrappedLogger, _method: str, event: EventDict) -> tuple[tuple[str], dict[str, Any]]:
    exc_info = event.pop("exc_info", None)
    text = str(event.pop("event", ""))
    fields = " ".join(f"{key}={value!r}" for key, value in event.items())
    return (f"{text} {fields}".rstrip(),), {"exc_info": exc_info}
