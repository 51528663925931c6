"""The changelog, from fragments: ``./dev changelog`` shows what the next release says, ``--release 0.2.0`` writes it.

A fragment is ``changes/NAME.KIND.md``, one or more sentences a user would notice; KIND is one of Keep a Changelog's.
What stands under *Unreleased* in CHANGELOG.md by hand comes along, before the fragments.
"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
KINDS: Final = ("added", "changed", "deprecated", "removed", "fixed", "security")
_UNRELEASED: Final = re.compile(r"^## \[Unreleased\]\n(?P<body>.*?)(?=^## \[|\Z)", re.MULTILINE | re.DOTALL)
_SECTION: Final = re.compile(r"^### (?P<kind>\w+)\n(?P<body>.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
_VERSION: Final = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")


def fragments(folder: Path) -> list[Path]:
    """The fragments, oldest name first.

    Raises:
        ValueError: a file is none.
    """
    found = sorted(path for path in folder.glob("*") if path.name != "README.md")
    for path in found:
        words = path.name.split(".")
        if (
            len(words) < 3
            or words[-1] != "md"
            or words[-2] not in KINDS
            or not path.read_text(encoding="utf-8").strip()
        ):
            raise ValueError(f"{path} is no fragment: call it changes/NAME.KIND.md, KIND one of {', '.join(KINDS)}")
    return found


def unreleased(changelog: str, found: list[Path]) -> str:
    """What the next release says.

    Args:
        changelog: the text of CHANGELOG.md.
        found: fragments.

    Raises:
        ValueError: the changelog has no *Unreleased*, or a section of it is of no kind.
    """
    match = _UNRELEASED.search(changelog)
    if match is None:
        raise ValueError("CHANGELOG.md has no section [Unreleased]")
    said: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for section in _SECTION.finditer(match["body"]):
        kind = section["kind"].lower()
        if kind not in said:
            raise ValueError(f"CHANGELOG.md has a section {section['kind']}: use one of {', '.join(KINDS)}")
        if section["body"].strip():
            said[kind].append(section["body"].strip())
    for path in found:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
        text = "\n".join([lines[0], *(f"  {line}".rstrip() for line in lines[1:])])
        said[path.name.split(".")[-2]].append(text if text.startswith("- ") else f"- {text}")
    return "\n\n".join(f"### {kind.capitalize()}\n\n" + "\n".join(texts) for kind, texts in said.items() if texts)


def released(changelog: str, found: list[Path], version: str, date: str) -> str:
    """The changelog with a release in it, and nothing unreleased.

    Args:
        changelog: the text of CHANGELOG.md.
        found: fragments.
        version: of the release.
        date: of the release.

    Raises:
        ValueError: there is nothing to release, or the version exists or is none.
    """
    text = unreleased(changelog, found)
    if not _VERSION.fullmatch(version):
        raise ValueError(f"{version!r} is no version: such as 0.2.0 or 1.0.0rc1")
    if f"## [{version}]" in changelog:
        raise ValueError(f"CHANGELOG.md has {version} already")
    if not text:
        raise ValueError("nothing is unreleased")
    return (
        _UNRELEASED.sub(
            lambda _: f"## [Unreleased]\n\n## [{version}] - {date}\n\n{text}\n\n", changelog, count=1
        ).rstrip()
        + "\n"
    )


def release(root: Path, version: str, date: str) -> None:
    """Write the changelog and the version, and remove the fragments."""
    found = fragments(root / "changes")
    changelog, project = root / "CHANGELOG.md", root / "pyproject.toml"
    text = released(changelog.read_text(encoding="utf-8"), found, version, date)
    declared, count = re.subn(
        r'^version = ".*"$', f'version = "{version}"', project.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE
    )
    if not count:
        raise ValueError("pyproject.toml declares no version")
    changelog.write_text(text, encoding="utf-8")
    project.write_text(declared, encoding="utf-8")
    for path in found:
        path.unlink()


def main() -> int:
    """Show, or write."""
    parser = argparse.ArgumentParser(prog="./dev changelog", description=__doc__)
    parser.add_argument(
        "--release", metavar="VERSION", help="write CHANGELOG.md and the version, and remove the fragments"
    )
    arguments = parser.parse_args()
    try:
        if arguments.release:
            release(ROOT, arguments.release, datetime.now(UTC).date().isoformat())
        else:
            print(unreleased((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), fragments(ROOT / "changes")))
    except ValueError as error:
        print(f"changelog: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
