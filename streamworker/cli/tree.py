"""The tree of commands. Each is a path to its module, imported when it is called."""

from __future__ import annotations

import sys
from typing import Literal

from cyclopts import App, Group, Parameter


def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print the completion script of a shell: source <(streamworker completion bash).

    Args:
        shell: Whose.
    """
    sys.stdout.write(root.generate_completion(shell=shell))
    return 0


def _version() -> str:
    from importlib import metadata  # noqa: PLC0415 - it imports the parser of e-mails

    try:
        return f"streamworker {metadata.version('streamworker')}"
    except metadata.PackageNotFoundError:
        return "streamworker (not installed)"


root = App(
    name="streamworker",
    help="Background jobs on Redis Streams: run workers, look at what waits, runs and died, and act on it.",
    help_epilogue="Settings are flags or variables of the environment; streamworker config shows them all.",
    help_format="plaintext",
    version=_version,
    default_parameter=Parameter(negative=(), show_default=False),
    suppress_keyboard_interrupt=False,
)

RUN = Group.create_ordered("Run")
LOOK = Group.create_ordered("Look and act")
MORE = Group.create_ordered("More")
root["--help"].group = MORE
root["--version"].group = MORE

_COMMANDS = (
    ("demo", "demo:demo", RUN, "See it work: embedded servers, three workers, one is killed, nothing is lost."),
    ("dev", "dev:dev", RUN, "Embedded servers, the dashboard and a worker that restarts when your code changes."),
    ("worker", "worker:worker", RUN, "Run a worker."),
    ("bridge", "bridge:bridge", RUN, "Move jobs from legacy lists (queue:NAME) into streams."),
    ("relay", "relay:relay", RUN, "Relay jobs from PostgreSQL to Redis, and promote delayed ones."),
    ("enqueue", "enqueue:enqueue", RUN, "Enqueue a job."),
    ("queues", "queues:queues", LOOK, "How much is ready, running, delayed and dead."),
    ("pending", "pending:pending", LOOK, "Jobs that workers hold: list, show, release, bury, drop."),
    ("delayed", "delayed:delayed", LOOK, "Jobs that wait for their time: list, run, drop."),
    ("dead", "dead:dead", LOOK, "Jobs that failed for good: list, show, retry, drop."),
    ("workers", "workers:workers", LOOK, "Who works, and how busy they are: list, prune."),
    ("cron", "cron:cron", LOOK, "What is enqueued by the calendar, and when next."),
    ("jobs", "jobs:jobs", LOOK, "Durable jobs in the ledger."),
    ("migrate", "migrate:migrate", MORE, "The schema of the ledger in PostgreSQL: up, status, print."),
    ("dashboard", "dashboard:dashboard", LOOK, "All of this in a browser, live."),
    ("check", "check:check", MORE, "Look for everything that loses jobs."),
    ("config", "config:config", MORE, "Show every setting, and where it came from."),
    ("completion", "tree:completion", MORE, "Print the completion script of a shell."),
)
for _name, _path, _group, _help in _COMMANDS:
    root.command(f"streamworker.cli.{_path}", name=_name, group=_group, help=_help)
