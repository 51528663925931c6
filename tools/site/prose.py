"""Markdown as forges read it, made fit for Python-Markdown, which mkdocs uses."""

from __future__ import annotations

import re
from typing import Final

_FENCE: Final = re.compile(r"^(?P<indent> *)(?P<fence>```+)(?P<language>\w*)(?: +(?P<word>[^\s`]+)[^`]*)?$")
_ITEM: Final = re.compile(r"^\d+\. ")
# What the tests are told about a block; a file's name is told to readers.
_ORDERS: Final = {"run", "fails", "setting", "checked"}


def fit(text: str) -> str:
    """Blocks lose the words that are meant for tests; what belongs to a numbered item is indented by four."""
    lines: list[str] = []
    fence = ""
    numbered = False
    for line in text.splitlines():
        found = _FENCE.match(line)
        if not fence:
            if _ITEM.match(line):
                numbered = True
            elif line and not line[0].isspace():
                numbered = False
        shift = (
            " "
            if numbered and line.startswith("   ") and not line.startswith("    " if not fence else " " * 99)
            else ""
        )
        if found and not fence:
            fence = found["fence"]
            line = found["indent"] + _opening(found)  # noqa: PLW2901 - the line as it is written
        elif fence and line.strip() == fence:
            fence = ""
        lines.append(shift + line)
    return "\n".join(lines) + "\n"


def _opening(found: re.Match[str]) -> str:
    word = found["word"]
    title = f' title="{word}"' if word and word not in _ORDERS else ""
    return f"{found['fence']}{found['language']}{title}"
