"""Every code block of the documentation, and how it is checked.

What stands behind the language of a block says how (CONTRIBUTING.md explains it to authors):

- ``python``: run, in order, page by page, on embedded servers, and type-checked; `checked`: type-checked alone
- ``sh``: every command of ours is parsed by the real command line; `run`, `fails`, `setting`, a file's name: the page is walked
  through from top to bottom (tests/docs/walk.py)
- ``console``: captured by ``./dev capture``, and compared
- ``json``: documents of jobs; ``sql``: run against the schema; ``yaml``, ``toml``, ``ini``: parsed
- ``text`` and no language: formats and outputs; in walked pages, lines that were printed

``<!-- not run: why -->`` on the line before a block excuses it; tests/docs/test_blocks.py counts those.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
WALKING = {"run", "fails", "setting"}
_EXCUSE = re.compile(r"\s*<!-- not run: (.+?) -->\s*")
_OPEN = re.compile(r"^(?P<indent> *)(?P<fence>```+)(?P<language>\w*)(?: (?P<word>\S+))?$")


class Block(NamedTuple):
    """One block."""

    page: str
    line: int  # of its first line of code
    language: str
    word: str
    body: str
    excuse: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def pages() -> list[str]:
    """Every tracked page of prose, by its path from the root."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "*.md"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


@cache
def blocks() -> list[Block]:
    """Every block of every page."""
    return [block for page in pages() for block in blocks_of(page, (ROOT / page).read_text())]


def blocks_of(page: str, text: str) -> list[Block]:
    found: list[Block] = []
    body: list[str] | None = None
    opened: re.Match[str] | None = None
    excuse = before = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if opened is None:
            opened = _OPEN.match(line)
            if opened is None:
                before = line if line.strip() else before if _EXCUSE.fullmatch(before) else ""
                assert not line.lstrip().startswith("```"), f"{page}:{number}: what is this? {line}"
                continue
            excused = _EXCUSE.fullmatch(before)
            excuse, body, before = excused[1] if excused else "", [], ""
        elif line.strip() == opened["fence"]:
            indent = len(opened["indent"])
            text_of = "".join(f"{each[indent:]}\n" for each in body or ())
            found.append(
                Block(page, number - len(body or ()), opened["language"], opened["word"] or "", text_of, excuse)
            )
            opened = None
        else:
            assert body is not None
            body.append(line)
    assert opened is None, f"{page}: a block does not end"
    return found


def walked(page: str) -> bool:
    """Whether a page is one story, to be followed from top to bottom."""
    return any(block.word in WALKING for block in blocks() if block.page == page)
