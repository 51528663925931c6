"""Signals: a forked child's are its own, and a worker hears each once, however many processes it was sent to."""

import json
import os
import signal

import pytest

from tests.cli.conftest import document
from tests.cli.test_processes import alive, ready
from tests.conftest import eventually_blocking, free_port

CHILDREN = """
# What children run: without Streamworker, which a spawned one would import with it.
import os, signal, time

def note(path, word):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, (word + "\\n").encode())
    os.close(fd)

def state():
    '''What a process inherited: its handlers, its wake-up descriptor and its mask.'''
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return f"{signal.getsignal(signal.SIGTERM)!r} {default} {signal.getsignal(signal.SIGHUP)!r} {signal.set_wakeup_fd(-1)} {mask}"

def sleeps(out):
    note(out, "state " + state())
    time.sleep(60)

def told(out):
    '''A child with a handler of its own for SIGTERM.'''
    signal.signal(signal.SIGTERM, lambda *_: (note(out, "state heard"), os._exit(7)))
    note(out, "up")
    for _ in range(1200):  # Python misses a signal that comes just before a long sleep begins
        time.sleep(0.05)
"""
FORKS = """
import concurrent.futures, multiprocessing, os, signal, subprocess, sys, time
from children import note, sleeps, told
from streamworker import App, Payload

class Fork(Payload, kind="fork", queue="forks"):
    way: str
    out: str

class Loop(Payload, kind="loop", queue="forks"):
    way: str
    out: str

app = App()

def up(out):
    while not (os.path.exists(out) and os.path.getsize(out)):
        time.sleep(0.01)

def bare_fork(out):
    pid = os.fork()
    if pid == 0:
        try:
            sleeps(out)
        finally:
            os._exit(1)
    return pid

def end(pid, out):
    up(out)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)

def process(method, out, target=sleeps):
    child = multiprocessing.get_context(method).Process(target=target, args=(out,))
    child.start()
    up(out)
    child.terminate()
    child.join(10)
    return child.exitcode

def pool(method, out):
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as executor:
        pid = executor.submit(os.getpid).result()
        future = executor.submit(sleeps, out)
        up(out)
        os.kill(pid, signal.SIGTERM)
        return type(future.exception()).__name__

def multi_pool(method, out):
    with multiprocessing.get_context(method).Pool(1) as workers:  # leaving it terminates the children
        workers.apply_async(sleeps, (out,))
        up(out)
    return 0

def program(out, **options):
    code = "import signal, sys, time; open(sys.argv[1], 'w').write('state ' + str(signal.getsignal(signal.SIGTERM)) + chr(10)); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-ISc", code, out], **options)
    up(out)
    child.terminate()
    return child.wait(10)

def shell(out):
    return os.system(f"echo state > {out}; kill -TERM $$")

def orphan(out):
    pid = bare_fork(out)
    up(out)
    note(out + ".pid", str(pid))
    time.sleep(60)

WAYS = {
    "orphan": orphan,
    "fork": lambda out: end(bare_fork(out), out),
    "mp-fork": lambda out: process("fork", out),
    "mp-spawn": lambda out: process("spawn", out),
    "mp-forkserver": lambda out: process("forkserver", out),
    "mp-handler": lambda out: process("fork", out, told),
    "pool-fork": lambda out: pool("fork", out),
    "pool-spawn": lambda out: pool("spawn", out),
    "mp-pool": lambda out: multi_pool("fork", out),
    "subprocess": program,
    "preexec": lambda out: program(out, preexec_fn=lambda: None),
    "system": shell,
}

@app.handler(max_attempts=1)
def fork(payload: Fork) -> None:
    note(payload.out + ".end", f"ended {WAYS[payload.way](payload.out)}")

@app.handler(max_attempts=1)
async def loop(payload: Loop) -> None:
    note(payload.out + ".end", f"ended {WAYS[payload.way](payload.out)}")
"""
ENDS = {
    "mp-handler": "7", "pool-fork": "BrokenProcessPool", "pool-spawn": "BrokenProcessPool", "mp-pool": "0", "system": "15",
}  # fmt: skip


@pytest.fixture
def forks(project):
    (project / "children.py").write_text(CHILDREN)
    (project / "forks.py").write_text(FORKS)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_signals_of_a_handlers_children_are_their_own(sw, ground, project, tmp_path, forks, loop):
    """Of handlers in threads, and of those on the event loop."""
    ways = [
        "fork",
        "mp-fork",
        "mp-spawn",
        "mp-forkserver",
        "mp-handler",
        "pool-fork",
        "pool-spawn",
        "mp-pool",
        "subprocess",
        "preexec",
        "system",
    ]
    worker = sw.fresh(*sw.command("worker", "forks:app", "--concurrency", 4), STREAMWORKER_LOOP=loop)
    eventually_blocking(lambda: worker.saw("worker_ready"))
    for kind in ("fork", "loop"):
        for way in ways:
            ground.push(document(kind, way=way, out=str(tmp_path / f"{kind}-{way}")), queue="forks")
        eventually_blocking(lambda: worker.saw("worker_stopping") or ground.empty("forks"), 40)
        assert not worker.saw("worker_stopping"), worker.text
        for way in ways:
            ends = (tmp_path / f"{kind}-{way}.end").read_text().splitlines()
            assert ends == [f"ended {ENDS.get(way, '-15')}"], (kind, way, ends)
        for way in ("fork", "mp-fork"):
            state = (tmp_path / f"{kind}-{way}").read_text()
            assert state == "state <Handlers.SIG_DFL: 0> True <Handlers.SIG_DFL: 0> -1 set()\n", (kind, way)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_a_child_that_outlives_a_killed_worker_does_not_keep_its_port(sw, ground, forks, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    first = sw.start("worker", "forks:app", "--http", address)
    ground.push(document("fork", way="orphan", out=str(tmp_path / "orphan")), queue="forks")
    noted = tmp_path / "orphan.pid"
    eventually_blocking(lambda: noted.exists() and noted.read_text().endswith("\n"))
    try:
        first.kill()
        second = sw.start("worker", "forks:app", "--http", address)
        eventually_blocking(lambda: second.saw("worker_ready"))
        assert alive(int(noted.read_text()))
        second.kill()  # it may have begun with the same job
    finally:
        os.kill(int(noted.read_text()), signal.SIGKILL)


RETURNS = """
import asyncio, concurrent.futures, os, sys, threading
from streamworker import App, Context, Payload

class Fork(Payload, kind="fork", queue="forks"):
    way: str
    out: str

class Neighbour(Payload, kind="neighbour", queue="forks"):
    out: str
    n: int

def note(path, word):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, (word + "\\n").encode())
    os.close(fd)

async def middleware(ctx, call_next):
    return await call_next()

app = App(middleware=[middleware] if "MIDDLEWARE" in os.environ else [])

@app.handler
async def neighbour(payload: Neighbour) -> None:
    await asyncio.sleep(0)
    note(payload.out, f"{payload.n} {os.getpid()}")
    await asyncio.sleep(0)

def child(way):
    if way == "raise":
        raise ValueError("no")
    if way == "exit":
        sys.exit(3)

class Pooled(Payload, kind="pooled", queue="forks"):
    out: str

@app.handler(max_attempts=1)
async def pooled(payload: Pooled) -> None:
    go = threading.Event()

    def forks():
        go.wait()
        pid = os.fork()
        if pid:
            _, status = os.waitpid(pid, 0)
            note(payload.out + ".end", f"pooled {os.waitstatus_to_exitcode(status)}")

    asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
    calls = asyncio.gather(asyncio.to_thread(forks), asyncio.to_thread(note, payload.out, f"1000 {os.getpid()}"))
    await asyncio.sleep(0)  # both are in the pool's queue, and its one thread has the first
    go.set()
    await calls

@app.handler(max_attempts=1)
DEF fork(payload: Fork, ctx: Context) -> None:
    pid = os.fork()
    if pid == 0:
        if payload.way == "await":
            AWAIT asyncio.sleep(0)
            return
        if payload.way == "enqueue":
            AWAIT app.enqueue(Neighbour(out=payload.out, n=99))
        return child(payload.way)
    _, status = os.waitpid(pid, 0)
    note(payload.out + ".end", f"{payload.way} {os.waitstatus_to_exitcode(status)}")
"""


KINDS = [("asyncio", "async"), ("uvloop", "async"), ("uvloop", "sync"), ("asyncio", "middleware")]


@pytest.mark.parametrize(
    ("ground", "loop", "kind"),
    [
        *[("stream", *kind) for kind in KINDS],
        ("list", *KINDS[0]),
        *[pytest.param("list", *kind, marks=pytest.mark.all) for kind in KINDS[1:]],
    ],
    indirect=["ground"],
)
def test_a_forked_child_that_comes_back_to_its_worker_ends(sw, ground, project, tmp_path, loop, kind):
    words = {"DEF": "def", "AWAIT ": ""} if kind == "sync" else {"DEF": "async def", "AWAIT ": "await "}
    text = RETURNS
    for word, meaning in words.items():
        text = text.replace(word, meaning)
    (project / "returns.py").write_text(text)
    ways = ["return", "raise", "exit", *(["await", "enqueue"] if kind != "sync" else [])]
    out = tmp_path / "out"
    for n, way in enumerate(ways):
        ground.push(document("fork", way=way, out=str(out)), queue="forks")
        for more in range(10):
            ground.push(document("neighbour", n=10 * n + more, out=str(out)), queue="forks")
    if kind != "sync":
        ground.push(document("pooled", out=str(out)), queue="forks")
        ways.append("pooled")
    env = {"STREAMWORKER_LOOP": loop, **({"MIDDLEWARE": "1"} if kind == "middleware" else {})}
    worker = sw.start("worker", "returns:app", "--concurrency", 20, **env)
    eventually_blocking(lambda: ground.empty("forks"), 20)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    ends = dict(line.split() for line in (tmp_path / "out.end").read_text().splitlines())
    assert ends == {way: "3" if way == "exit" else "1" for way in ways}
    ran = [tuple(map(int, line.split())) for line in out.read_text().splitlines()]
    numbers = [*range(50), 1000] if "pooled" in ways else [*range(30)]
    assert sorted(ran) == [(n, worker.process.pid) for n in numbers]
    assert worker.text.count("a forked child came back") == len(ways) - 1


def holding(sw, raw, tmp_path, count, *flags):
    """(supervisor, pids of its workers): each worker holds one job until the file ``gate`` is there."""
    supervisor = sw.worker("--processes", count, "--concurrency", 1, "--queues", "holds", *flags)
    for _ in range(count):
        raw.xadd("stream:{holds}", {"job": document("hold", gate=str(tmp_path / "gate"))})
    eventually_blocking(lambda: raw.xpending("stream:{holds}", "workers")["pending"] == count)
    return supervisor, [pid for _, pid in ready(supervisor)]


def test_a_signal_to_supervisor_and_workers_alike_is_one(sw, raw, tmp_path):
    supervisor, workers = holding(sw, raw, tmp_path, 2)
    supervisor.signal(signal.SIGTERM)
    eventually_blocking(lambda: supervisor.saw("worker_stopping", 2))
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    (tmp_path / "gate").touch()
    assert supervisor.wait() == 0
    assert "worker_hurrying" not in supervisor.text
    assert raw.xlen("stream:{holds}") == 0


def test_workers_that_heard_it_first_are_not_hurried_by_their_supervisor(sw, raw, tmp_path):
    supervisor, workers = holding(sw, raw, tmp_path, 2)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    eventually_blocking(lambda: supervisor.saw("worker_stopping", 2))
    supervisor.signal(signal.SIGTERM)
    (tmp_path / "gate").touch()
    assert supervisor.wait() == 0
    assert "worker_hurrying" not in supervisor.text
    assert raw.xlen("stream:{holds}") == 0


def test_a_second_signal_to_all_cuts_short(sw, raw, tmp_path):
    supervisor, workers = holding(sw, raw, tmp_path, 2)
    for turn in (1, 2):
        for pid in (*workers, supervisor.process.pid):
            os.kill(pid, signal.SIGINT)
        if turn == 1:
            eventually_blocking(lambda: supervisor.saw("worker_stopping", 2))
    assert supervisor.wait() == 130
    assert raw.xlen("stream:{holds}") == 2
    assert raw.xpending("stream:{holds}", "workers")["pending"] == 0


def test_a_worker_that_is_stopped_by_itself_drains_and_is_started_again(sw, raw, tmp_path):
    sw.constants["streamworker.loops.FIRST"] = 0.1
    supervisor, workers = holding(sw, raw, tmp_path, 2)
    os.kill(workers[0], signal.SIGTERM)
    eventually_blocking(lambda: supervisor.saw("worker_stopping", 1))
    (tmp_path / "gate").touch()
    eventually_blocking(lambda: len(ready(supervisor)) == 3)
    assert alive(workers[1])
    assert "worker_hurrying" not in supervisor.text
    assert supervisor.stop() == 0
    assert raw.xlen("stream:{holds}") == 0


def test_workers_whose_supervisor_is_killed_finish_what_runs(sw, raw, tmp_path):
    supervisor, workers = holding(sw, raw, tmp_path, 2)
    supervisor.kill()
    eventually_blocking(lambda: supervisor.text.count("worker_stopping") == 2)
    assert supervisor.text.count("supervisor_gone") == 2
    assert all(map(alive, workers))
    (tmp_path / "gate").touch()
    eventually_blocking(lambda: not any(map(alive, workers)))
    assert raw.xlen("stream:{holds}") == 0
    assert raw.xinfo_consumers("stream:{holds}", "workers") == []


def test_a_supervisor_that_is_stopped_while_workers_start_ends_them_at_once(sw, project):
    (project / "slow.py").write_text("import time, pathlib\npathlib.Path('up').touch()\ntime.sleep(60)\n")
    supervisor = sw.start("worker", "slow:app", "--processes", 2)
    eventually_blocking((project / "up").exists, 20)
    supervisor.signal(signal.SIGTERM)
    assert supervisor.wait(10) == 0


def test_a_hang_up_drains_and_never_cuts_short(sw, ground, tmp_path):
    worker = sw.worker("--queues", "holds")
    ground.push(document("hold", gate=str(tmp_path / "gate")), queue="holds")
    eventually_blocking(lambda: ground.held("holds") == 1)
    worker.signal(signal.SIGHUP)
    eventually_blocking(lambda: worker.saw("worker_stopping"))
    worker.signal(signal.SIGHUP)
    (tmp_path / "gate").touch()
    assert worker.wait() == 0
    assert "worker_hurrying" not in worker.text
    assert ground.empty("holds")


def test_nohup_is_respected(sw, ground):
    command = " ".join(sw.command("worker", "jobs:app"))
    worker = sw.fresh("sh", "-c", f"trap '' HUP; exec {command}")
    eventually_blocking(lambda: worker.saw("worker_ready"))
    worker.signal(signal.SIGHUP)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    stops = [json.loads(line) for line in worker.lines if "worker_stopping" in line]
    assert [each["signal"] for each in stops] == ["SIGTERM"]
    assert "worker_hurrying" not in worker.text


TWO = """
import asyncio, sys, threading
from pathlib import Path
import anyio
from streamworker import App, Payload, QueueWorker, Settings
from streamworker.telemetry import logs

class Hold(Payload, kind="hold", queue="holds"):
    gate: str

async def hold(payload: Hold) -> None:
    while not Path(payload.gate).exists():
        await anyio.sleep(0.01)

def run(queue):
    app = App()
    app.handler(hold)
    settings = Settings.load(queues=queue)
    return QueueWorker(app, redis=None, database=None, services=None, settings=settings).run()

async def both():
    return await asyncio.gather(run("holds"), run("others"))

def thread():
    codes = []
    other = threading.Thread(target=lambda: codes.append(asyncio.run(run("holds"))))
    other.start()
    codes.append(asyncio.run(run("others")))
    other.join()
    return codes

logs.configure("info", "json")
codes = thread() if sys.argv[1] == "thread" else asyncio.run(both())
sys.exit(max(codes))
"""


@pytest.mark.parametrize("where", ["loop", "thread"])
def test_two_workers_of_a_process_drain_on_one_signal(sw, ground, project, tmp_path, where):
    (project / "two.py").write_text(TWO)
    process = sw.start(where, module="two.py")
    eventually_blocking(lambda: process.saw("worker_ready", 2))
    ground.push(document("hold", gate=str(tmp_path / "gate")), queue="holds")
    eventually_blocking(lambda: ground.held("holds") == 1)
    process.signal(signal.SIGTERM)
    eventually_blocking(lambda: process.saw("worker_stopping", 2))
    (tmp_path / "gate").touch()
    assert process.wait() == 0
    assert ground.empty("holds")
    assert "worker_hurrying" not in process.text


WHICH = """
import asyncio
from pathlib import Path
from streamworker import App, Payload

class Which(Payload, kind="which", queue="whiches"):
    out: str

app = App()

@app.handler
async def which(payload: Which) -> None:
    Path(payload.out).write_text(type(asyncio.get_running_loop()).__module__)
"""


def test_the_event_loop_is_a_setting(sw, ground, project, tmp_path):
    (project / "which.py").write_text(WHICH)
    for loop, expected in (("asyncio", "asyncio"), ("uvloop", "uvloop"), ("auto", "uvloop")):
        ground.push(document("which", out=str(tmp_path / loop)), queue="whiches")
        sw.ok("worker", "which:app", "--burst", STREAMWORKER_LOOP=loop)
        assert (tmp_path / loop).read_text().startswith(expected)
    done = sw("worker", "which:app", "--burst", "--loop", "libevent")
    assert (done.returncode, "auto or uvloop or asyncio" in done.sentence) == (78, True)
