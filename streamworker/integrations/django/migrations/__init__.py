"""A migration of Django for each SQL file of the ledger, by its name, such as ``streamworker.0001_ledger``.

Django finds migrations as modules of this package. The SQL files are the one truth, and there are none beside them:
the last entry of the package's path is a place from which Python imports one for each file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

from streamworker.integrations.django.schema import migration_of
from streamworker.postgres.migrate import shipped

PLACE: Final = "streamworker:migrations"


class SqlFinder:
    """Finds and makes the modules; a finder of path entries (https://docs.python.org/3/reference/import.html).

    Args:
        path: the entry.

    Raises:
        ImportError: it is another one than `PLACE`.
    """

    def __init__(self, path: str) -> None:
        if path != PLACE:
            raise ImportError(f"{path} is not {PLACE}")

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """The names, for `pkgutil.iter_modules`; none is a package."""
        return ((f"{prefix}{each.name}", False) for each in shipped())

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module of a file; ``None`` if there is no such file."""
        known = any(each.name == fullname.rpartition(".")[2] for each in shipped())
        loader: Any = self
        return ModuleSpec(fullname, loader, origin=PLACE) if known else None

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary one."""

    def exec_module(self, module: Any) -> None:
        """Give it its ``Migration``."""
        module.Migration = migration_of(module.__name__)


if PLACE not in __path__:
    sys.path_hooks.append(SqlFinder)
    __path__.append(PLACE)
