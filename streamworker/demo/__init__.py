"""``streamworker demo``: the promise of the project, shown on this machine in under a minute.

Private servers are started, three worker processes send ten thousand mails to a local SMTP server, one worker is killed
midway, and at the end everything is counted from the servers: nothing is lost, and what was sent twice is said.

Light to import: the worker processes import it too.
"""

from __future__ import annotations

import importlib.util
import sys

from streamworker.embedded.binaries import find_binaries
from streamworker.errors import ConfigurationError, StreamworkerError

__all__ = ["main"]

_CURE = "pip install 'streamworker[demo]'"


async def main(*, jobs: int = 10_000, workers: int = 3, kill: bool = True, json: bool = False) -> int:
    """Run the demo; errors are said in one sentence on standard error.

    Touches nothing of the user's: servers, data and logs live in a temporary directory, which is removed at the end,
    also after Ctrl-C.

    Args:
        jobs: mails to send.
        workers: worker processes.
        kill: kill one of the workers midway.
        json: print one JSON object at the end on standard output; the story goes to standard error.

    Returns:
        The exit code: 0 if every job is accounted for, 1 if not, 2 for arguments that make no sense, 69 if the private
        servers do not start, 78 if something is not installed, 130 or 143 after a signal.
    """
    try:
        _require_extra()
        # Only now: these need the extra that was just looked for, and the worker processes need none of them.
        from streamworker.demo.run import show  # noqa: PLC0415
        from streamworker.demo.script import Scenario  # noqa: PLC0415

        return await show(Scenario(jobs=jobs, workers=workers, kill=kill), as_json=json)
    except StreamworkerError as error:
        print(f"streamworker demo: {error}", file=sys.stderr)
        return error.exit_code


def _require_extra() -> None:
    if any(importlib.util.find_spec(package) is None for package in ("aiosmtpd", "aiosmtplib")):
        raise ConfigurationError(f"it needs a mail server and a mail client: {_CURE}.")
    try:
        find_binaries()
    except ConfigurationError:
        # Its own sentence advises to set REDIS_URL, which is no cure here.
        raise ConfigurationError(
            f"it needs Valkey and PostgreSQL from wheels, which exist for Linux (glibc) and macOS: {_CURE}."
        ) from None
