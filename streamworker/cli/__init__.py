"""The command line: the tree of commands, and ``main``, which turns whatever happens into an exit code and at most one
sentence on standard error.

A command is a path to its module, imported when it is called: ``streamworker --help`` must not wait for Redis clients
and event loops, and ``streamworker --version`` not even for the parser.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal

from streamworker.cli import streams
from streamworker.cli.streams import say
from streamworker.errors import StreamworkerError
from streamworker.redact import name_of, text_of

__all__ = ["main", "say"]

LAST_WORDS: Final = 1.0
"""Seconds threads may take to end when everything else has."""


def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print the completion script of a shell: source <(streamworker completion bash).

    Args:
        shell: Whose.
    """
    tree = command_tree()
    _have_plain_help(tree)
    sys.stdout.write(tree.generate_completion(shell=shell))
    return 0


def _have_plain_help(command: Any) -> None:
    """Set the format of the help of a command and all below it.

    Help inherits the root's; completion does not, takes each description for Markdown, and is twice as slow by that.
    """
    command.help_format = "plaintext"
    for name in command:
        if not name.startswith("-"):
            _have_plain_help(command[name])


def version() -> str:
    """What ``--version`` says."""
    from importlib import metadata  # noqa: PLC0415 - it imports the parser of e-mails

    try:
        return f"streamworker {metadata.version('streamworker')}"
    except metadata.PackageNotFoundError:
        return "streamworker (not installed)"


_COMMANDS = (
    ("demo", ".demo:demo", "Run", "See it work: embedded servers, three workers, one is killed, nothing is lost."),
    ("dev", ".dev:dev", "Run", "Embedded servers, the dashboard and a worker that restarts when your code changes."),
    ("worker", ".worker:worker", "Run", "Run a worker."),
    ("bridge", ".bridge:bridge", "Run", "Move jobs from legacy lists (queue:NAME) into streams."),
    ("relay", ".relay:relay", "Run", "Relay jobs from PostgreSQL to Redis, and promote delayed ones."),
    ("enqueue", ".enqueue:enqueue", "Run", "Enqueue a job."),
    ("queues", ".queues:queues", "Look and act", "How much is ready, running, delayed and dead."),
    ("pending", ".pending:pending", "Look and act", "Jobs that workers hold: list, show, release, bury, drop."),
    ("delayed", ".delayed:delayed", "Look and act", "Delayed jobs: list, run, change, drop."),
    ("dead", ".dead:dead", "Look and act", "Jobs that failed for good: list, show, group, retry, drop."),
    ("workers", ".workers:workers", "Look and act", "Workers, and how busy they are: list, prune."),
    ("cron", ".cron:cron", "Look and act", "Schedules, and when they tick next."),
    ("keys", ".keys:keys", "More", "Keys of encryption, and what is sealed with them: new, check."),
    ("jobs", ".jobs:jobs", "Look and act", "Durable jobs in the ledger."),
    ("history", ".history:history", "Look and act", "How many runs there were, and how long they took and waited."),
    ("audit", ".audit:audit", "Look and act", "Changes by hand: by whom, and to which jobs."),
    ("flows", ".flows:flows", "Look and act", "Graphs of jobs in the ledger: list, show, cancel, retry, delete."),
    ("migrate", ".migrate:migrate", "More", "The schema of the ledger in PostgreSQL: up, status, print."),
    ("dashboard", ".dashboard:dashboard", "Look and act", "All of this in a browser, live."),
    ("check", ".check:check", "More", "Look for everything that loses jobs."),
    ("config", ".config:config", "More", "Show every setting, and where it came from."),
    ("completion", ":completion", "More", "Print the completion script of a shell."),
)


def command_tree() -> Any:
    """The tree of commands, a `cyclopts.App`."""
    from cyclopts import App, Group, Parameter  # noqa: PLC0415 - --version needs no parser

    root = App(
        name="streamworker",
        help="Background jobs on Redis Streams: run workers, look at what waits, runs and died, and act on it.",
        help_epilogue="Settings are flags or variables of the environment; streamworker config shows them all.",
        help_format="plaintext",
        version=version,
        default_parameter=Parameter(negative=(), show_default=False),
        suppress_keyboard_interrupt=False,
    )
    groups = {name: Group.create_ordered(name) for name in ("Run", "Look and act", "More")}
    root["--help"].group = root["--version"].group = groups["More"]
    for name, path, group, about in _COMMANDS:
        root.command(f"streamworker.cli{path}", name=name, group=groups[group], help=about)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: instead of those of the process.

    Returns:
        The exit code: 0 ok, 1 a check found trouble or the command failed, 2 usage, 69 a server is unreachable, 70 a
        stuck thread, 75 a hand-back failed, 78 configuration, 130 interrupted.
    """
    if arguments is not None:
        return _guarded(list(arguments))
    streams.ensure()
    code = _guarded(sys.argv[1:])
    _let_go(code)
    return code


def _guarded(arguments: list[str]) -> int:
    try:
        code = _run(arguments)
    except KeyboardInterrupt:
        code = 130
    except streams.Unread:
        code = 0
    except Exception as error:  # noqa: BLE001 - the last resort of the program
        code = _failed(error)
    try:
        streams.flush()
    except streams.Unread:
        pass
    except StreamworkerError as error:
        code = code or _failed(error)
    return code


def _let_go(code: int) -> None:
    """End the process here if threads would keep it: a handler's that is stuck must not hold up the restart."""
    deadline = time.monotonic() + LAST_WORDS
    others = [each for each in threading.enumerate() if each is not threading.current_thread() and not each.daemon]
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in others):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    for word in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # bytes that are no text in this locale
            say(f"{word!a} is not text: write it in UTF-8")
            return 2
    if arguments == ["--version"]:
        streams.write(f"{version()}\n")  # the parser would answer the same, but it takes longer to import than Python
        return 0
    with importing():
        from cyclopts import CycloptsError  # noqa: PLC0415 - see above

        try:
            command, bound, _ = command_tree().parse_args(arguments, print_error=False, exit_on_error=False)
        except CycloptsError as error:
            say(f"{' '.join(str(error).split())} (streamworker --help shows what there is)")
            return 2
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


@contextmanager
def importing() -> Iterator[None]:
    """Around imports: they leave no garbage, and the collector takes a tenth of their time to find none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.freeze()  # what was imported stays for ever: the first collection need not look at it
            gc.enable()


def _failed(error: Exception) -> int:
    if os.environ.get("STREAMWORKER_LOG_LEVEL", "").lower() == "debug":
        say("".join(traceback.format_exception(error)))
    known = _known(error)
    if known is not None:
        for line in str(known).splitlines():
            say(line)
        return known.exit_code
    say(f"{name_of(error)}: {text_of(error)} (unexpected; STREAMWORKER_LOG_LEVEL=debug shows where it came from)")
    return 1


def _known(error: BaseException) -> StreamworkerError | None:
    """Our own error, also out of the groups that task groups wrap errors in."""
    if isinstance(error, StreamworkerError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((known for known in map(_known, error.exceptions) if known is not None), None)
    return None
