"""One run: a server, a fleet, producers, faults, and the end at which everything must come to rest."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import redis

from streamworker import App, Payload, StreamworkerError
from streamworker.errors import PublishUncertain
from streamworker.settings import Settings
from tests.conftest import Server
from tests.crash import witness
from tests.crash.app import Block, Thread, Work
from tests.crash.checker import Verdict, check
from tests.crash.fleet import Fleet, Worker
from tests.crash.history import Log, read
from tests.crash.proxy import Proxy

GROUP = "workers"
BASE = "stream:{q}"
STREAMS = (f"{BASE}:high", BASE, f"{BASE}:low")

ENDINGS = {0, 128 + signal.SIGTERM, -signal.SIGTERM, 75}
"""Exit codes of workers that were told to stop: once, or again (the second time perhaps after the last line of ours);
75 where the server was away meanwhile."""


class Rig:
    """Everything of one run.

    Args:
        directory: of the server, the logs and the history.
        seed: of everything that is random here.
        lease: the workers' lease.
        proxied: workers reach the server through a `Proxy`.
        settings: more settings of the workers.
    """

    def __init__(
        self, directory: Path, *, seed: int = 0, lease: float = 1.0, proxied: bool = False, **settings: Any
    ) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self.seed = seed
        self.lease = lease
        self._proxied = proxied
        self._settings = {"LEASE": lease, "GRACE": 5, "CONCURRENCY": 10, "MAX_DELIVERIES": 5, **settings}
        self.max_deliveries = int(self._settings["MAX_DELIVERIES"])
        self._enqueued = Log(directory / "enqueued")
        self._faults = Log(directory / "faults")
        self.injected: Counter[str] = Counter()
        self.destroyed: set[str] = set()
        self.expected_codes: set[int] = set()
        self.unstarted = 0
        self.unexpected: list[str] = []
        """Workers that ended in a way nobody asked for."""
        self.proxy: Proxy | None = None

    async def __aenter__(self) -> Rig:
        async with AsyncExitStack() as stack:
            self.server = await asyncio.to_thread(Server, self.directory, aof=True)
            stack.callback(self.server.kill)
            self.raw = redis.Redis.from_url(self.server.url, protocol=2, decode_responses=True, socket_timeout=20)
            stack.callback(self.raw.close)
            url = self.server.url
            if self._proxied:
                self.proxy = Proxy(self.server.port, self.seed)
                url = f"redis://127.0.0.1:{await self.proxy.start()}/0"
                stack.push_async_callback(self.proxy.close)
            self.fleet = await stack.enter_async_context(Fleet(self.directory, url, **self._settings))
            self.fleet.on_end = self._ended
            self.app = App(settings=Settings(redis_url=self.server.url))
            await stack.enter_async_context(self.app)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.__aexit__(*exc)
        self._enqueued.close()
        self._faults.close()

    # -- producing

    async def put(self, *payloads: Payload, **options: Any) -> list[str]:
        """Enqueue; what is acknowledged is written down, and so is what only may have been."""
        jobs = [self.app.job(payload, **options) for payload in payloads]
        try:
            answers = await self.app.enqueue_many(jobs)
        except PublishUncertain:
            for job in jobs:
                self._enqueued.add(what="uncertain", job=job.id)
            raise
        for answer in answers:
            self._enqueued.add(what="acknowledged", job=answer.id)
        return [answer.id for answer in answers]

    async def produce(self, stop: asyncio.Event, rate: float) -> None:
        """A mixture of jobs, at ``rate`` a second, until stopped. A server that is down is waited for."""
        while not stop.is_set():
            payloads = [self._any_payload() for _ in range(self.random.randint(1, 10))]
            options: dict[str, Any] = {"priority": self.random.choice(("high", "normal", "low"))}
            if self.random.random() < 0.1:
                options["delay"] = self.random.uniform(0.05, 1.0)
            with suppress(StreamworkerError):
                await self.put(*payloads, **options)
            with suppress(TimeoutError):
                async with asyncio.timeout(len(payloads) / rate):
                    await stop.wait()

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
        """SIGKILL, and start again with its append-only file."""
        began = time.monotonic()
        await asyncio.to_thread(self.server.kill)
        await asyncio.sleep(down)
        await asyncio.to_thread(self.server.start)
        self.fault("server restart" if down < self.lease else "outage", began=began, tail=2 * self.lease + 2)

    # -- the end

    def backlog(self) -> int:
        return int(sum(self.raw.xlen(stream) for stream in STREAMS) + self.raw.zcard(f"{BASE}:due"))

    def running(self) -> int:
        """Jobs that workers hold."""
        found = 0
        for stream in STREAMS:
            with suppress(redis.ResponseError):
                found += self.raw.xpending(stream, GROUP)["pending"]
        return found

    def holder(self) -> Worker | None:
        """A worker that holds jobs right now."""
        for stream in STREAMS:
            for pending in self.raw.xpending_range(stream, GROUP, "-", "+", 1):
                return next(
                    (each for each in self.fleet.alive if pending["consumer"].startswith(f"{each.name}-")), None
                )
        return None

    def runs_of(self, job: str) -> int:
        """How often a job was started."""
        return sum(line["job"] == job and line["what"] == "started" for line in read(self.directory / "runs"))

    def done_lines(self) -> int:
        """How many runs ended well so far."""
        path = self.directory / "runs"
        return path.read_text().count('"finished"') if path.exists() else 0

    def held_back(self) -> int:
        """Jobs whose endings the server has no room for, and those that come to it too."""
        return self.running()

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
        script = (
            "local out = {} for _, key in ipairs(KEYS) do local kind = redis.call('TYPE', key).ok "
            "if kind == 'stream' then for _, e in ipairs(redis.call('XRANGE', key, '-', '+')) do out[#out + 1] = e[2][2] end "
            "elseif kind == 'hash' and string.find(key, 'bodies') then for _, v in ipairs(redis.call('HVALS', key)) do out[#out + 1] = v end end "
            "redis.call('DEL', key) end return out"
        )
        for body in self.raw.eval(script, len(keys), *keys):
            with suppress(ValueError):
                self.destroyed.add(json.loads(body)["id"])
        self.fault("keys deleted", began=began, tail=3 * self.lease)

    def flush(self) -> None:
        """FLUSHALL; the witness list survives, or the checker would be blind for what was before."""
        began = time.monotonic()
        script = (
            "local kept = redis.call('LRANGE', KEYS[1], 0, -1) local out = {} "
            "for _, key in ipairs(redis.call('KEYS', '*')) do local kind = redis.call('TYPE', key).ok "
            "if kind == 'stream' then for _, e in ipairs(redis.call('XRANGE', key, '-', '+')) do out[#out + 1] = e[2][2] end "
            "elseif kind == 'hash' and string.find(key, 'bodies') then "
            "for _, v in ipairs(redis.call('HVALS', key)) do out[#out + 1] = v end end end "
            "redis.call('FLUSHALL') for _, line in ipairs(kept) do redis.call('RPUSH', KEYS[1], line) end return out"
        )
        for body in self.raw.eval(script, 1, witness.LIST):
            with suppress(ValueError):
                self.destroyed.add(json.loads(body)["id"])
        self.fault("flushall", began=began, tail=3 * self.lease)

    def open_gate(self, name: str) -> None:
        """Let `Gated` jobs of this gate end."""
        (self.directory / f"gate-{name}").touch()

    def consumers(self) -> set[str]:
        found: set[str] = set()
        for stream in STREAMS:
            with suppress(redis.ResponseError):
                found |= {info["name"] for info in self.raw.xinfo_consumers(stream, GROUP)}
        return found

    async def all_ready(self) -> None:
        """Whoever lives has begun to work."""
        await self.until(lambda: all(worker.said("worker_ready") for worker in self.fleet.alive), 30, "ready workers")

    async def until(self, condition: Callable[[], Any], timeout: float, what: str) -> Any:
        """Wait for a condition of the server or the logs; on time-out tell what the server holds."""
        deadline = time.monotonic() + timeout
        while not (answer := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come true in {timeout} s (seed {self.seed}): {self.state()}")
            await asyncio.sleep(0.02)
        return answer

    def state(self) -> str:
        """What the server holds, for a failing run."""
        lines = []
        for stream in STREAMS:
            with suppress(redis.RedisError):
                pending = self.raw.xpending_range(stream, GROUP, "-", "+", 5)
                lines.append(f"{stream}: {self.raw.xlen(stream)} entries, pending {pending}")
        with suppress(redis.RedisError):
            lines.append(f"due {self.raw.zcard(f'{BASE}:due')}, consumers {self.consumers()}")
        lines.append(f"alive {[worker.name for worker in self.fleet.alive]}")
        return "; ".join(lines)

    async def at_rest(self, timeout: float = 60.0) -> None:
        """All jobs are ended."""
        await self.until(lambda: self.backlog() == 0, timeout, "an empty backlog")

    async def finish(self, *, timeout: float = 60.0, workers: int = 2) -> Verdict:
        """No more faults: come to rest, stop everybody, and judge."""
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self._keep(workers))  # a poison may not have taken its last worker yet
            await self.at_rest(timeout)
            keeping.cancel()

        def tidied() -> bool:
            names = [f"{worker.name}-" for worker in self.fleet.workers if worker.alive]
            return all(consumer.startswith(tuple(names)) for consumer in self.consumers())

        await self.until(tidied, 10 * self.lease + 20, "the names of dead workers being gone")
        await self.all_ready()
        stopping = [worker for worker in self.fleet.workers if worker.alive]
        for worker in stopping:
            worker.terminate()
        codes = [await worker.wait() for worker in stopping]
        verdict = check(
            self.directory,
            self.raw.lrange(witness.LIST, 0, -1),
            self.dead_ids(),
            max_deliveries=self.max_deliveries,
            destroyed=self.destroyed,
        )
        for each in self.unexpected:
            verdict.complain("exit", each)
        if any(codes):
            verdict.complain("rest", f"workers ended with {codes}")
        self._leftovers(verdict)
        return verdict

    async def _keep(self, workers: int) -> None:
        while True:
            while len(self.fleet.alive) < workers:
                await self.fleet.start()
            await asyncio.sleep(0.05)

    def dead_ids(self) -> list[str]:
        return [fields["id"] or json.loads(fields["job"])["id"] for _, fields in self.raw.xrange(f"{BASE}:dead")]

    def _leftovers(self, verdict: Verdict) -> None:
        for stream in STREAMS:
            if self.raw.xlen(stream) or (self.raw.exists(stream) and self.raw.xpending(stream, GROUP)["pending"]):
                verdict.complain("rest", f"{stream} still holds something: {self.state()}")
        if self.consumers():
            verdict.complain("rest", f"consumers are left over: {self.consumers()}")
        expected = {*STREAMS, f"{BASE}:meta", f"{BASE}:dead", witness.LIST}
        alive = [key for key in self.raw.keys("*") if key not in expected and not self._expires_soon(key)]
        if alive:
            verdict.complain("rest", f"keys are left over: {alive}")
        for worker in self.fleet.workers:
            said = worker.text.replace('"exception":', "")
            if "Traceback" in said.replace("Traceback (most recent call last):\\n", ""):
                verdict.complain("rest", f"{worker.name} printed a traceback: {said[said.index('Traceback') :][:1500]}")

    def _expires_soon(self, key: str) -> bool:
        """The heartbeat of a killed worker may still be running down, and of nobody else."""
        killed = [f"streamworker:worker:{worker.name}-" for worker in self.fleet.workers if (worker.code or 0) != 0]
        return key.startswith(tuple(killed)) and self.raw.pttl(key) <= self.lease * 1000


def fine(verdict: Verdict, seed: int) -> Verdict:
    """Fail with everything the checker found, and the seed that replays it."""
    assert not verdict.violations, f"seed {seed}, {len(verdict.violations)} violations:\n" + "\n".join(
        verdict.violations[:20]
    )
    return verdict
