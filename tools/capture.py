"""Writes what commands really print into the pages that show it: ``./dev capture [PAGE...]``.

Every ``console`` block of a page is run, in order, in an empty folder. tests/docs/test_captured.py runs the same and
compares.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tools.walk import environment, stage, steady, walk, walked_pages


def capture(path: Path) -> bool:
    """Bring one page up to date; whether that changed it.

    Args:
        path: the page.
    """
    text = path.read_text(encoding="utf-8")
    parts: list[str] = []
    at = 0
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "hello"
        with stage(folder):
            for step in walk(text, folder, environment(Path(home))):
                # What differs in ids and moments alone stays as it is: pages shall not change without a reason.
                if step.written is not None and steady(step.written) != steady(step.printed):
                    parts += [text[at : step.span[0]], step.printed]
                    at = step.span[1]
    new = "".join([*parts, text[at:]])
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


def main() -> int:
    """All pages, or those that are named."""
    for path in [Path(name) for name in sys.argv[1:]] or walked_pages():
        print(f"{path}: {'written anew' if capture(path) else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
