"""Builds the site, each version in a folder of its own: ``./dev docs [--into FOLDER]``.

``FOLDER/0.1`` is this checkout's version. Folders of other versions stay where they are: ``versions.json`` names all of
them for the version selector, and ``index.html`` leads to the newest. All addresses are relative, and nothing is
fetched from another host.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tools.site.sources import ROOT

_FOLDER = re.compile(r"\d+\.\d+")
_FRONT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>streamworker</title>
<link rel="icon" href="{newest}/assets/images/favicon.png">
<meta http-equiv="refresh" content="0; url={newest}/">
</head>
<body><a href="{newest}/">streamworker {newest}</a></body>
</html>
"""


def build(into: Path) -> Path:
    """Build this version, strictly.

    Args:
        into: folder of the site.

    Returns:
        The folder of this version.

    Raises:
        subprocess.CalledProcessError: mkdocs has a warning or an error, which it has printed.
    """
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    folder = into / ".".join(version.split(".")[:2])
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(words, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    number(into)
    return folder


def number(into: Path) -> None:
    """Write the list of versions and the front page that leads to the newest.

    Args:
        into: folder of the site, with a folder for each version.
    """
    found = [path.name for path in into.iterdir() if _FOLDER.fullmatch(path.name)]
    found.sort(key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    versions = [{"version": name, "title": name, "aliases": []} for name in found]
    (into / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")
    (into / "index.html").write_text(_FRONT.format(newest=found[0]), encoding="utf-8")


def main() -> int:
    """Build it, and say where it is."""
    parser = argparse.ArgumentParser(prog="./dev docs", description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / "build/site", help="the site's folder (build/site)")
    into = parser.parse_args().into.resolve()
    try:
        build(into)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    print(f"docs: {into / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
