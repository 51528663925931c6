"""No tracked file names a package registry: the locks must install from whatever index pip is configured for.

``python tools/hosts.py`` prints the offenders and exits 1. The names are put together from pieces, or this file would
be the first offender.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HOSTS = re.compile(
    "|".join(
        [
            r"py" + r"pi\.(org|io|python)",
            r"python" + r"hosted",
            r"registry\." + r"(npm" + r"js|yarn" + r"pkg|hub)",
            r"(docker|quay|ghcr|gcr|crates)" + r"\.io\b",
            r"index" + r"-url\W+\w+://",
        ]
    ),
    re.IGNORECASE,
)
# A lock has no business with addresses at all.
ANY_ADDRESS = re.compile("://")


def tracked_files(root: Path) -> list[Path]:
    """What git knows; the owner of the checkout may be someone else, which is no concern here."""
    command = ["git", "-c", "safe.directory=*", "-C", str(root), "ls-files", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [root / name for name in listed.split("\0") if name]


def offences(path: Path) -> list[str]:
    """``path:line: text`` of every line that names a host."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):  # deleted but not committed, submodule, image
        return []
    patterns = [HOSTS, ANY_ADDRESS] if path.suffix == ".lock" else [HOSTS]
    return [
        f"{path}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        if any(pattern.search(line) for pattern in patterns)
    ]


def main() -> int:
    """Print what is wrong and how to mend it."""
    found = [offence for path in tracked_files(ROOT) for offence in offences(path)]
    for offence in found:
        print(offence)
    if found:
        print(f"hosts: {len(found)} lines name a registry; take the name out (locks: ./dev lock).", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
