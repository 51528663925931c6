"""The audit: from what the servers hold at the end to a verdict, and what is missing. Pure.

No number in here comes from a worker. The SMTP server says which recipient got how many messages, Redis says what is
left and who held what when the worker was killed, the script says what must have happened.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import msgspec
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from streamworker.demo import script
from streamworker.demo.script import Scenario

_NAMED: Final = 5
"""Most jobs a sentence names."""


class Killed(msgspec.Struct, frozen=True):
    """The worker that was killed.

    Attributes:
        name: in the story.
        worker_id: its consumer name.
        pid: of the process.
        held: numbers of the jobs pending under its name after its death.
        recovery: seconds from the kill until none was left under its name; ``None`` if that did not come.
    """

    name: str
    worker_id: str
    pid: int
    held: frozenset[int]
    recovery: float | None


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        arrived: recipient to number of messages, from the SMTP server.
        leftovers: from Redis.
        killed: ``None`` if no worker was killed.
        exits: name of every worker that was not killed, to its exit code; ``None`` if it did not end.
    """

    arrived: dict[str, int]
    leftovers: Leftovers
    killed: Killed | None
    exits: dict[str, int | None]


class AuditFinding(msgspec.Struct, frozen=True):
    """One thing that was checked: its name, whether it is as promised, and one sentence for people."""

    name: str
    ok: bool
    says: str


class AuditReport(msgspec.Struct, frozen=True):
    """The audit's result."""

    findings: list[AuditFinding]
    duplicates: int
    """Messages beyond the first, over all recipients."""

    @property
    def ok(self) -> bool:
        """Every job is accounted for."""
        return all(finding.ok for finding in self.findings)

    @property
    def missing(self) -> list[str]:
        """What is not as promised."""
        return [finding.says for finding in self.findings if not finding.ok]


def audit(play: Scenario, evidence: Evidence) -> AuditReport:
    """Compare what was found with what the script says.

    Args:
        play: what was played.
        evidence: what was found afterwards.
    """
    duplicates, twice = _duplicates(evidence)
    findings = [
        _delivered(play, evidence.arrived),
        _no_stranger(play, evidence.arrived),
        twice,
        _dead_letters(play, evidence.leftovers),
        *_nothing_left(evidence.leftovers),
        _consumers(evidence),
        _exits(evidence.exits),
    ]
    if play.kill:
        findings.append(_recovered(evidence.killed))
    return AuditReport(findings, duplicates)


def _delivered(play: Scenario, arrived: dict[str, int]) -> AuditFinding:
    lost = [n for n in range(play.jobs) if not script.is_hopeless(n) and not arrived.get(script.address(n))]
    if lost:
        return AuditFinding("delivered", False, f"{len(lost)} of {play.mails} recipients got no mail: {_some(lost)}")
    return AuditFinding("delivered", True, f"all {play.mails:,} recipients got their mail")


def _no_stranger(play: Scenario, arrived: dict[str, int]) -> AuditFinding:
    wrong = [
        recipient
        for recipient, count in arrived.items()
        if count and ((n := script.number_of(recipient)) is None or n >= play.jobs or script.is_hopeless(n))
    ]
    if wrong:
        return AuditFinding("nobody_else", False, f"{len(wrong)} got mail who should not have: {_some(wrong)}")
    return AuditFinding("nobody_else", True, "nobody else got any")


def _duplicates(evidence: Evidence) -> tuple[int, AuditFinding]:
    """At-least-once: a mail that was sent but not yet settled when its worker died is sent once more, and no other."""
    held = evidence.killed.held if evidence.killed else frozenset()
    repeated = {recipient: count for recipient, count in evidence.arrived.items() if count > 1}
    duplicates = sum(repeated.values()) - len(repeated)
    unexplained = [
        recipient for recipient, count in repeated.items() if count > 2 or script.number_of(recipient) not in held
    ]
    if unexplained:
        says = f"{len(unexplained)} got mail more often than the kill explains: {_some(unexplained)}"
        return duplicates, AuditFinding("duplicates", False, says)
    if not duplicates:
        return 0, AuditFinding("duplicates", True, "no mail was sent twice")
    says = (
        f"{duplicates} mails came twice (at-least-once): of the {len(held)} jobs the killed worker held, these were "
        "sent, but not yet marked as done"
    )
    return duplicates, AuditFinding("duplicates", True, says)


def _dead_letters(play: Scenario, leftovers: Leftovers) -> AuditFinding:
    found = [number for number in leftovers.dead if number is not None]
    missing, wrong = play.dead - set(found), set(found) - play.dead
    if len(found) != len(leftovers.dead):
        return AuditFinding("dead_letters", False, f"{len(leftovers.dead) - len(found)} dead letters cannot be read")
    if missing or wrong or len(found) != len(play.dead):
        says = (
            f"the dead letters are not the {len(play.dead)} jobs that cannot succeed: missing {_some(missing)}, "
            f"wrong {_some(wrong)}, double {len(found) - len(set(found))}"
        )
        return AuditFinding("dead_letters", False, says)
    return AuditFinding("dead_letters", True, f"{len(found)} dead letters: exactly the jobs that can never succeed")


def _nothing_left(leftovers: Leftovers) -> Iterator[AuditFinding]:
    places = (
        ("streams", leftovers.streams, "jobs still in the streams"),
        ("pending", leftovers.pending, "jobs still pending"),
        ("delayed", leftovers.delayed, "jobs still delayed"),
    )
    for name, counts, words in places:
        left = {key: count for key, count in counts.items() if count}
        if left:
            says = ", ".join(f"{count} in {key}" for key, count in left.items())
            yield AuditFinding(name, False, f"{words}: {says}")
        else:
            yield AuditFinding(name, True, f"0 {words}")


def _consumers(evidence: Evidence) -> AuditFinding:
    expected = {evidence.killed.worker_id} if evidence.killed else set()
    left = [name for name in evidence.leftovers.consumers if name not in expected]
    if left:
        return AuditFinding("consumers", False, f"{len(left)} workers left their name in the group: {_some(left)}")
    if evidence.leftovers.consumers:
        return AuditFinding(
            "consumers", True, "only the killed worker's name is left in the group, with nothing under it"
        )
    return AuditFinding("consumers", True, "no worker left its name in the group")


def _exits(exits: dict[str, int | None]) -> AuditFinding:
    wrong = [f"{name} ({'still runs' if code is None else code})" for name, code in exits.items() if code != 0]
    if wrong:
        return AuditFinding("exits", False, f"{len(wrong)} workers did not end with exit code 0: {_some(wrong)}")
    return AuditFinding("exits", True, f"every living worker ({len(exits)}) drained and ended with exit code 0")


def _recovered(killed: Killed | None) -> AuditFinding:
    limit = script.LEASE + script.SLACK
    if killed is None or not killed.held:
        return AuditFinding("recovery", False, "no worker could be killed while it held jobs: try more jobs")
    if killed.recovery is None:
        return AuditFinding("recovery", False, f"nobody took over all {len(killed.held)} jobs of the killed worker")
    says = (
        f"the {len(killed.held)} jobs of the killed worker ran elsewhere {killed.recovery:.1f} s after the kill "
        f"({limit:g} s are promised: lease {script.LEASE:g} s + {script.SLACK:g} s)"
    )
    return AuditFinding("recovery", killed.recovery <= limit, says)


def _some(items: Collection[Any]) -> str:
    named = ", ".join(str(item) for item in sorted(items)[:_NAMED])
    more = len(items) - _NAMED
    return (named or "none") + (f" and {more} more" if more > 0 else "")


_BASE: Final = f"stream:{{{script.QUEUE}}}"
STREAMS: Final = (f"{_BASE}:high", _BASE, f"{_BASE}:low")
DUE: Final = f"{_BASE}:due"
BODIES: Final = f"{_BASE}:bodies"
DEAD: Final = f"{_BASE}:dead"
GROUP: Final = "workers"

_PAGE: Final = 1000


class Leftovers(msgspec.Struct, frozen=True):
    """What the server holds when everything is over.

    Attributes:
        streams: key to number of entries.
        pending: key to number of pending entries.
        delayed: key (due set, bodies) to number of members.
        dead: numbers of the jobs in the dead letters; ``None`` for one that cannot be read.
        consumers: names in the group.
    """

    streams: dict[str, int]
    pending: dict[str, int]
    delayed: dict[str, int]
    dead: list[int | None]
    consumers: list[str]


async def leftovers(url: str) -> Leftovers:
    """Read everything that is left, with a client and keys of its own: what is audited has no part in it.

    Args:
        url: of the server.
    """
    async with Redis.from_url(url, decode_responses=True, max_connections=1) as redis:
        return Leftovers(
            streams={stream: await redis.xlen(stream) for stream in STREAMS},
            pending={stream: await _pending(redis, stream) for stream in STREAMS},
            delayed={DUE: await redis.zcard(DUE), BODIES: await redis.hlen(BODIES)},
            dead=[number_in(fields) for _, fields in await _entries(redis, DEAD)],
            consumers=sorted({name for stream in STREAMS for name in await _names(redis, stream)}),
        )


async def _entries(redis: Any, stream: str) -> list[Any]:
    found: list[Any] = []
    start = "-"
    while page := await redis.xrange(stream, min=start, count=_PAGE):
        found += page
        start = f"({page[-1][0]}"
    return found


async def _pending(redis: Redis, stream: str) -> int:
    try:
        return int((await redis.xpending(stream, GROUP))["pending"])
    except redis_errors.ResponseError:
        return 0  # no worker made the group yet


async def _names(redis: Redis, stream: str) -> list[str]:
    try:
        return [info["name"] for info in await redis.xinfo_consumers(stream, GROUP)]
    except redis_errors.ResponseError:
        return []


def number_in(fields: Mapping[str, str | bytes]) -> int | None:
    """The job's number, from the fields of an entry; ``None`` if it cannot be read."""
    try:
        number = json.loads(fields["job"])["payload"]["number"]
    except (KeyError, TypeError, ValueError):
        return None
    return number if isinstance(number, int) else None
