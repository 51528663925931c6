"""One command of the program in the process of the tests: the same words, streams, environment and exit code, no start.

``run(["queues", "--json"], cwd=…, env=…)`` has the face of `tests.forkserver.run`, for commands that do their work and
return. What a command configures for the whole process (logs, structlog, signals, the garbage collector, what it
imports from the working directory) is afterwards as it was. Commands that run until they are stopped, that fork, or
that watch over their own process belong into a process: `tests.forkserver`.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Final

import structlog

from streamworker import cli
from streamworker.telemetry import logs
from streamworker.worker import signals
from tests.forkserver import set_constant

ROOT: Final = Path(__file__).parents[1]
LASTING: Final = frozenset({"bridge", "dashboard", "demo", "dev", "relay", "worker"})
"""Commands that belong into a process of their own."""


def run(
    words: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    input: str | None = None,  # noqa: A002
    constants: Mapping[str, float | str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``streamworker WORDS``, as `subprocess.run` with ``capture_output`` and ``text`` tells of it.

    Args:
        words: of the command line, without the program's name.
        cwd: the working directory; importable, as with ``python -m``.
        env: the whole environment.
        input: what is on standard input; ``None`` for nothing.
        constants: see `tests.forkserver.forked`.
    """
    with ExitStack() as stack:
        own = _environment(env), _directory(cwd), _imports(cwd, env), _process_state(), _constants(constants or {})
        for state in own:
            stack.enter_context(state)
        out, err = stack.enter_context(_streams(input))
        code = _apart(lambda: _main(list(words)))
        return subprocess.CompletedProcess(["streamworker", *words], code, _text(out), _text(err))


def _main(words: list[str]) -> int:
    sys.argv[:] = ["streamworker", *words]
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1


def _apart(call: Callable[[], int]) -> int:
    """Call it here, or in a thread if an event loop runs here already: commands run their own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(call()))
    thread.start()
    thread.join()
    return codes[0]


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    try:
        _set_environment(env)
        yield
    finally:
        _set_environment(before)


def _set_environment(env: Mapping[str, str]) -> None:
    zone = os.environ.get("TZ")
    os.environ.clear()
    os.environ.update(env)
    if os.environ.get("TZ") != zone:
        time.tzset()


@contextmanager
def _directory(cwd: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(cwd)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _imports(cwd: Path, env: Mapping[str, str]) -> Iterator[None]:
    """The path that ``python -m`` has there; the directory's own modules are imported anew, and forgotten afterwards."""
    path, argv = sys.path[:], sys.argv[:]
    own = set() if cwd == ROOT else {each.stem for each in cwd.iterdir()}
    hidden: dict[str, ModuleType] = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own
    }
    loaded = set(sys.modules)
    more = [each for each in env.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = [str(cwd), *more, *(each for each in path if each not in ("", str(ROOT), *more))]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for name in set(sys.modules) - loaded:
            if name.partition(".")[0] in own:
                del sys.modules[name]
        sys.modules.update(hidden)
        sys.path[:], sys.argv[:] = path, argv


@contextmanager
def _constants(constants: Mapping[str, float]) -> Iterator[None]:
    before = {name: set_constant(name, value) for name, value in constants.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            set_constant(name, value)


@contextmanager
def _process_state() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers, pipeline, prepared = root.level, root.handlers[:], logs._pipeline, logs._prepared
    configured = structlog.is_configured()
    numbers = {number: signal.getsignal(number) for number in signals.STOP}
    freeze = gc.freeze
    # What was frozen before stays so, and nothing else is: to count it, in order to know, takes longer than a command.
    gc.freeze = lambda: None
    try:
        yield
    finally:
        gc.freeze = freeze
        logs._pipeline, logs._prepared = pipeline, prepared
        if not configured:
            structlog.reset_defaults()
        root.setLevel(level)
        root.handlers[:] = handlers
        if threading.current_thread() is threading.main_thread():
            for number, handler in numbers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
            signals._before.clear()


@contextmanager
def _streams(input: str | None) -> Iterator[tuple[IO[bytes], IO[bytes]]]:  # noqa: A002
    """Standard streams that are files: they have descriptors, and are no terminals."""
    before = sys.stdin, sys.stdout, sys.stderr
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write((input or "").encode())
        files[0].seek(0)
        sys.stdin = io.TextIOWrapper(files[0], "utf-8")
        sys.stdout = io.TextIOWrapper(files[1], "utf-8", write_through=False)
        sys.stderr = io.TextIOWrapper(files[2], "utf-8", "backslashreplace", line_buffering=True)
        ours = sys.stdin, sys.stdout, sys.stderr
        try:
            yield files[1], files[2]
        finally:
            for stream in ours:
                with suppress(ValueError, OSError):
                    stream.detach()
            sys.stdin, sys.stdout, sys.stderr = before


def _text(file: IO[bytes]) -> str:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file.seek(0)
    return file.read().decode(errors="replace").replace("\r\n", "\n")
