"""``show``: everything about one job; payload and headers only if asked for, since they may be private."""

from __future__ import annotations

from typing import Any

from streamworker import codec
from streamworker.cli.output import document, plain, print_json, print_lines
from streamworker.errors import InvalidJob


def detail(row: Any, body: bytes | None, *, payload: bool, json: bool, more: dict[str, Any] | None = None) -> None:
    """Print one job.

    Args:
        row: what its listing shows.
        body: its document.
        payload: print the document too.
        json: for programs.
        more: further facts.
    """
    facts = plain(row) | (more or {}) | _read(body)
    if json:
        print_json(facts | ({"document": document(body)} if payload else {}))
        return
    lines = list(facts.items())
    if payload and body is not None:
        lines.append(("document", body.decode(errors="backslashreplace")))
    print_lines(lines)


def _read(body: bytes | None) -> dict[str, Any]:
    if body is None:
        return {"bytes": None, "unreadable": "there is no document"}
    try:
        document = codec.read(body)
    except InvalidJob as error:
        return {"bytes": len(body), "unreadable": str(error)}
    return {
        "bytes": len(body),
        "attempt_count": document.attempt_count or 0,
        "max_attempts": document.max_attempts,
        "hop": document.hop or 0,
        "run_at": None if document.run_at is None else document.run_at.isoformat(),
    }
