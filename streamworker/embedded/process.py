"""A server process that is started, watched, started again when it dies, and stopped."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

from streamworker.embedded.layout import last_line

FIRST_PAUSE = 0.1  # seconds before the first restart; doubles with every failure in a row
LONGEST_PAUSE = 5.0
STEADY = 10.0  # seconds of uptime after which earlier failures are forgotten
ATTEMPTS = 5  # starts in a row before a server that never came up is given up
STOP_TIMEOUT = 10.0  # seconds a server may take to stop cleanly


class StartFailed(Exception):
    """The server cannot be started; the message is for the users."""


class Child(ABC):
    """One of the two servers. All methods are called from the supervisor's only thread.

    That matters for more than simplicity: the kernel's death signal is tied to the thread that started the process.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    def __init__(self, log: Path) -> None:
        self.log = log
        self.ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._was_ready = False
        self._failures = 0
        self._started = 0.0
        self._due = 0.0

    @abstractmethod
    def prepare(self) -> None:
        """Once, before the first start: end what an earlier supervisor left behind, make the data directory."""

    @abstractmethod
    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it serves our clients."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def tick(self) -> None:
        """Notice what happened and do what is due; sets ``ready``.

        Raises:
            StartFailed: it never came up and there is no point in trying on.
        """
        now = time.monotonic()
        if self._process is None:
            if now >= self._due:
                self._start(now)
        elif (status := self._process.poll()) is not None:
            self._process, self.ready = None, False
            self._failed(f"{self.name} ended with status {status}", forget=now - self._started > STEADY)
        elif not self.ready and self.answers():
            self.ready = self._was_ready = True
            say(f"{self.name} is ready, pid {self._process.pid}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if it runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, deadline: float) -> None:
        """Wait for its end, past the deadline (``time.monotonic()``) by force."""
        if self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f"{self.name} would not stop and is killed")
                self._process.kill()
                self._process.wait()
            self._process = None

    def _start(self, now: float) -> None:
        self._started = now
        try:
            self._process = self.spawn()
        except OSError as error:  # no memory, no processes left: may pass
            self._failed(f"{self.name} could not be started: {error}", forget=False)

    def _failed(self, what: str, *, forget: bool) -> None:
        self._failures = 1 if forget else self._failures + 1
        if not self._was_ready and self._failures >= ATTEMPTS:
            raise StartFailed(f"{what}: {last_line(self.log) or 'no reason given'} (log: {self.log})")
        pause: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._failures - 1))
        say(f"{what}, starting it again in {pause:g} s")
        self._due = time.monotonic() + pause


def say(line: str) -> None:
    """One line in the supervisor's log."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=sys.stderr, flush=True)


def is_ours(pid: int, path: Path) -> bool:
    """Whether a process runs with this path on its command line; a recorded number alone may be anybody's by now."""
    if pid <= 0:
        return False
    if Path("/proc/self").exists():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return os.fsencode(path) in command  # empty for a zombie: it holds nothing any more
    listed = subprocess.run(["/bin/ps", "-o", "args=", "-p", str(pid)], capture_output=True, check=False)  # noqa: S603 - no shell
    return os.fsencode(path) in listed.stdout


def evict(pid_file: Path, path: Path, number: signal.Signals) -> None:
    """End the server an earlier supervisor left behind; it may be dying of the death signal already.

    Args:
        pid_file: its first line is the server's number.
        path: must be an argument of that process.
        number: the signal for a clean stop.
    """
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return
    deadline = time.monotonic() + STOP_TIMEOUT
    while is_ours(pid, path):
        say(f"process {pid} still runs on {path}, sending it {number.name}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        pause = time.monotonic() + 1
        while is_ours(pid, path) and time.monotonic() < pause:
            time.sleep(0.01)
        if time.monotonic() > deadline:
            number = signal.SIGKILL


UNPRIVILEGED = 65534  # number of both user and group; no entry in /etc/group is needed


class Launcher(NamedTuple):
    """One way to run a program as a user that PostgreSQL accepts."""

    prefix: tuple[str, ...] = ()
    owner: int | None = None  # user and group number that must own the data; None: leave it alone
    become: int | None = None  # user and group number to change to before the prefix runs

    def popen(self, command: list[str], signal: str, output: int, cwd: Path) -> subprocess.Popen[bytes]:
        """Start a program that ends when we do.

        Args:
            command: program and arguments.
            signal: name of what the kernel sends it when the *thread* that calls this ends; only on Linux.
            output: descriptor for stdout and stderr.
            cwd: working directory of the program.
        """
        # The death signal comes last: changing the user would clear it.
        return subprocess.Popen(  # noqa: S603 - our own programs, no shell
            [*self.prefix, *_die_with_parent(signal), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            user=self.become,
            group=self.become,
            extra_groups=None if self.become is None else [],
        )


def choose_launcher(program: Path, home: Path) -> Launcher:
    """Find the first way that works here, trying each for real.

    Args:
        program: what must be executable that way.
        home: the directory below which the server writes; as root it is given to the user the way needs.

    Raises:
        StartFailed: root has no way left.
    """
    root = os.geteuid() == 0
    if not root and _has_name(os.geteuid()):
        return Launcher()
    for way in _ways(root):
        if root:
            os.chown(home, way.owner or 0, way.owner or 0)
            if way.become is not None:
                home.parent.chmod(0o711)  # "embedded", inside the state directory: passable, still not readable
        if _works(way, program, home):
            return way
    if root:
        raise StartFailed(
            "PostgreSQL refuses to run as root, and this system allows root neither a user namespace nor another user: "
            "run as an ordinary user, or set REDIS_URL and DATABASE_URL"
        )
    return Launcher()  # initdb will say in the log that we have no name


def _ways(root: bool) -> list[Launcher]:
    ways = []
    if unshare := shutil.which("unshare"):
        ways.append(Launcher((unshare, "--user", f"--map-user={UNPRIVILEGED}", f"--map-group={UNPRIVILEGED}", "--")))
    if root and (setpriv := shutil.which("setpriv")):
        identity = (f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups")
        capability = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
        ways.append(Launcher((setpriv, *identity, *capability, "--"), owner=UNPRIVILEGED))
    if root:
        ways.append(Launcher(owner=UNPRIVILEGED, become=UNPRIVILEGED))
    return ways


def _works(way: Launcher, program: Path, home: Path) -> bool:
    try:
        probe = way.popen(
            ["/bin/sh", "-c", 'test -w "$0" && exec "$1" --version', str(home), str(program)],
            "KILL",
            subprocess.DEVNULL,
            Path("/"),
        )
        return probe.wait() == 0
    except (OSError, subprocess.SubprocessError):  # the way itself is refused
        return False


def _die_with_parent(signal: str) -> list[str]:
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return [setpriv, "--pdeathsig", signal, "--"] if setpriv else []


def _has_name(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True
