"""Noticing that code changed, without a dependency: the times of all Python files below a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages", "venv", "env", "build", "dist"})


class Watch:
    """Remembers when the files below a directory were last written.

    Args:
        root: the directory; hidden ones below it, virtual environments and the like are passed over.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen = self._look()

    def changed(self) -> list[str]:
        """The files written, made or deleted since the last call, relative to the directory."""
        before, self._seen = self._seen, self._look()
        names = {name for name, _ in before.items() ^ self._seen.items()}
        return sorted(os.path.relpath(name, self._root) for name in names)

    def _look(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        waiting = [str(self._root)]
        while waiting:
            try:
                with os.scandir(waiting.pop()) as entries:
                    for entry in entries:
                        if entry.name.startswith(".") or entry.name in _SKIPPED:
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                        elif entry.name.endswith(".py"):
                            stat = entry.stat()
                            # The size as well: two writes within one tick of the file system's clock happen.
                            found[entry.path] = (stat.st_mtime_ns, stat.st_size)
            except OSError:
                continue  # deleted while we looked, or not ours to read
        return found
