"""``streamworker dev``: a worker on embedded servers that starts anew with the code, and the dashboard."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import anyio
import msgspec

from streamworker import embedded, web
from streamworker.app import App
from streamworker.cli.app_loader import HOW
from streamworker.cli.options import WORKER, WorkerFlags
from streamworker.errors import ConfigurationError
from streamworker.settings import EMBEDDED, Settings
from streamworker.settings.environment import PREFIX
from streamworker.telemetry.logs import get_logger
from streamworker.worker import signals

log = get_logger("streamworker.dev")

POLL: Final = 0.3
"""Seconds between two looks at the files."""
GRACE: Final = "2"
"""Seconds running jobs may take at a restart, unless a setting says otherwise; then they are handed back."""
PATIENCE: Final = 10.0
"""Seconds beyond the grace before a worker that does not end is killed."""


def dev(app: str | None = None, *, flags: WorkerFlags = WORKER) -> int:
    """Run a worker and the dashboard for development, on embedded servers unless REDIS_URL is set, anew with the code.

    Args:
        app: module:attribute, such as shop.jobs:app; STREAMWORKER_APP unless given.
    """
    settings = flags.settings(app=app)
    if settings.app is None:
        raise ConfigurationError(f"There is no app to run: {HOW}.")
    flags.export()
    os.environ[f"{PREFIX}APP"] = settings.app
    os.environ.pop(f"{PREFIX}APP_FILE", None)
    if "grace" not in dict(settings.sources):
        os.environ[f"{PREFIX}GRACE"] = GRACE
    with ExitStack() as stack:
        if settings.redis_url in (None, EMBEDDED):
            # Held here, so that the servers outlive the restarts of the worker.
            servers = stack.enter_context(embedded.acquire(settings.state_dir))
            os.environ[f"{PREFIX}REDIS_URL"] = EMBEDDED
            if settings.database_url is None:  # it is ours alone: it may be brought up to date unasked
                anyio.run(_migrate, msgspec.structs.replace(settings, redis_url=EMBEDDED))
            log.info("embedded_servers", redis_url=servers.redis_url, database_url=servers.database_url)
        stack.enter_context(_dashboard())
        return _Loop(Watch(Path.cwd()), settings.grace + PATIENCE).run()


@contextmanager
def _dashboard() -> Iterator[None]:
    """The dashboard beside the worker, at its usual address or, if that is taken, at a free one."""
    try:
        web.require()
    except ConfigurationError as error:
        log.info("no_dashboard", reason=str(error))
        yield
        return
    listen = _free(web.LISTEN)
    command = (sys.executable, "-m", "streamworker", "dashboard", "--listen", listen)
    process = subprocess.Popen(command, process_group=0)  # noqa: S603 - our own program, at an address of ours
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    try:
        socket.create_server((host, int(port))).close()
    except OSError:
        return f"{host}:0"
    return listen


async def _migrate(settings: Settings) -> None:
    async with App[Any](settings=settings).migrator(settings) as migrator:
        await migrator.up()


class _Loop:
    """One worker process after the other."""

    def __init__(self, watch: Watch, patience: float) -> None:
        self._watch = watch
        self._patience = patience
        self._signal = 0
        self._link = socket.socket()

    def run(self) -> int:
        """Until SIGINT or SIGTERM; returns the last worker's exit code."""
        for number in signals.STOP:
            signal.signal(number, self._on_signal)
        while True:
            process = self._start()
            changed = self._wait(process)
            if process.poll() is None:
                code = self._stop(process)
            else:
                code = process.returncode
                if not self._signal and not changed:
                    log.warning("worker_ended", code=code, hint="it starts again when a file changes")
                    changed = self._wait(None)
            if self._signal:
                return max(code, 0)
            log.info("restarting", changed=changed[:5])

    def _start(self) -> subprocess.Popen[bytes]:
        # A group of its own: Ctrl-C reaches this process alone, which passes it on once; twice would cancel jobs.
        # The link closes when this process is gone, however it ended: the worker ends then, too.
        self._link.close()
        self._link, theirs = socket.socketpair()
        with theirs:
            command = (sys.executable, "-m", "streamworker", "worker", "--supervisor", str(theirs.fileno()))
            return subprocess.Popen(command, process_group=0, pass_fds=[theirs.fileno()])  # noqa: S603 - our own program

    def _wait(self, process: subprocess.Popen[bytes] | None) -> list[str]:
        """Until files changed, a signal came, or the process ended."""
        while not self._signal and (process is None or process.poll() is None):
            time.sleep(POLL)
            changed = self._watch.changed()
            if changed:
                return changed
        return []

    def _stop(self, process: subprocess.Popen[bytes]) -> int:
        process.terminate()
        try:
            return process.wait(self._patience)
        except subprocess.TimeoutExpired:
            log.warning("worker_killed", hint="it did not end; its jobs run again after their lease")
            process.kill()
            return process.wait()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number


_SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages", "venv", "env", "build", "dist"})


class Watch:
    """Remembers when the files below a directory were last written.

    Args:
        root: the directory; hidden ones below it, virtual environments and the like are passed over.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen = self._look()

    def changed(self) -> list[str]:
        """The files written, made or deleted since the last call, relative to the directory."""
        before, self._seen = self._seen, self._look()
        names = {name for name, _ in before.items() ^ self._seen.items()}
        return sorted(os.path.relpath(name, self._root) for name in names)

    def _look(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        waiting = [str(self._root)]
        while waiting:
            try:
                with os.scandir(waiting.pop()) as entries:
                    for entry in entries:
                        if entry.name.startswith(".") or entry.name in _SKIPPED:
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                        elif entry.name.endswith(".py"):
                            stat = entry.stat()
                            # The size as well: two writes within one tick of the file system's clock happen.
                            found[entry.path] = (stat.st_mtime_ns, stat.st_size)
            except OSError:
                continue  # deleted while we looked, or not ours to read
        return found
