"""The id of a worker, and its heartbeat: what operators see of it."""

from __future__ import annotations

import os
import re
import secrets
import socket
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from streamworker.settings import Settings
from streamworker.worker.inflight import InFlight

_ALPHABET: Final = string.digits + string.ascii_lowercase
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def new_worker_id(name: str | None) -> str:
    """``worker-{hostname}-{pid}-{random}``, or ``{name}-{random}``; random: 9 base-36 characters, unique per start."""
    tail = "".join(secrets.choice(_ALPHABET) for _ in range(9))
    if name:
        return f"{name}-{tail}"
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"
    return f"worker-{host}-{os.getpid()}-{tail}"


def rss_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def heartbeat(
    settings: Settings, queues: Sequence[str], started: float, in_flight: InFlight, loop_lag: float
) -> dict[str, str | int | float]:
    """The fields of one heartbeat."""
    counts, spinning = in_flight.counts, in_flight.spinning()
    return {
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "started": round(started, 3),
        "mode": settings.mode,
        "queues": ",".join(queues),
        "running": in_flight.busy,
        "done": counts.done,
        "failed": counts.failed,
        "retried": counts.retried,
        "dead": counts.dead,
        "recovered": counts.recovered,
        "lost": counts.lost,
        "rss": rss_bytes(),
        "loop_lag": round(loop_lag, 4),
        "spinning": "" if spinning is None else msgspec.json.encode(spinning).decode(),
    }
