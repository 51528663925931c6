"""How to run PostgreSQL, which refuses to be root, and how to make servers die with their supervisor.

Nothing here adds a user or touches a permission outside the state directory. The ways, in order:

1. Not root: directly.
2. Root, or a user number without a name (``initdb`` insists on one): in a user namespace that shows us to the server as
   user 65534. Its files stay ours, so that 0700 directories of root above the data are no obstacle.
3. Root where namespaces are refused (Docker's default seccomp profile): really as user 65534, on a data directory given
   to that user, and allowed past directories it could not enter (CAP_DAC_OVERRIDE, which Docker grants to root).
4. The same without that capability: works where all directories above are open to all.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from streamworker.embedded.child import StartFailed

NOBODY = 65534  # number of both user and group; no entry in /etc/group is needed


class Launcher(NamedTuple):
    """One way to run a program as somebody PostgreSQL accepts."""

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
        ways.append(Launcher((unshare, "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--")))
    if root and (setpriv := shutil.which("setpriv")):
        identity = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
        capability = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
        ways.append(Launcher((setpriv, *identity, *capability, "--"), owner=NOBODY))
    if root:
        ways.append(Launcher(owner=NOBODY, become=NOBODY))
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
