"""What a worker holds in list mode, as it lies on the server.

A claim is one string in the worker's own list, ``ID COUNT LEVEL BYTES`` (``LEVEL?``: a suspect that is reserved and not
counted yet), and one member of the queue's lease set, ``ID COUNT WORKER``. Only Lua and this module know these forms.
"""

from __future__ import annotations

from typing import Final

from streamworker.broker.keys import ListKeys
from streamworker.job import LEVELS, Claim, Level

_LEVELS: Final[dict[bytes, Level]] = {level.encode(): level for level in LEVELS}


def wrapped(claim: Claim) -> bytes:
    """The string that stands for a claim in its worker's list; the fence of every ending."""
    reserved = b"?" if claim.suspect else b""
    return b"%b %d %b%b %b" % (claim.entry, claim.count, claim.level.encode(), reserved, claim.body or b"")


def unwrapped(keys: ListKeys, wrapper: bytes, secret: bytes = b"") -> Claim | None:
    """The claim a string stands for; ``None`` if it is none of ours. See `Claim.secret`."""
    parts = wrapper.split(b" ", 3)
    level = _LEVELS.get(parts[2].removesuffix(b"?")) if len(parts) == 4 else None
    if level is None or not parts[1].isdigit():
        return None
    entry, count, word, body = parts
    return Claim(keys.queue, level, keys.ready(level), entry, int(count), body, b"", word.endswith(b"?"), secret=secret)


def leased(claim: Claim, worker: str) -> bytes:
    """The member of the lease set for a claim of ``worker``."""
    return b"%b %d %b" % (claim.entry, claim.count, worker.encode())


def lease_of(member: bytes) -> tuple[bytes, int, str] | None:
    """(id, delivery count, worker) of a member of the lease set; ``None`` if it is none of ours."""
    entry, _, rest = member.partition(b" ")
    count, _, worker = rest.partition(b" ")
    return (entry, int(count), worker.decode(errors="replace")) if count.isdigit() and worker else None
