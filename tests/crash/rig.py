"""One run: a server, a fleet, producers, faults, and the end at which everything must come to rest."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import redis

from streamworker import App, Payload, StreamworkerError
from streamworker.errors import PublishUncertain
from streamworker.settings import PartitionSpec, Settings
from tests import forkserver
from tests.conftest import Server
from tests.crash import stalls
from tests.crash.app import Block, Fleeting, InLine, Shared, Single, Thread, Work
from tests.crash.checker import FOR_EVER, Verdict, check
from tests.crash.clock import Clock
from tests.crash.fleet import ROOT, Fleet, Worker, clean_environment
from tests.crash.ground import MODE, PARTITIONS, ground
from tests.crash.history import Log, read
from tests.crash.proxy import Proxy

ENDINGS = {0, 128 + signal.SIGTERM, -signal.SIGTERM, 75}
"""Exit codes of workers that were told to stop: once, or again (the second time perhaps after the last line of ours);
75 where the server was away meanwhile."""


SLOWER = 4
"""How much slower than a quiet machine this one may be: deadlines of waits are stretched by it."""
SHIFT = int(os.environ.get("CRASH_SEED", "0"))
"""Added to every seed: another run of the same tests."""


class Rig:
    """Everything of one run.

    Args:
        directory: of the server, the logs and the history.
        seed: of everything that is random here.
        lease: the workers' lease.
        proxied: workers reach the server through a `Proxy`.
        forgetful: the server has no append-only file.
        clock: the server's, if it can be set.
        settings: more settings of the workers.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seed: int = 0,
        lease: float = 1.0,
        proxied: bool = False,
        forgetful: bool = False,
        clock: Clock | None = None,
        **settings: Any,
    ) -> None:
        self.directory = directory
        self.seed = seed + SHIFT
        self.random = random.Random(self.seed)
        self.lease = lease
        self._proxied, self._forgetful, self._clock = proxied, forgetful, clock
        self._settings = {"LEASE": lease, "GRACE": 5, "CONCURRENCY": 10, "MAX_DELIVERIES": 5, **settings}
        self.max_deliveries = int(self._settings["MAX_DELIVERIES"])
        self._enqueued = Log(directory / "enqueued")
        self._faults = Log(directory / "faults")
        self.injected: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()
        self.destroyed: set[str] = set()
        self._forgotten_at = 0.0
        """When the server last forgot everything, by being killed."""
        self.expected_codes: set[int] = set()
        self.may_stammer: set[Worker] = set()
        """Workers whose tracebacks are excused."""
        self.unstarted = 0
        self.unexpected: list[str] = []
        """Workers that ended in a way nobody asked for."""
        self.proxy: Proxy | None = None

    async def __aenter__(self) -> Rig:
        async with AsyncExitStack() as stack:
            self.server = await asyncio.to_thread(
                Server,
                self.directory,
                aof=not self._forgetful,
                environment=self._clock.environment if self._clock is not None else None,
            )
            stack.callback(self.server.kill)
            self.raw = redis.Redis.from_url(self.server.url, protocol=2, decode_responses=True, socket_timeout=20)
            stack.callback(self.raw.close)
            self.ground = ground(self.raw)
            url = self.server.url
            if self._proxied:
                self.proxy = Proxy(self.server.port, self.seed)
                url = f"redis://127.0.0.1:{await self.proxy.start()}/0"
                stack.push_async_callback(self.proxy.close)
            self.fleet = await stack.enter_async_context(Fleet(self.directory, url, **self._settings))
            self.fleet.on_end = self._ended
            probe = redis.Redis.from_url(self.server.url, protocol=2, socket_timeout=20)
            stack.callback(probe.close)
            stack.callback(stalls.watch(self.directory, "*", lambda: _asked(probe)).set)
            watching = asyncio.create_task(self._watch_loop())
            stack.callback(watching.cancel)
            parts = (PartitionSpec("q", PARTITIONS),) if PARTITIONS > 1 else ()
            self.app = App(settings=Settings(redis_url=self.server.url, mode=MODE, partitions=parts))
            await stack.enter_async_context(self.app)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.__aexit__(*exc)
        self._enqueued.close()
        self._faults.close()

    async def _watch_loop(self) -> None:
        """This loop is the network of proxied runs."""
        log = Log(self.directory / "stalls")
        while True:
            began = time.monotonic()
            await asyncio.sleep(stalls.STEP)
            if (late := time.monotonic() - began - stalls.STEP) > stalls.WORTH:
                log.add(worker="*", began=began, late=late)

    # -- producing

    async def put(self, *payloads: Payload, **options: Any) -> list[str]:
        """Enqueue; what is acknowledged is written down, and so is what only may have been."""
        jobs, sent = [self.app.job(payload, **options) for payload in payloads], time.monotonic()
        try:
            answers = await self.app.enqueue_many(jobs)
        except PublishUncertain:
            for job in jobs:
                self._enqueued.add(what="uncertain", job=job.id)
            raise
        for payload, answer in zip(payloads, answers, strict=True):
            more: dict[str, Any] = {"tenant": payload.tenant} if isinstance(payload, Shared) else {}
            if isinstance(payload, Single):
                more = {"held": payload.name, "new": answer.new}
            if "expires_in" in options:
                more = {"lives": options["expires_in"]}
            self._enqueued.add(what="acknowledged", job=answer.id, sent=sent, **more)
            if answer.replaced not in (None, answer.id):
                self._enqueued.add(what="cancelled", job=answer.replaced)
        return [answer.id for answer in answers]

    async def produce(self, stop: asyncio.Event, rate: float, *, flow: bool = True) -> None:
        """A mixture of jobs, at ``rate`` a second, until stopped; with ``flow`` also some in lines, unique or expiring."""
        while not stop.is_set():
            payloads = [self._any_payload() for _ in range(self.random.randint(1, 10))]
            options: dict[str, Any] = {"priority": self.random.choice(("high", "normal", "low"))}
            if self.random.random() < 0.1:
                options["delay"] = self.random.uniform(0.05, 1.0)
            elif not flow:
                pass
            elif self.random.random() < 0.3:
                payloads = [self._next_in_line() for _ in payloads]
            elif self.random.random() < 0.3:
                payloads, options = self._of_tenants(len(payloads)), {}
            elif self.random.random() < 0.2:
                payloads = [Fleeting(self.random.choice((0.0, 0.05)), self.random.choice((0, 0, 1))) for _ in payloads]
                options["expires_in"] = self.random.choice((0.02, 0.3, FOR_EVER))
            elif self.random.random() < 0.2:
                name, fails = f"u{self.random.randint(0, 3)}", self.random.choice((0, 0, 0, 1, 9))
                payloads = [Single(name, self.random.choice((0.0, 0.1)), fails)]
                options |= {"key": name, "unique": "done", "replace": self.random.random() < 0.3}
            with suppress(StreamworkerError):
                await self.put(*payloads, **options)
            with suppress(TimeoutError):
                async with asyncio.timeout(len(payloads) / rate):
                    await stop.wait()

    def _of_tenants(self, count: int) -> list[Payload]:
        """A flood of one tenant, or one job of each of a few others."""
        if self.random.random() < 0.5:
            return [Shared("flood", 0.02) for _ in range(10 * count)]
        return [Shared(f"q{self.random.randint(0, 4)}", 0.02)]

    def next_in_lines(self) -> list[Payload]:
        """The next job of each order key."""
        return [self._next_in_line(f"k{number}") for number in range(20)]

    def _next_in_line(self, key: str = "") -> Payload:
        key = key or f"k{self.random.randint(0, 19)}"
        self._numbers[key] += 1
        seconds, fails = self.random.choice((0.0, 0.0, 0.05)), self.random.choice((0, 0, 0, 0, 1, 9))
        return InLine(key, self._numbers[key], f"t{self._numbers[key] % 3}", seconds, fails)

    def _any_payload(self) -> Payload:
        dice = self.random.random()
        if dice < 0.55:
            return Work()
        if dice < 0.80:
            return Work(seconds=self.random.uniform(0.005, 0.3))
        if dice < 0.85:
            return Work(seconds=self.random.uniform(0.5, 1.5))
        if dice < 0.90:
            return Work(fails=self.random.choice((1, 1, 2, 9)))
        if dice < 0.93:
            return Work(snoozes=self.random.randint(1, 2))
        if dice < 0.94:
            return Work(bad=True)
        if dice < 0.98:
            return Thread(seconds=self.random.uniform(0.0, 0.2))
        return Block(seconds=self.random.uniform(0.0, 0.1))

    async def cancel(self, *jobs: str) -> None:
        """Cancel jobs; what is acknowledged is written down: they need not be done any more."""
        for job in jobs:
            await self.app.cancel(job, queue="q")
            self._enqueued.add(what="cancelled", job=job)

    # -- faults

    def _ended(self, worker: Worker) -> None:
        """Whoever ends without being told or killed must have met a failpoint or a poison."""
        code = worker.code or 0
        if code == -signal.SIGKILL and worker.at:
            self.fault("failpoint", worker.name)
        elif code == 9:
            self.fault("poison", worker.name)
        elif code == 69 and not worker.said("worker_ready"):
            self.unstarted += 1  # born into an outage: whoever orchestrates starts it again
        elif code != -signal.SIGKILL and (not worker.told or code not in ENDINGS) and code not in self.expected_codes:
            self.unexpected.append(f"{worker.name} ended with {code}: {worker.text[-300:]}")

    def fault(self, what: str, worker: str = "*", *, began: float | None = None, tail: float = 0.0) -> None:
        """Write a fault down that is over now."""
        ended = time.monotonic()
        self._faults.add(what=what, worker=worker, began=began if began is not None else ended, ended=ended, tail=tail)
        self.injected[what] += 1

    def kill(self, worker: Worker) -> None:
        began = time.monotonic()
        worker.told = True
        worker.signal(signal.SIGKILL)
        self.fault("kill", worker.name, began=began)

    def terminate(self, worker: Worker) -> None:
        began = time.monotonic()
        worker.terminate()
        # What it does not finish in its grace is handed back and runs elsewhere.
        self.fault("terminate", worker.name, began=began, tail=60.0)

    async def freeze(self, worker: Worker, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while: a zombie if it is longer than the lease."""
        began = time.monotonic()
        worker.stopped = True
        worker.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            worker.signal(signal.SIGCONT)
            worker.stopped = False
            self.fault("freeze", worker.name, began=began, tail=1.0)

    async def restart_server(self, down: float = 0.0) -> None:
        """SIGKILL, and start again with its append-only file, or with nothing."""
        kept = self.ground.witnesses() if self._forgetful else []
        began = time.monotonic()
        await asyncio.to_thread(self.server.kill)
        gone = time.monotonic()
        await asyncio.sleep(down)
        await asyncio.to_thread(self.server.start)
        if self._forgetful:
            self._forgotten_at = gone
            self.ground.restore(kept)
        self.fault("server restart" if down < self.lease else "outage", began=began, tail=2 * self.lease + 2)

    # -- the end

    def running(self) -> int:
        """Jobs that workers hold."""
        return sum(self.ground.held().values())

    def holder(self) -> Worker | None:
        """A worker that holds jobs right now."""
        for name in self.ground.held():
            return self.living([name])
        return None

    def living(self, worker_ids: Collection[str]) -> Worker | None:
        """A living worker with one of these ids."""
        names = {worker_id.rpartition("-")[0] for worker_id in worker_ids}
        return next((each for each in self.fleet.alive if each.name in names), None)

    def amid(self) -> Worker | None:
        """A worker that has begun a job and not ended it; one that only holds some repeats nothing when it is killed."""
        begun: dict[tuple[str, int], str] = {}
        for line in read(self.directory / "runs"):
            if line["what"] == "started":
                begun[line["job"], line["hop"]] = line["worker"]
            else:
                begun.pop((line["job"], line["hop"]), None)
        # The end of a run that failed is not written down; but it holds no more.
        return self.living(set(begun.values()) & set(self.ground.held()))

    def runs(self, job: str) -> list[dict[str, Any]]:
        """The starts of a job."""
        return [line for line in read(self.directory / "runs") if line["job"] == job and line["what"] == "started"]

    def runs_of(self, job: str) -> int:
        """How often a job was started."""
        return len(self.runs(job))

    def done_lines(self) -> int:
        """How many runs ended well so far."""
        path = self.directory / "runs"
        return path.read_text().count('"finished"') if path.exists() else 0

    def refuses(self, word: str) -> bool:
        """The server answers a write with this error."""
        try:
            self.raw.set("queue:crash:probe", "x", px=1)
        except redis.RedisError as error:
            return word in f"{word if isinstance(error, redis.exceptions.TryAgainError) else ''}{error}"
        return False

    def fail_to_save(self) -> None:
        """A background save that comes to nothing, as on a full disk."""
        self.raw.config_set("save", "3600 1")
        self.raw.config_set("rdb-key-save-delay", 10_000_000)
        self.raw.bgsave()
        server = self.raw.info("server")["process_id"]
        deadline = time.monotonic() + 10
        while not (children := Path(f"/proc/{server}/task/{server}/children").read_text().split()):
            assert time.monotonic() < deadline, "no child saves"
        os.kill(int(children[0]), signal.SIGKILL)

    def endless_script(self) -> None:
        """Keep the server busy until SCRIPT KILL."""
        with redis.Redis.from_url(self.server.url, protocol=2) as client, suppress(redis.RedisError):
            client.eval("while true do end", 0)

    def delete_keys(self, *keys: str) -> None:
        """Delete keys underneath; the jobs in them are excused, and nobody else's."""
        began = time.monotonic()
        self.destroyed.update(self.ground.delete(keys))
        self.fault("keys deleted", began=began, tail=3 * self.lease)

    def flush(self) -> None:
        """FLUSHALL. Without a ledger what it held is gone."""
        began = time.monotonic()
        self.destroyed.update(self.ground.flush())
        self.fault("flushall", began=began, tail=3 * self.lease)

    def forget_group(self, *places: str) -> None:
        """The consumer groups of these places (none: all) are deleted underneath; no job is."""
        began = time.monotonic()
        self.ground.forget_groups(*places)
        self.fault("group deleted", began=began, tail=3 * self.lease)

    def open_gate(self, name: str) -> None:
        """Let `Gated` jobs of this gate end."""
        (self.directory / f"gate-{name}").touch()

    async def all_ready(self) -> None:
        """Whoever lives has begun to work."""
        await self.until(lambda: all(worker.said("worker_ready") for worker in self.fleet.alive), 30, "ready workers")

    async def until(self, condition: Callable[[], Any], timeout: float, what: str) -> Any:
        """Wait for a condition of the server or the logs; on time-out tell what the server holds."""
        deadline = time.monotonic() + timeout * SLOWER
        while not (answer := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{what} did not come true in {timeout * SLOWER} s (seed {self.seed}): {self.state()}"
                )
            await asyncio.sleep(0.02)
        return answer

    def state(self) -> str:
        """What the server holds and who lives, for a failing run."""
        return f"{self.ground.state()}; alive {[worker.name for worker in self.fleet.alive]}"

    async def at_rest(self, timeout: float = 60.0) -> None:
        """All jobs are ended."""
        await self.until(lambda: self.ground.backlog() == 0, timeout, "an empty backlog")

    async def finish(self, *, timeout: float = 60.0, workers: int = 2, look: bool = False) -> Verdict:
        """No more faults: come to rest, stop everybody, and judge.

        Args:
            timeout: seconds until nothing is left to do.
            workers: how many are kept alive.
            look: ask the command line too whether all is clean.
        """
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self._keep(workers))  # a poison may not have taken its last worker yet
            await self.at_rest(timeout)
            await self.until(self._tidied, 10 * self.lease + 20, "the names of dead workers being gone")
            keeping.cancel()
        await self.all_ready()
        if look:
            await asyncio.to_thread(self._look_by_command)
        stopping = [worker for worker in self.fleet.workers if worker.alive]
        for worker in stopping:
            worker.terminate()
        codes = [await worker.wait() for worker in stopping]
        # What was sent to a server that then forgot is gone, unless it was done by then; nobody was promised that it would last.
        enqueued = read(self.directory / "enqueued")
        self.destroyed.update(line["job"] for line in enqueued if line.get("sent", 0.0) < self._forgotten_at)
        verdict = check(
            self.directory,
            self.ground.witnesses(),
            self.ground.dead_ids(),
            max_deliveries=self.max_deliveries,
            lease=self.lease,
            destroyed=self.destroyed,
            slots=int(self._settings["CONCURRENCY"]) * max(workers, 1),
        )
        for each in self.unexpected:
            verdict.complain("exit", each)
        if any(codes):
            last = "".join(worker.text[-400:] for worker in stopping if worker.code)
            verdict.complain("rest", f"workers ended with {codes}: {last}")
        self._leftovers(verdict)
        return verdict

    def _tidied(self) -> bool:
        names = tuple(f"{worker.name}-" for worker in self.fleet.workers if worker.alive)
        return all(consumer.startswith(names) for consumer in self.ground.names())

    def _look_by_command(self) -> None:
        """`pending` shows nothing, and `workers` those who live and nobody else."""
        pending = self.command("pending", "--json")
        assert not pending, f"seed {self.seed}: pending still shows {pending}"
        deadline = time.monotonic() + 3 * self.lease + 10 * SLOWER  # the dead are forgotten with their heartbeats
        while True:
            shown = {line["worker_id"].rpartition("-")[0] for line in self.command("workers", "--json")}
            alive = {worker.name for worker in self.fleet.workers if worker.alive}
            if shown == alive:
                return
            assert time.monotonic() < deadline, f"seed {self.seed}: workers shows {shown}, alive are {alive}"

    def command(self, *words: str) -> list[dict[str, Any]]:
        """What `streamworker WORDS` prints as JSON lines; past the proxy."""
        environment = {**clean_environment(), "REDIS_URL": self.server.url, "STREAMWORKER_QUEUES": "q"}
        done = forkserver.run(words, cwd=ROOT, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    async def _keep(self, workers: int) -> None:
        while True:
            while len(self.fleet.alive) < workers:
                await self.fleet.start()
            await asyncio.sleep(0.05)

    def _leftovers(self, verdict: Verdict) -> None:
        if self.ground.backlog() or self.ground.held():
            verdict.complain("rest", f"something still lies there: {self.state()}")
        if names := self.ground.names():
            verdict.complain("rest", f"consumers are left over: {names}")
        if left := [key for key in self.ground.keys_left() if not self._expires_soon(key)]:
            verdict.complain("rest", f"keys are left over: {left}")
        for worker in self.fleet.workers:
            if worker in self.may_stammer:
                continue
            said = worker.text.replace('"exception":', "")
            if "Traceback" in said.replace("Traceback (most recent call last):\\n", ""):
                verdict.complain("rest", f"{worker.name} printed a traceback: {said[said.index('Traceback') :][:1500]}")

    def _expires_soon(self, key: str) -> bool:
        """The heartbeat of a killed worker may still be running down, and of nobody else."""
        killed = [f"streamworker:worker:{worker.name}-" for worker in self.fleet.workers if (worker.code or 0) != 0]
        return key.startswith(tuple(killed)) and self.raw.pttl(key) <= self.lease * 1000


def _asked(client: redis.Redis) -> None:
    """The server has answered, or is away by a fault of ours."""
    with suppress(Exception):  # closed underneath at the end, too
        client.ping()


def fine(verdict: Verdict, seed: int) -> Verdict:
    """Fail with everything the checker found, and the seed that replays it."""
    assert not verdict.violations, (
        f"seed {seed} (CRASH_SEED={SHIFT}), {len(verdict.violations)} violations:\n"
        + "\n".join(verdict.violations[:20])
    )
    return verdict
