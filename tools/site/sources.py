"""Which files of the repository are pages of the site, and where.

``docs/`` is the site. The README is its front page, and what pages link to outside of ``docs/`` comes along: Markdown
as pages, everything else as a page that shows the file. So one link works in a checkout, in a forge, and on the site.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
SHOWN: Final = "source/"
"""Where files from outside of docs/ are shown."""
_LINK: Final = re.compile(
    r"(?P<head>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()(?P<target>[^()\s]+)(?P<tail>(?:\s+\"[^\"]*\")?\))"
)
_FENCE: Final = re.compile(r"^ *(```+|~~~+)")
_LANGUAGES: Final = {
    ".py": "python", ".sh": "sh", ".sql": "sql", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".mjs": "js",
    ".json": "json", ".lua": "lua", ".service": "ini",
}  # fmt: skip


def page_of(path: PurePosixPath) -> str:
    """The site's name of a file of the repository, given by its path from the root."""
    if path.parts[:1] == ("docs",):
        return str(PurePosixPath(*path.parts[1:]))
    if str(path) == "README.md":
        return "index.md"
    if path.suffix == ".md":
        return f"{SHOWN}{path.with_name('index.md') if path.name == 'README.md' else path}"
    return f"{SHOWN}{path}.md"


def outside(target: str) -> bool:
    """Whether a link leads out of the repository, or nowhere else on its page."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*:|#|//", target))


def links(text: str) -> Iterator[re.Match[str]]:
    """Every link of a Markdown text outside of code."""
    fence = ""
    at = 0
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        if found and not fence:
            fence = found[1]
        elif found and found[1].startswith(fence):
            fence = ""
        elif not fence:
            for match in _LINK.finditer(text, at, at + len(line)):
                if not _in_code(line, match.start() - at):
                    yield match
        at += len(line)


def _in_code(line: str, column: int) -> bool:
    return line.count("`", 0, column) % 2 == 1


def resolve(target: str, page: PurePosixPath) -> PurePosixPath:
    """The file of the repository that a link on ``page`` means; a folder means its README.md."""
    path = PurePosixPath(os.path.normpath(page.parent / target.partition("#")[0]))
    return path / "README.md" if (ROOT / path).is_dir() else path


def relink(text: str, page: PurePosixPath) -> str:
    """The text of ``page`` with its links turned into those of the site."""
    here = PurePosixPath(page_of(page)).parent
    parts: list[str] = []
    at = 0
    for match in links(text):
        target = match["target"]
        if outside(target):
            continue
        name = page_of(resolve(target, page))
        anchor = target.partition("#")[1:]
        parts += [text[at : match.start("target")], os.path.relpath(name, here), *anchor]
        at = match.end("target")
    return "".join([*parts, text[at:]])


def shown(path: PurePosixPath) -> str:
    """The page that shows a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    fence = "`" * max(3, max((len(found) for found in re.findall("`+", text)), default=2) + 1)
    language = _LANGUAGES.get(path.suffix, "text")
    return f"# {path.name}\n\n`{path}`\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def gathered() -> dict[str, PurePosixPath]:
    """Pages that come from outside of ``docs/``, by the site's names."""
    waiting = [PurePosixPath("README.md"), PurePosixPath("CHANGELOG.md"), PurePosixPath("CONTRIBUTING.md")]
    found = {page_of(path): path for path in waiting}
    waiting += [PurePosixPath(path.relative_to(ROOT).as_posix()) for path in sorted((ROOT / "docs").rglob("*.md"))]
    while waiting:
        page = waiting.pop()
        if page.suffix != ".md":
            continue
        for match in links((ROOT / page).read_text(encoding="utf-8")):
            if outside(match["target"]):
                continue
            path = resolve(match["target"], page)
            name = page_of(path)
            if path.parts[:1] != ("docs",) and name not in found and (ROOT / path).is_file():
                found[name] = path
                waiting.append(path)
    return found
