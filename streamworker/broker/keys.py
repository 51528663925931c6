"""Names of keys. The braces are literal: all keys of one queue share a Redis Cluster slot."""

from __future__ import annotations

import re
import secrets
from typing import ClassVar, Final, Literal

import msgspec

from streamworker.job import LEVELS, Claim, Level


class QueueKeys(msgspec.Struct, frozen=True):
    """The keys of one queue in stream mode, or of one partition; ``namespace`` is the prefix of each.

    To Redis, a partition is a queue with a name of its own, its home: ``billing#3``. The first is called as its queue.
    """

    queue: str
    namespace: str = ""

    shape: ClassVar[Literal["stream", "list"]] = "stream"
    """Type of the ready keys, as an argument of scripts."""

    @property
    def name(self) -> str:
        """The queue, whatever partition of it this is."""
        return queue_of_home(self.queue)

    @property
    def base(self) -> str:
        """Prefix of all keys of the queue."""
        return f"{self.namespace}stream:{{{self.queue}}}"

    def ready(self, level: Level) -> str:
        """Key of the ready jobs of a level."""
        return self.stream(level)

    @property
    def places(self) -> list[str]:
        """Keys of ready jobs, in claim order."""
        return [self.ready(level) for level in LEVELS]

    def adding(self, level: Level, body: bytes) -> tuple[str | bytes, ...]:
        """Command that adds one job behind the others of its level."""
        return ("XADD", self.ready(level), "*", "job", body)

    def peeking(self, level: Level, count: int) -> tuple[str | int, ...]:
        """Command that reads the first ``count`` jobs of a level."""
        return ("XRANGE", self.ready(level), "-", "+", "COUNT", count)

    def counting_elsewhere(self) -> list[tuple[str, str]]:
        """Commands that count ready jobs in the ready keys of the other mode."""
        return [("LLEN", name) for name in ListKeys(self.queue, self.namespace).lists]

    @property
    def types(self) -> dict[str, str]:
        """Expected type of each key."""
        ready = dict.fromkeys([*self.places, self.dead], self.shape)
        return {
            **ready,
            self.dead: "stream",
            self.due: "zset",
            self.bodies: "hash",
            self.meta: "hash",
            self.ids: "hash",
            self.relayed: "zset",
            self.cancelled: "zset",
            self.crons: "hash",
            self.muted: "hash",
            self.schedules: "zset",
            self.definitions: "hash",
            self.ticked: "hash",
            self.order: "hash",
            self.moving: "hash",
            self.arrived: "zset",
            self.halted: "hash",
            self.lines: "set",
            self.fair: "hash",
            self.payloads: "zset",
        }

    def stream(self, level: Level) -> str:
        """Ready jobs of a level."""
        return self.base if level == "normal" else f"{self.base}:{level}"

    @property
    def streams(self) -> list[str]:
        """The three streams, in claim order."""
        return [self.stream(level) for level in LEVELS]

    @property
    def due(self) -> str:
        """Sorted set: member to the ms at which it is due."""
        return f"{self.base}:due"

    @property
    def bodies(self) -> str:
        """Hash: member of the due set to bytes."""
        return f"{self.base}:bodies"

    @property
    def dead(self) -> str:
        """Stream of dead letters."""
        return f"{self.base}:dead"

    @property
    def relayed(self) -> str:
        """Sorted set: jobs that relays have added and not noted in the ledger yet."""
        return f"{self.base}:relayed"

    @property
    def cancelled(self) -> str:
        """Sorted set: ids of cancelled jobs that have not ended yet, to the ms at which the mark expires."""
        return f"{self.base}:cancelled"

    @property
    def meta(self) -> str:
        """Hash: epoch, secret, paused (by hand), inactive (PostgreSQL), cancelled (some), leases, cursors, tokens.

        And a copy of `ids`.
        """
        return f"{self.base}:meta"

    @property
    def ids(self) -> str:
        """Hash: value that ids of entries without one are derived from, `id_field` for each level; copied in `meta`."""
        return f"{self.base}:ids"

    @staticmethod
    def id_field(level: Level) -> str:
        """The field of `ids` for a level's stream."""
        return f"id:{LEVELS.index(level) + 1}"

    @property
    def crons(self) -> str:
        """Hash: schedule to the ms of its last tick."""
        return f"{self.base}:cron"

    @property
    def muted(self) -> str:
        """Hash: group of dead letters that is muted, to by whom and when."""
        return f"{self.base}:muted"

    @property
    def schedules(self) -> str:
        """Sorted set: schedule that is kept as data, to the ms of its next tick."""
        return f"{self.base}:schedules"

    @property
    def definitions(self) -> str:
        """Hash: schedule that is kept as data, to its definition."""
        return f"{self.base}:schedules:defined"

    @property
    def ticked(self) -> str:
        """Hash: schedule that is kept as data, to the ms of its last tick."""
        return f"{self.base}:schedules:ticked"

    @property
    def timekeeper(self) -> str:
        """String that expires: the process that waits for the next tick of the queue's schedules."""
        return f"{self.base}:schedules:timekeeper"

    def history(self, span: int, begin: int) -> str:
        """Hash that expires: begin of a span and kind, to the tally of its runs; a page of spans, from ``begin``."""
        return f"{self.base}:history:{span}:{begin}"

    @property
    def history_kinds(self) -> str:
        """Sorted set that expires: kind that has a history, to the seconds at which runs of it were added last."""
        return f"{self.base}:history:kinds"

    @property
    def order(self) -> str:
        """Hash: order key to the id of the job that holds it. The jobs behind it are in `order_line`.

        In a partition, the field without a name has the numbers of partitions that its queue has had.
        """
        return f"{self.base}:order"

    def order_line(self, key: str) -> str:
        """List: jobs that wait for an order key, the next one first; `of_line` reads an element."""
        return f"{self.base}:order:{key}"

    @property
    def moving(self) -> str:
        """Hash: order key whose jobs move to another partition, to the token of the next one, see ``depart.lua``."""
        return f"{self.base}:moving"

    @property
    def arrived(self) -> str:
        """Sorted set: tokens of jobs that came from other partitions, to the ms at which they did."""
        return f"{self.base}:arrived"

    @property
    def lines(self) -> str:
        """Set: order keys for which jobs wait."""
        return f"{self.base}:lines"

    @property
    def halted(self) -> str:
        """Hash: order key to the id of the dead job at which it halts."""
        return f"{self.base}:halted"

    @property
    def swept(self) -> str:
        """String that expires: a worker has looked for stuck order keys."""
        return f"{self.base}:swept"

    @property
    def popped(self) -> str:
        """Hash: id of a job with an order key that a worker popped, to the worker."""
        return f"{self.base}:popped"

    @property
    def fair(self) -> str:
        """Hash: virtual time of each level, weights of tenants, number of the last job that joined a line."""
        return f"{self.base}:fair"

    def fair_line(self, level: Level) -> str:
        """Sorted set: job in a tenant's line, as 16 digits and document, to its start in virtual time.

        Behind this name and ``:tenants``: tenant to the end of its last one.
        """
        return f"{self.base}:fair:{level}"

    @property
    def payloads(self) -> str:
        """Sorted set: stored payload of a job that has ended, the job's id and hop, as JSON, to the ms of its end.

        And the channel on which it is published that there is one.
        """
        return f"{self.base}:payloads"

    def result(self, job_id: str) -> str:
        """Result note of a job, kept for a while; and the channel on which it is published."""
        return f"{self.base}:result:{job_id}"

    def ended(self, job_id: str) -> str:
        """For how many ms the result note of a job was kept; this key lives a minute longer than `result`."""
        return f"{self.base}:ended:{job_id}"

    def output(self, job_id: str) -> str:
        """Stream with the output of a job, see `append` in ``lua/prelude.lua``; and the channel of its positions."""
        return f"{self.base}:output:{job_id}"

    def log(self, job_id: str) -> str:
        """Stream with what the handler of a job logged, kept as an output is."""
        return f"{self.base}:log:{job_id}"

    def key(self, name: str) -> str:
        """A deduplication key."""
        return f"{self.base}:key:{name}"

    def held(self, job_id: str) -> str:
        """Mark of a job whose deduplication key is held and that has not started: the ms at which it was stored."""
        return f"{self.base}:held:{job_id}"

    def limit(self, name: str) -> list[str]:
        """The keys of a limit, see ``lua/limit.lua``: its permits, its turns, and its bucket."""
        return [f"{self.base}:limit:{part}:{name}" for part in ("holds", "turns", "bucket")]

    @property
    def permits(self) -> str:
        """Sorted set: keys of the permits of limits, to the ms at which their last one expires."""
        return f"{self.base}:limit:permits"

    @property
    def calls(self) -> str:
        """Sorted set: jobs that waited for a limit and were called, to the ms of the call."""
        return f"{self.base}:limit:calls"


class ListKeys(QueueKeys, frozen=True):
    """The keys of one queue in list mode: ready jobs are in lists, all else under the keys of stream mode.

    So delayed jobs and dead letters survive a change of the mode. Legacy producers push to the lists, so that
    ``namespace`` is no prefix of them.
    """

    shape: ClassVar[Literal["stream", "list"]] = "list"

    def ready(self, level: Level) -> str:
        """List with the ready jobs of a level: pushed left, taken right."""
        return f"queue:{self.queue}" if level == "normal" else f"queue:{self.queue}:{level}"

    @property
    def lists(self) -> list[str]:
        """The three lists, in claim order."""
        return self.places

    def adding(self, level: Level, body: bytes) -> tuple[str | bytes, ...]:
        """`QueueKeys.adding`: jobs are pushed left and taken right."""
        return ("LPUSH", self.ready(level), body)

    def peeking(self, level: Level, count: int) -> tuple[str | int, ...]:
        return ("LRANGE", self.ready(level), -count, -1)

    def counting_elsewhere(self) -> list[tuple[str, str]]:
        return [("XLEN", name) for name in self.streams]

    def claimed(self, worker_id: str) -> str:
        """List: claims of a worker, in the order they were taken."""
        return f"{self.namespace}queue:{self.queue}:claimed:{worker_id}"

    @property
    def leases(self) -> str:
        """Sorted set: claim to the ms at which it was last renewed."""
        return f"{self.base}:leases"

    @property
    def types(self) -> dict[str, str]:
        return {**super().types, self.leases: "zset"}


_LIST: Final = re.compile(r"queue:([A-Za-z0-9._:-]{1,100}?)(?:#[0-9]{1,4})?(?::(?:high|low))?")


def queue_of_list(key: str, namespace: str = "") -> str | None:
    """The queue of a list by its name, of ready jobs or of a worker's claims; ``None`` for any other name."""
    head, claimed, _ = key.removeprefix(namespace).partition(":claimed:")
    match = _LIST.fullmatch(head if claimed else key)
    if match is None or match[1].endswith((":high", ":low")):
        return None
    return match[1]


def home_name(queue: str, number: int) -> str:
    """The home of a partition: the name by which its keys are made."""
    return f"{queue}#{number}" if number else queue


def queue_of_home(home: str) -> str:
    """The queue that a home is a partition of."""
    return home.partition("#")[0]


def scheduled_queues(namespace: str) -> str:
    """Sorted set: queues that have schedules as data; and the channel on which their changes are published."""
    return f"{namespace}stream:schedules"


def recorded_queues(namespace: str) -> str:
    """Sorted set: queues that have a history, to the seconds at which runs were added last, to the hour."""
    return f"{namespace}stream:history"


def partitioned_queues(namespace: str) -> str:
    """Hash: queue with partitions, to their number; with `ELSEWHERE` behind it if their servers are given by URL."""
    return f"{namespace}stream:partitions"


ELSEWHERE: Final = b" by URL"
SECRET: Final = "secret"  # noqa: S105 - the name of a field
"""Field of a queue's meta hash: the secret that seals the state of jobs (`streamworker.codec`)."""
PROGRESS: Final = "progress:"
"""Prefix of the heartbeat's fields that hold the progress of jobs, by their ids."""
WORKER_KEY: Final = "streamworker:worker:"


def worker_key(namespace: str, worker_id: str) -> str:
    """The hash with a worker's heartbeat."""
    return f"{namespace}{WORKER_KEY}{worker_id}"


_LEVELS: Final[dict[bytes, Level]] = {level.encode(): level for level in LEVELS}


def wrapped(claim: Claim) -> bytes:
    """Element of a worker's claimed list for a claim; the fence of its settlement."""
    reserved = b"?" if claim.suspect else b""
    return b"%b %d %b%b %b" % (claim.entry, claim.count, claim.level.encode(), reserved, claim.body or b"")


def unwrapped(keys: ListKeys, wrapper: bytes, secret: bytes = b"") -> Claim | None:
    """The claim of an element of a claimed list; ``None`` if it is none of ours. See `Claim.secret`."""
    parts = wrapper.split(b" ", 3)
    level = _LEVELS.get(parts[2].removesuffix(b"?")) if len(parts) == 4 else None
    if level is None or not parts[1].isdigit():
        return None
    entry, count, word, body = parts
    return Claim(keys.name, level, keys.ready(level), entry, int(count), body, b"", word.endswith(b"?"), secret=secret)


def leased(claim: Claim, worker: str) -> bytes:
    """The member of the lease set for a claim of ``worker``."""
    return b"%b %d %b" % (claim.entry, claim.count, worker.encode())


def lease_of(member: bytes) -> tuple[bytes, int, str] | None:
    """(id, delivery count, worker) of a member of the lease set; ``None`` if it is none of ours."""
    entry, _, rest = member.partition(b" ")
    count, _, worker = rest.partition(b" ")
    return (entry, int(count), worker.decode(errors="replace")) if count.isdigit() and worker else None


def document(fields: list[bytes] | None) -> bytes | None:
    """The bytes of an entry's field ``job``; ``None`` if it has none."""
    if not fields:
        return None
    if fields[0] == b"job":
        return fields[1]
    for index in range(2, len(fields), 2):
        if fields[index] == b"job":
            return fields[index + 1]
    return None


UNKNOWN_EPOCH: Final = b"0"
"""The value that ids are derived from where it is not known. Not empty: empty means that entries name their jobs."""


HELD_MEMBER: Final = "00000000"
"""End of the first member of the due set for a job whose deduplication key is held, by which it is found."""


def due_member(level: Level, job_id: str) -> str:
    """A member for the due set: it names the level, and is random so that twins of one job do not collapse."""
    return f"{level}/{job_id}/{secrets.token_hex(4)}"


def of_due_member(member: str) -> tuple[Level, str]:
    """(level, job id) of a member of the due set."""
    level, _, rest = member.partition("/")
    return level if level in LEVELS else "normal", rest.rpartition("/")[0]


_WAITING: Final = re.compile(rb"(high|normal|low) ([0-9]{1,3}) ([0-9]{1,3}) ", re.DOTALL)


def of_line(element: bytes) -> tuple[Level, bytes, bytes]:
    """(level, job id, document) of an element of an order key's line; empty if it is none of ours."""
    match = _WAITING.match(element)
    level = _LEVELS.get(match[1]) if match is not None else None
    if match is None or level is None:
        return "normal", b"", b""
    start = match.end()
    named = start + int(match[2])
    return level, element[start:named], element[named + int(match[3]) :]
