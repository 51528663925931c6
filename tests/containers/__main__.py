"""``./dev containers``: compose.yaml, unchanged, on a real engine: scaled, killed, upgraded and switched while jobs run.

Ends with 0 when everything that is promised holds. ``--or-skip`` also ends with 0 where no engine can be had, and says so.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.containers import tutorial
from tests.containers.engine import Compose, Deaths, Engine, Failed, Unusable, succeeds
from tests.containers.scenes import NEXT, PLAIN, Show
from tests.containers.stage import Findings, Stage

CONCURRENCY = 20
LEASE = 10
GRACE = 5


def main(arguments: Sequence[str]) -> int:
    """Run the show."""
    parser = argparse.ArgumentParser(prog="./dev containers", description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000, help="jobs that run meanwhile")
    parser.add_argument("--or-skip", action="store_true", help="end with 0 where there is no engine")
    parser.add_argument("--keep", action="store_true", help="leave the containers of a failed run for inspection")
    options = parser.parse_args(arguments)
    try:
        with Engine(keep=options.keep), tempfile.TemporaryDirectory(prefix="streamworker-containers-") as directory:
            return show(Path(directory), options.jobs, keep=options.keep)
    except Unusable as why:
        print(f"containers: not run: {why}" if options.or_skip else f"containers: {why}", flush=True)
        return 0 if options.or_skip else 1
    except Failed as why:
        print(f"containers: {why}", file=sys.stderr)
        return 1


def show(directory: Path, jobs: int, *, keep: bool) -> int:
    """All scenes; 0 if everything held."""
    mailbox = free_port()
    settings = {
        "REDIS_PASSWORD": secrets.token_hex(16),
        "POSTGRES_PASSWORD": secrets.token_hex(16),
        "STREAMWORKER_DASHBOARD_PASSWORD": secrets.token_hex(16),
        "MAILBOX_PORT": str(mailbox),
        "DASHBOARD_PORT": str(free_port()),
        "STREAMWORKER_CONCURRENCY": str(CONCURRENCY),
        "STREAMWORKER_LEASE": str(LEASE),
        "STREAMWORKER_GRACE": str(GRACE),
    }
    compose = Compose(f"streamworker-check-{secrets.token_hex(3)}", settings, directory)
    deaths, findings = Deaths(compose.name), Findings()
    stage = Stage(compose, mailbox)
    scenes = Show(stage, deaths, findings)
    print(f"containers: {jobs} jobs, project {compose.name}")
    try:
        scenes.image()
        scenes.up(3)
        scenes.enqueue(jobs)
        scenes.more(6)
        scenes.fewer(2)
        scenes.kill(3)
        scenes.roll(3)
        scenes.finish()
        scenes.switch(2, 200)
        scenes.bridge(2, 400)
        scenes.nobody(5)
        scenes.ledger()
        tutorial.tutorial(stage, findings)
        scenes.down()
    except Failed as error:
        print(f"containers: FAILED after {findings.seconds:.0f} s: {error}", file=sys.stderr)
        if not keep:
            print(last_words(compose), file=sys.stderr)
        return 1
    finally:
        deaths.close()
        if not keep:
            clean_up(compose)
    print(f"containers: {findings.count} findings, all well, in {findings.seconds:.0f} s")
    return 0


def last_words(compose: Compose) -> str:
    """What the containers said last."""
    try:
        return compose("logs", "--no-color", "--tail", "20")
    except Failed as error:
        return str(error)


def clean_up(compose: Compose) -> None:
    """Leave nothing behind, however it ended."""
    try:
        compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")
    except Failed as error:
        print(f"containers: {error}", file=sys.stderr)
    for tag in (PLAIN, NEXT, tutorial.IMAGE, tutorial.WHEELS):
        succeeds("docker", "image", "rm", tag)


def free_port() -> int:
    """A port of this machine that nobody uses right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    # However it ends, nothing may stay behind: what cleans up is behind `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
