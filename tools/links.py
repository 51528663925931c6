"""Every link of every Markdown file leads somewhere, anchors included: ``python tools/links.py [--external]``.

Links between files are looked up in the checkout, the reference among them (made from the code). Addresses are asked
only with ``--external``: a build must not fail because somebody's server is away.
"""

from __future__ import annotations

import re
import subprocess
import sys
import unicodedata
import urllib.request
from functools import cache
from pathlib import PurePosixPath
from typing import Final

from tools import reference
from tools.site.sources import ROOT, links, outside, resolve

_HEADING: Final = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$")
_ADDRESS: Final = re.compile(r"https?://[^\s)>\"`]+")


def pages() -> list[PurePosixPath]:
    """Every tracked Markdown file."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "*.md"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [PurePosixPath(name) for name in sorted(listed.stdout.splitlines()) if (ROOT / name).is_file()]


def slug(heading: str) -> str:
    """The anchor of a heading, as forges and mkdocs make it."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip())


@cache
def anchors(page: PurePosixPath) -> frozenset[str]:
    """Anchors of a page."""
    made = reference.PAGES.get(str(PurePosixPath(*page.parts[1:]))) if page.parts[:1] == ("docs",) else None
    text = made() if made else (ROOT / page).read_text(encoding="utf-8")
    found: set[str] = set()
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        heading = None if fenced else _HEADING.match(line)
        if heading:
            found.add(slug(heading[1]))
    return frozenset(found)


def broken(page: PurePosixPath) -> list[str]:
    """What is wrong with the links of one page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    wrong = []
    for match in links(text):
        target = match["target"]
        name, _, anchor = target.partition("#")
        if outside(name) and name:
            continue
        path = resolve(target, page) if name else page
        made = path.parts[:1] == ("docs",) and str(PurePosixPath(*path.parts[1:])) in reference.PAGES
        number = text.count("\n", 0, match.start()) + 1
        if not made and not (ROOT / path).exists():
            wrong.append(f"{page}:{number}: there is no {path}")
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            wrong.append(f"{page}:{number}: {path} has no heading #{anchor}")
    return wrong


def unanswered(page: PurePosixPath) -> list[str]:
    """Addresses on a page that do not answer."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    wrong = []
    for address in sorted(set(_ADDRESS.findall(text))):
        if re.match(r"https?://(localhost|127\.|0\.|ops\.example|.*\.example)", address):
            continue
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "streamworker-links"})
        try:
            with urllib.request.urlopen(request, timeout=20):
                pass
        except OSError as error:
            wrong.append(f"{page}: {address}: {error}")
    return wrong


def main() -> int:
    """Print what is broken."""
    every = pages()
    wrong = [text for page in every for text in broken(page)]
    if "--external" in sys.argv[1:]:
        wrong += [text for page in every for text in unanswered(page)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if wrong:
        print(f"links: {len(wrong)} lead nowhere", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
