"""The program as people run it: real processes, a real server, a small project in a directory of its own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import pytest
import redis

from tests import forkserver, inprocess
from tests.conftest import MODES, Server, eventually_blocking
from tests.contract.ground import GROUNDS, Ground

ROOT = Path(__file__).parents[2]

JOBS = """
import signal, sys, time
from pathlib import Path
import anyio
from streamworker import App, Discard, Payload

class Note(Payload, kind="note.write", queue="notes", aliases=("note.old",)):
    text: str
    times: int = 1

class Hold(Payload, kind="hold", queue="holds"):
    gate: str

class Stick(Payload, kind="stick", queue="sticks"):
    pass

class Doomed(Payload, kind="doomed", queue="dooms"):
    why: str

app = App()
not_an_app = 5

@app.handler
async def write(note: Note) -> None:
    pass

@app.handler
async def hold(payload: Hold) -> None:
    while not Path(payload.gate).exists():
        await anyio.sleep(0.01)

@app.handler(timeout=0.3, max_attempts=1)
def stick(payload: Stick) -> None:
    time.sleep(60)

@app.handler
async def doom(payload: Doomed) -> None:
    raise Discard(payload.why)
"""


def document(kind: str, **payload: Any) -> str:
    """A job as a producer of another language may write it: starting our own program for each costs a second."""
    return json.dumps({"id": str(uuid4()), "kind": kind, "payload": payload})


class Done(subprocess.CompletedProcess[str]):
    """What a command said, and how it ended."""

    @property
    def rows(self) -> list[Any]:
        """Standard output as JSON Lines."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def sentence(self) -> str:
        """Standard error, which must be one line and no traceback."""
        lines = [line for line in self.stderr.splitlines() if not line.startswith("{")]
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("streamworker: ")
        assert "Traceback" not in self.stderr
        return lines[0].removeprefix("streamworker: ")


def _read_by_python(env: Mapping[str, str]) -> bool:
    """Whether the environment holds what Python reads before its first line, which a forked process cannot."""
    return any(
        name.startswith(("LC_", "LANG")) or (name.startswith("PYTHON") and name not in ("PYTHONPATH", "PYTHONWARNINGS"))
        for name in env
    )


class Program:
    """Runs ``streamworker`` in a project's directory, with an environment of its own.

    A command that does its work and returns runs in the process of the tests; one that lasts, or is asked to be
    ``forked``, is a process of the fork server; ``fresh`` asks for a Python of its own.
    """

    def __init__(self, directory: Path, url: str | None) -> None:
        self.directory = directory
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith("STREAMWORKER_") and k not in ("COLUMNS", "LINES")
        }
        self.env = {**clean, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "PYTHONWARNINGS": "error", "TERM": "xterm"}
        self.env.pop("REDIS_URL", None)
        self.env.pop("DATABASE_URL", None)
        if url is not None:
            self.env["REDIS_URL"] = url
        self.constants: dict[str, float | str] = {}
        """Seconds that are too long to wait for for here: see `forkserver.forked`."""
        self.forks = True
        """Whether workers of a supervisor and of ``dev`` are forked; else they start as where there is no fork server."""
        self.running: list[forkserver.Forked | subprocess.Popen[str]] = []

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "streamworker", *map(str, words)]

    def __call__(
        self,
        *words: object,
        stdin: str | None = None,
        timeout: float = 45,
        fresh: bool = False,
        forked: bool = False,
        **env: str,
    ) -> Done:
        texts, place = [*map(str, words)], {"cwd": self.directory, "env": {**self.env, **env}}
        if fresh or _read_by_python(env):
            done = subprocess.run(
                self.command(*words), timeout=timeout, capture_output=True, text=True, **place,
                **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}),
            )  # fmt: skip
        elif forked or set(texts[:1]) & inprocess.LASTING:
            done = forkserver.run(texts, input=stdin, timeout=timeout, constants=self.constants, **place)
        else:
            done = inprocess.run(texts, input=stdin, constants=self.constants, **place)
        return Done(done.args, done.returncode, done.stdout, done.stderr)

    def ok(self, *words: object, **options: Any) -> Done:
        done = self(*words, **options)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done

    def start(self, *words: object, module: str = "streamworker", **env: str) -> Running:
        place = {"cwd": self.directory, "env": {**self.env, **env}}
        options = {"module": module, "constants": self.constants, "forks": self.forks}
        return self._runs(forkserver.forked([*map(str, words)], **options, **place))

    def piped(self, *words: object, stdout: int | IO[str] = subprocess.PIPE) -> forkserver.Forked:
        """A process whose standard error, and standard output unless it is to go elsewhere, are pipes to the test."""
        process = forkserver.forked([*map(str, words)], stdout=stdout, cwd=self.directory, env=self.env)
        self.running.append(process)
        return process

    def fresh(self, *command: object, **env: str) -> Running:
        """Any command, as a process that is no child of the fork server."""
        process = subprocess.Popen(
            [*map(str, command)], cwd=self.directory, env={**self.env, **env}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self._runs(process)

    def _runs(self, process: forkserver.Forked | subprocess.Popen[str]) -> Running:
        self.running.append(process)
        return Running(process)

    def worker(self, *words: object, **env: str) -> Running:
        """A worker that is ready."""
        running = self.start("worker", "jobs:app", *words, **env)
        eventually_blocking(lambda: running.saw("worker_ready"))
        return running


class Running:
    """A process that runs beside the test; its standard error is read as it comes."""

    def __init__(self, process: forkserver.Forked | subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def saw(self, word: str, times: int = 1) -> bool:
        if self.process.poll() is not None and self.text.count(word) < times:
            self._reader.join(1)
            assert self.text.count(word) >= times, f"it ended with {self.process.returncode}: {self.text}"
        return self.text.count(word) >= times

    @property
    def worker_id(self) -> str:
        return next(json.loads(line)["worker_id"] for line in self.lines if "worker_ready" in line)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 20) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def forget(raw: redis.Redis, killed: Running) -> None:
    """What time does some leases after a worker was killed: its heartbeat is gone."""
    raw.ping()  # what it sent last is read before this is answered
    raw.delete(f"streamworker:worker:{killed.worker_id}")


class Terminal:
    """A command on a terminal of 80 columns and 24 lines."""

    def __init__(self, program: Program, *words: object) -> None:
        import fcntl
        import struct
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = forkserver.forked(
            [*map(str, words)], cwd=program.directory, env=program.env, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, constants=program.constants,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def until(self, word: str, timeout: float = 15) -> str:
        """Read until the word was shown."""
        deadline = time.monotonic() + timeout
        while word not in self.text:
            assert self.read(deadline), f"{word!r} was not shown: {self.text!r}"
        return self.text

    def read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait(self, timeout: float = 15) -> int:
        deadline = time.monotonic() + timeout
        while self.read(deadline):
            pass
        code = self.process.wait(max(0.1, deadline - time.monotonic()))
        os.close(self._master)
        return code


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a module ``jobs`` and its ``app``."""
    directory = tmp_path / "project"
    directory.mkdir()
    (directory / "jobs.py").write_text(JOBS)
    return directory


@pytest.fixture
def bare(project: Path) -> Iterator[Program]:
    """The program, with no server named."""
    program = Program(project, None)
    yield program
    for process in program.running:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


both_modes = pytest.mark.parametrize("ground", MODES, indirect=True)
"""Of a command whose way to the server depends on the mode."""


@pytest.fixture
def ground(request: pytest.FixtureRequest, redis_url: str, server: Server) -> Iterator[Ground]:
    """Stream mode, unless a test wants both: commands are slow to start."""
    with server.client() as client:
        yield GROUNDS[getattr(request, "param", "stream")](client)


@pytest.fixture
def sw(bare: Program, ground: Ground, redis_url: str) -> Program:
    """The program, on a real and empty server."""
    bare.env["REDIS_URL"] = redis_url
    bare.env["STREAMWORKER_MODE"] = ground.mode
    return bare


@pytest.fixture
def held(sw: Program, ground: Ground, tmp_path: Path) -> Callable[..., Running]:
    """``held(3)``: a worker that holds three jobs of the queue holds until the file ``gate`` is there."""

    def hold(count: int, *flags: object) -> Running:
        for _ in range(count):
            ground.push(document("hold", gate=str(tmp_path / "gate")), queue="holds")
        worker = sw.worker("--queues", "holds", "--grace", "0.5", *flags)
        eventually_blocking(lambda: ground.held("holds") == count)
        eventually_blocking(lambda: ground.raw.exists(f"streamworker:worker:{worker.worker_id}"))
        return worker

    return hold


@pytest.fixture
def doomed(sw: Program, ground: Ground) -> Callable[..., None]:
    """``doomed("x", "y")``: dead letters of the queue dooms, discarded for these reasons."""

    def die(*errors: str) -> None:
        for error in errors:
            ground.push(document("doomed", why=error), queue="dooms")
        sw.ok("worker", "jobs:app", "--burst", "--queues", "dooms")

    return die
