"""The program as real processes that start within milliseconds: forked from one that has imported everything.

Starting Python and importing the command line costs half a second of processor time, a thousand times in this suite.
A child of the fork server is a process as any other: its own pid, signals, environment, working directory, standard
streams and exit code; it ends as Python ends, `threading` and `atexit` included, up to the point where the interpreter
takes itself apart. What Python reads before its first line (``PYTHON*``, the locale) is the fork server's: who tests
that, or the very end, starts a Python of its own.

``forked(["worker", "jobs:app"], cwd=…, env=…)`` has the face of `subprocess.Popen`. The server is started by the first
call, and ends with the process that called. Workers of a supervisor, and what ``dev`` starts, come from it too: they
differ from children of these in their parent alone.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, NoReturn

import anyio

import streamworker
from streamworker import cli
from streamworker.cli import dev

ROOT: Final = Path(__file__).parents[1]
MAX_ORDER: Final = 1 << 20
"""Bytes of one order: words and environment."""
MOST_DESCRIPTORS: Final = 8
"""Standard streams, and sockets that a process inherits."""
OURS: Final = (sys.executable, "-m", "streamworker")

# -- the caller's side

_server: tuple[int, subprocess.Popen[bytes], str] | None = None


class Forked:
    """One process of the fork server; the part of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket, args: Sequence[str]) -> None:
        self._connection = connection
        self.args = list(args)
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        self.returncode: int | None = None
        self.pid = int(_receive(connection))

    def poll(self) -> int | None:
        """The exit code (negative: a signal), ``None`` while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended after ``timeout`` seconds.
        """
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = int(_receive(self._connection))
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:  # noqa: A002
        """Write ``input``, read both streams to their ends, and wait; as `subprocess.Popen.communicate`."""
        end = None if timeout is None else time.monotonic() + timeout
        texts: dict[IO[str], list[bytes]] = {stream: [] for stream in (self.stdout, self.stderr) if stream is not None}
        if self.stdin is not None:
            with self.stdin:
                self.stdin.write(input or "")
        open_streams = list(texts)
        while open_streams:
            left = None if end is None else end - time.monotonic()
            ready, _, _ = select.select(open_streams, [], [], left if left is None else max(0.0, left))
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            for stream in ready:
                data = os.read(stream.fileno(), 65536)
                texts[stream].append(data)
                if not data:
                    open_streams.remove(stream)
        self.wait(None if end is None else max(0.1, end - time.monotonic()))
        said = []
        for stream in (self.stdout, self.stderr):
            said.append(b"".join(texts[stream]).decode(errors="replace") if stream is not None else "")
            if stream is not None:
                stream.close()
        return said[0], said[1]


def forked(
    words: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[Any] = subprocess.DEVNULL,
    stderr: int | IO[Any] = subprocess.PIPE,
    start_new_session: bool = False,
    module: str = "streamworker",
    constants: Mapping[str, float | str] | None = None,
    preload: Sequence[str] = (),
    forks: bool = True,
) -> Forked:
    """Start ``python -m streamworker WORDS`` as a process of its own.

    Args:
        words: of the command line, without the program's name.
        cwd: the working directory; importable, as with ``python -m``.
        env: the whole environment.
        stdin: a descriptor, ``PIPE`` or ``DEVNULL``, as for `subprocess.Popen`; so are the next two.
        stdout: where standard output goes.
        stderr: where standard error goes.
        start_new_session: make it the leader of a session: it and its children share no process group with the test.
        module: another one than ``streamworker`` to run as ``__main__``.
        constants: seconds that are too long to wait for, such as ``{"streamworker.worker.HURRIED": 0.5}``, for this
            process and the workers that are forked for it.
        preload: modules that the fork server imports first, once, because many processes of these tests would.
        forks: workers of a supervisor and of ``dev`` are forked too; else each starts a Python of its own.
    """
    ends: dict[str, int] = {}
    theirs: list[int] = []
    mine: list[int] = []
    for name, wanted in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
        if wanted == subprocess.PIPE:
            reader, writer = os.pipe()
            theirs.append(reader if name == "stdin" else writer)
            ends[name] = writer if name == "stdin" else reader
            mine.append(theirs[-1])
        elif wanted == subprocess.DEVNULL:
            theirs.append(os.open(os.devnull, os.O_RDWR))
            mine.append(theirs[-1])
        else:
            theirs.append(wanted if isinstance(wanted, int) else wanted.fileno())
    order = {
        "words": [*words], "cwd": str(cwd), "env": dict(env), "session": start_new_session, "module": module,
        "constants": dict(constants or {}), "preload": [*preload], "forks": forks, "numbers": [0, 1, 2],
    }  # fmt: skip
    process = _order(_address(), order, theirs)
    for descriptor in mine:
        os.close(descriptor)
    for name, descriptor in ends.items():
        # Unbuffered underneath, for `communicate` reads the descriptor itself.
        setattr(process, name, os.fdopen(descriptor, "w" if name == "stdin" else "r", errors="replace"))
    return process


def _order(address: str, order: Mapping[str, Any], descriptors: Sequence[int]) -> Forked:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(order).encode()], descriptors)
    return Forked(connection, order["words"])


def run(
    words: Sequence[str],
    *,
    input: str | None = None,  # noqa: A002
    timeout: float,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """`forked`, with its output read to the end; as `subprocess.run` with ``capture_output`` and ``text``."""
    process = forked(
        words, stdin=subprocess.DEVNULL if input is None else subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    try:
        out, err = process.communicate(input, timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(["streamworker", *words], process.wait(), out, err)


_PROGRAM: Final = """#!{python} -IS
# A program of the fork server, for shells: its streams, folder, environment, exit code, and the signals sent to it.
import json, os, signal, socket, sys
words = sys.argv[1:]
module = "streamworker"
real = [{real!r}, *words]
if {python_itself}:
    module, *words = words
    if module == "-m":
        module, *words = words
    elif not module.endswith(".py"):
        os.execv(real[0], real)
if {fresh_first}:
    name = f"{{module}} {{words[0] if module == 'streamworker' and words else ''}}".strip().replace("/", "_")
    try:
        os.close(os.open(os.path.join({folder!r}, f"{{name}} was fresh"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    else:
        os.execv(real[0], real)
order = {{
    "words": words, "cwd": os.getcwd(), "env": dict(os.environ), "session": False, "module": module,
    "constants": {{}}, "preload": [], "forks": True, "numbers": [0, 1, 2],
}}
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
socket.send_fds(connection, [json.dumps(order).encode()], [0, 1, 2])
pid = int(connection.recv(100))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(connection.recv(100))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def programs(folder: Path, *, fresh_first: bool = False) -> Path:
    """Put ``streamworker`` and ``python`` into ``folder``, for the ``PATH`` of shells: processes of the fork server.

    ``python`` runs files and modules (``python register.py``, ``python -m pytest``), and is Python for all else. A
    program that is killed (SIGKILL) leaves its process behind: no shell here does that.

    Args:
        folder: is made.
        fresh_first: whether each command of the program (``streamworker enqueue``), file and module is a Python of its
            own when it is called for the first time.
    """
    folder.mkdir()
    for name in ("streamworker", "python"):
        real = sys.executable if name == "python" else str(Path(sys.executable).with_name(name))
        text = _PROGRAM.format(
            python=sys.executable, real=real, address=_address(), python_itself=name == "python", fresh_first=fresh_first,
            folder=str(folder),
        )  # fmt: skip
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def _address() -> str:
    """Where the fork server of this process listens; started if there is none."""
    global _server  # noqa: PLW0603 - one a process, as the process that it is
    if _server is None or _server[0] != os.getpid() or _server[1].poll() is not None:
        mine, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("STREAMWORKER_", "PYTEST_"))}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()],
            env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        address = mine.recv(200)  # at its end, when the last copy of `mine` is closed, the server ends
        if not address:
            raise RuntimeError("the fork server could not start; standard error says why")
        _server = (os.getpid(), process, "\0" + address.decode())
        _keep.append(mine)
    return _server[2]


_keep: list[socket.socket] = []


@atexit.register
def _end() -> None:
    """The fork server ends before this process."""
    if _server is not None and _server[0] == os.getpid():
        while _keep:
            _keep.pop().close()
        with suppress(subprocess.TimeoutExpired):
            _server[1].wait(5)


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(100)
    if not data:
        raise RuntimeError("the fork server ended")
    return data


# -- the server's side


def _main(alive: socket.socket) -> int:
    _import_all()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    name = f"streamworker-forkserver-{os.getpid()}"
    listener.bind("\0" + name)
    listener.listen(100)
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the tests end first
    alive.send(name.encode())
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([alive, listener, wake], [], [])
        if wake in ready:
            os.read(wake, 1000)
        _reap(children)
        if alive in ready:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return 0
        if listener in ready:
            connection, _ = listener.accept()
            data, descriptors, _, _ = socket.recv_fds(connection, MAX_ORDER, MOST_DESCRIPTORS)
            order = json.loads(data)
            for module in order["preload"]:
                importlib.import_module(module)
            pid = os.fork()
            if not pid:
                for mine in (alive, listener, connection, *children.values()):
                    mine.close()
                for mine in (wake, waker):
                    os.close(mine)
                if order["forks"]:
                    _fork_own("\0" + name, order)
                _end(_child(order, descriptors))
            for descriptor in descriptors:
                os.close(descriptor)
            children[pid] = connection
            connection.send(str(pid).encode())


def _reap(children: dict[int, socket.socket]) -> None:
    """Tell who waits for a child that it has ended."""
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with children.pop(pid) as connection, suppress(OSError):  # the test did not wait
                connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _child(order: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Become ``python -m streamworker WORDS``; returns its exit code."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores
    if order["session"]:
        os.setsid()
    _put(descriptors, order["numbers"])
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    os.chdir(order["cwd"])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [order["cwd"], *paths, *[path for path in sys.path if path not in ("", str(ROOT), *paths)]]
    sys.argv[:] = ["streamworker", *order["words"]]
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        buffering = 1 if name == "stderr" or os.isatty(number) else -1
        stream = open(number, mode, buffering, encoding="utf-8", errors="backslashreplace" if number == 2 else "strict")  # noqa: SIM115, PTH123
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if os.environ.get("PYTHONWARNINGS") == "error":
        warnings.simplefilter("error")
    for name, value in order["constants"].items():
        set_constant(name, value)
    try:
        if order["module"].endswith(".py"):
            sys.argv[0] = order["module"]
            runpy.run_path(order["module"], run_name="__main__")
            return 0
        if order["module"] != "streamworker":
            runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
            return 0
        return cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _end(code: int) -> NoReturn:
    """End as Python does, but without taking the interpreter apart.

    That copies each page of what the fork server has imported, and is half of what a short-lived process costs.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    gc.collect()  # what is left open warns now
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            traceback.print_exc()
            code = 120
    os._exit(code)


def _put(descriptors: Sequence[int], numbers: Sequence[int]) -> None:
    """Give descriptors their numbers."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(high, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


class _Process:
    """A forked process as a supervisor knows its workers; the part of `anyio.abc.Process` that it uses."""

    def __init__(self, forked: Forked) -> None:
        self._forked = forked
        self.pid = forked.pid
        self.kill = forked.kill
        self.send_signal = forked.send_signal

    async def wait(self) -> int:
        await anyio.wait_readable(self._forked._connection)
        return self._forked.wait()

    async def __aenter__(self) -> _Process:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._forked.kill()
        self._forked.wait()


def _fork_own(address: str, mine: Mapping[str, Any]) -> None:
    """Have what this process starts of ours forked, too."""
    opened, popen = anyio.open_process, subprocess.Popen

    def fork(words: Sequence[str], env: Mapping[str, str], passed: Sequence[int]) -> Forked:
        numbers = [0, 1, 2, *passed]
        order = {
            **mine,
            "words": [*words],
            "cwd": str(Path.cwd()),
            "env": dict(env),
            "session": True,
            "numbers": numbers,
        }
        return _order(address, order, numbers)

    async def open_process(command: Sequence[str], **options: Any) -> Any:
        if tuple(command[:3]) != OURS:
            return await opened(command, **options)
        return _Process(fork(command[3:], options["env"], options["pass_fds"]))

    def start(command: Sequence[str], *, process_group: int, pass_fds: Sequence[int] = ()) -> Any:
        if tuple(command[:3]) != OURS:
            return popen(command, process_group=process_group, pass_fds=pass_fds)
        return fork(command[3:], os.environ, pass_fds)

    anyio.open_process = open_process
    dev.subprocess = types.SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[assignment]


def set_constant(name: str, value: float | str) -> float | str:
    """Set ``package.module.NAME``, which must be there; returns what it was."""
    module, _, constant = name.rpartition(".")
    owner = importlib.import_module(module)
    before: float | str = getattr(owner, constant)
    setattr(owner, constant, value)
    return before


def _import_all() -> None:
    """Import what commands import when they run, so that no child has to."""
    for module in pkgutil.walk_packages(streamworker.__path__, "streamworker."):
        # Django, pydantic and others are for those alone who use them.
        if not module.name.endswith("__main__") and not re.search(r"\.(testing|integrations)\b", module.name):
            importlib.import_module(module.name)
    for name in ("anyio._backends._asyncio", "uvloop", "rich.live", "rich.table", "rich.console"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(_main(socket.socket(fileno=int(sys.argv[1]))))
