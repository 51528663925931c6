"""``streamworker demo``."""

from __future__ import annotations

from typing import Annotated

import anyio
from cyclopts import Parameter
from cyclopts.validators import Number

from streamworker.demo import main


def demo(
    *,
    jobs: Annotated[int, Parameter(validator=Number(gte=1))] = 10_000,
    workers: Annotated[int, Parameter(validator=Number(gte=1, lte=64))] = 3,
    kill: Annotated[bool, Parameter(negative="--no-kill")] = True,
    json: bool = False,
) -> int:
    """See it work: embedded servers, some workers, one is killed, nothing is lost.

    Args:
        jobs: Jobs to run, 10000 unless given.
        workers: Worker processes, 3 unless given.
        kill: Kill one of them in the middle.
        json: The result as one JSON object, for programs.
    """

    async def show() -> int:
        return await main(jobs=jobs, workers=workers, kill=kill, json=json)

    return anyio.run(show)
