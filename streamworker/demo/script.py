"""The script of the demo: who gets mail, which jobs fail and how often, when a worker is killed.

Pure and deterministic, so that the audit knows what must have happened without asking any worker.
"""

from __future__ import annotations

from typing import Final

import msgspec

from streamworker.errors import UsageError

QUEUE: Final = "email-sending"
KIND: Final = "email.send"

MAX_ATTEMPTS: Final = 4
FLAKY: Final = (100, 42)
"""One job in a hundred (those with this remainder) fails twice before it succeeds."""
HOPELESS: Final = (1_000, 7)
"""One job in a thousand never succeeds, and becomes a dead letter."""
FAILURES: Final = 2

LEASE: Final = 3.0
"""Seconds a dead worker's jobs wait; the default of 15 would make the show wait too."""
SLACK: Final = 1.0
"""Seconds beyond the lease within which a dead worker's jobs are promised to run elsewhere."""
KILL_AT: Final = 0.4
"""Share of the mails after which a worker is killed."""
CONCURRENCY: Final = 32
"""Jobs a worker runs at once."""
CONNECTIONS: Final = 8
"""SMTP connections of a worker."""

_DOMAIN: Final = "@example.com"


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What will be played.

    Attributes:
        jobs: jobs to enqueue, numbered from 0; each is a mail to one recipient.
        workers: worker processes.
        kill: whether one of them is killed.

    Raises:
        UsageError: this cannot be played.
    """

    jobs: int
    workers: int
    kill: bool

    def __post_init__(self) -> None:
        if not 1 <= self.jobs <= 1_000_000:
            raise UsageError(f"--jobs {self.jobs} must be from 1 to 1000000")
        if not 1 <= self.workers <= 64:
            raise UsageError(f"--workers {self.workers} must be from 1 to 64")
        if self.kill and self.workers < 2:
            raise UsageError("somebody must take over what the killed worker held: --workers 2, or --no-kill")

    @property
    def dead(self) -> frozenset[int]:
        """Jobs that must end as dead letters."""
        return frozenset(range(HOPELESS[1], self.jobs, HOPELESS[0]))

    @property
    def mails(self) -> int:
        """How many recipients must get mail."""
        return self.jobs - len(self.dead)


def is_flaky(number: int) -> bool:
    """Whether job ``number`` fails before it succeeds."""
    return number % FLAKY[0] == FLAKY[1]


def is_hopeless(number: int) -> bool:
    """Whether job ``number`` never succeeds."""
    return number % HOPELESS[0] == HOPELESS[1]


def fails(number: int, attempt: int) -> bool:
    """Whether attempt ``attempt`` (from 1) of job ``number`` shall fail."""
    return is_hopeless(number) or (is_flaky(number) and attempt <= FAILURES)


def address(number: int) -> str:
    """The recipient of job ``number``."""
    return f"customer-{number}{_DOMAIN}"


def number_of(recipient: str) -> int | None:
    """The job a recipient belongs to; ``None`` for anybody else."""
    digits = recipient.removesuffix(_DOMAIN).removeprefix("customer-")
    return int(digits) if digits.isascii() and digits.isdigit() and address(int(digits)) == recipient else None
