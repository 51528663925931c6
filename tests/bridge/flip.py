"""A live fleet changes its mode, there and back, while legacy producers push: ``python -m tests.bridge.flip --minutes 5``.

What was acknowledged to a producer must run to its end; whatever runs twice must be explained by a worker that was killed
while it ran. Jobs fail, snooze, wait for their time and enqueue others across the change.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from tests.bridge.nursery import Nursery
from tests.conftest import Server
from tests.forkserver import Forked

ROOT = Path(__file__).parents[2]
LISTS = ("queue:q:high", "queue:q", "queue:q:low")
STREAMS = ("stream:{q}:high", "stream:{q}", "stream:{q}:low")
OWN_ENDS = {"ValueError", "Snooze"}
"""Ends of a run after which its job goes on by its own rules, with another hop."""


class Producer(threading.Thread):
    """Pushes ``rate`` jobs a second with a plain client, a few in each round trip."""

    def __init__(self, server: Server, rate: float, seed: int, later: float) -> None:
        super().__init__(daemon=True)
        self._server, self._rate, self._random, self._later = server, rate, random.Random(seed), later
        self._ended = threading.Event()
        self.acknowledged: list[int] = []
        self.children: list[int] = []
        self.elapsed = 0.0

    def stop(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join(30)

    def run(self) -> None:
        number, began = 0, time.monotonic()
        with self._server.client() as client:
            while not self._ended.is_set():
                due = int((time.monotonic() - began) * self._rate) - number
                if due <= 0:
                    self._ended.wait(0.002)
                    continue
                first = number + 1
                with client.pipeline(transaction=False) as pipe:
                    for _ in range(min(due, 100)):
                        number += 1
                        pipe.lpush(self._random.choice(LISTS), self._document(number))
                    pipe.execute()
                self.acknowledged += range(first, number + 1)
        self.elapsed = time.monotonic() - began

    def _document(self, number: int) -> str:
        dice = self._random.random()
        payload: dict[str, Any] = {"n": number, "seconds": self._random.choice((0.0, 0.0, 0.002, 0.02))}
        document: dict[str, Any] = {"payload": payload}
        if dice < 0.02:
            payload["fails"] = self._random.randint(1, 2)
        elif dice < 0.04:
            payload["snoozes"] = self._random.randint(1, 2)
        elif dice < 0.06:
            payload["child"] = True
            self.children.append(-number)
        elif dice < 0.08:
            later = time.time() + self._random.uniform(0.1, self._later)
            document["run_at"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(later)) + f"{later % 1:.3f}"[1:] + "Z"
        elif dice < 0.081:
            payload["seconds"] = 1.0
        if self._random.random() < 0.5:
            document |= {"id": f"job-{number}", "kind": "work"}
        return json.dumps(document)


class Member:
    """One worker of the fleet."""

    def __init__(self, process: Forked, mode: str, log: Path) -> None:
        self.process, self.mode, self.log = process, mode, log
        self.killed: float | None = None

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def ready(self) -> bool:
        return '"worker_ready"' in self.text

    @property
    def worker_id(self) -> str:
        line = next((line for line in self.text.splitlines() if '"worker_starting"' in line), '{"worker_id": ""}')
        return str(json.loads(line)["worker_id"])


class Flip:
    """A server, a fleet and a bridge.

    Args:
        directory: of logs and history.
        workers: how many.
        rate: jobs a second that producers push.
        lease: the workers' lease.
        seed: of everything that is random.
        later: most seconds for which producers delay a job.
    """

    def __init__(
        self, directory: Path, *, workers: int, rate: float, lease: float, seed: int, later: float = 3.0
    ) -> None:
        self.directory, self.lease, self.seed = directory, lease, seed
        self.server = Server(directory)
        self.raw = redis.Redis.from_url(self.server.url, protocol=2, decode_responses=True)
        self.producer = Producer(self.server, rate, seed, later)
        self.count = workers
        self.members: list[Member] = []
        self.fleet: list[Member] = []
        self.nursery = Nursery(
            REDIS_URL=self.server.url,
            FLIP_RUNS=str(directory / "runs"),
            STREAMWORKER_APP="tests.bridge.flip_app:app",
            STREAMWORKER_CONCURRENCY="50",
            STREAMWORKER_GRACE="5",
            STREAMWORKER_LEASE=str(lease),
            STREAMWORKER_LOG_FORMAT="json",
        )
        self.bridge: Forked | None = None
        self.bridges = self.bridge_kills = 0
        self.violations: list[str] = []
        self._random = random.Random(seed + 1)
        self.mode, self.kept = "list", 0

    async def __aenter__(self) -> Flip:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.producer.stop()
        self.nursery.__exit__()
        self.raw.close()
        self.server.kill()

    # -- the fleet

    async def start(self, mode: str) -> None:
        """A worker that is ready, or was killed before it was."""
        log = self.directory / f"worker{len(self.members)}.log"
        process = self.nursery.start("worker", log=log, STREAMWORKER_MODE=mode)
        member = Member(process, mode, log)
        self.members.append(member)
        await until(lambda: member.ready or process.poll() is not None, 60, "a ready worker", lambda: member.text)
        if process.poll() is None:
            self.fleet.append(member)
        else:
            self.violations.append(f"{log.name} did not start: {member.text[-500:]}")

    async def stop(self, member: Member) -> None:
        """As an orchestrator does: SIGTERM, and wait."""
        self.fleet.remove(member)
        member.process.terminate()
        await until(
            lambda: member.process.poll() is not None, 60, f"the end of {member.log.name}", lambda: member.text[-500:]
        )
        if member.process.returncode != 0:
            self.violations.append(f"{member.log.name} ended with {member.process.returncode}: {member.text[-500:]}")

    async def roll(self, mode: str, *, keep: int = 0) -> None:
        """A rolling restart into another mode; ``keep`` of the old ones go on, or others in their place."""
        self.mode, self.kept = mode, keep
        while len(self.fleet) < self.count or len(self.old()) > keep:
            for old in self.old()[keep:][:1]:
                await self.stop(old)
                await self.start(mode)
            await asyncio.sleep(0.02)

    def old(self) -> list[Member]:
        return [member for member in self.fleet if member.mode != self.mode]

    async def start_bridge(self) -> None:
        log = self.directory / f"bridge{self.bridges}.log"
        self.bridges += 1
        bridge = self.nursery.start("bridge", log=log)
        await until(lambda: log.exists() and "bridge_ready" in log.read_text(), 60, "a ready bridge")
        self.bridge = bridge

    async def stop_bridge(self) -> None:
        bridge, self.bridge = self.bridge, None
        bridge.terminate()
        await until(lambda: bridge.poll() is not None, 30, "the end of the bridge")
        if bridge.returncode != 0:
            self.violations.append(f"the bridge ended with {bridge.returncode}")

    async def kill_some(self, every: float) -> None:
        """SIGKILL workers and bridges, and start others in their place; until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self._random.expovariate(1 / every))
                if self.bridge is not None and self._random.random() < 0.5:
                    bridge, self.bridge = self.bridge, None
                    bridge.kill()
                    bridge.wait()
                    self.bridge_kills += 1
                    await self.start_bridge()
                elif len(self.fleet) > 1:
                    victim = self._random.choice(self.fleet)
                    self.fleet.remove(victim)
                    victim.process.kill()
                    victim.process.wait()
                    victim.killed = time.monotonic()  # afterwards: until it was gone it went on starting jobs
                    mode = victim.mode if len(self.old()) < self.kept else self.mode
                    group.create_task(self.start(mode))

    # -- there and back

    async def to_streams(self) -> None:
        """docs/migration.md, "From lists to streams"."""
        await self.roll("stream", keep=self.count - 1)
        await self.start_bridge()
        await self.roll("stream")

    async def to_lists(self) -> None:
        """docs/migration.md, "Back to lists"."""
        await until(lambda: self.bridge is not None, 60, "a bridge to stop")
        await self.stop_bridge()
        await self.roll("list", keep=1)
        await until(lambda: not self.in_streams(), 60 + 10 * self.lease, "empty streams")
        await self.roll("list")
        while self.in_streams():  # the last one may have promoted a delayed job as it went
            log = self.directory / f"burst{len(list(self.directory.glob('burst*')))}.log"
            burst = self.nursery.start("worker", "--burst", log=log, STREAMWORKER_MODE="stream")
            await until(lambda burst=burst: burst.poll() is not None, 60, "the end of a burst")

    def in_streams(self) -> int:
        return int(sum(self.raw.xlen(stream) for stream in STREAMS))

    def backlog(self) -> int:
        """Jobs that are anywhere."""
        lists = sum(self.raw.llen(name) for name in LISTS)
        return int(self.in_streams() + lists + self.raw.zcard("stream:{q}:due") + self.raw.zcard("stream:{q}:leases"))

    # -- the end

    async def finish(self) -> Counter[str]:
        """No more jobs: come to rest, stop everybody, and judge."""
        self.producer.stop()
        await until(lambda: self.backlog() == 0, 60 + 10 * self.lease, "no jobs anywhere", self.state)
        for member in list(self.fleet):
            await self.stop(member)
        tally = judge(self)
        left = set(self.raw.keys("*")) - {"stream:{q}:meta", "stream:{q}:ids", *STREAMS}
        left -= {key for key in left if key.startswith("stream:{q}:key:child-")}
        left -= {
            key for key in left if key.startswith(("stream:history", "stream:{q}:history:"))
        }  # kept for sixty days
        if left := {key for key in left if not key.startswith("streamworker:worker:")}:
            self.violations.append(f"keys are left over: {sorted(left)}")
        for member in self.members:
            if "Traceback" in member.text:
                self.violations.append(f"{member.log.name} printed a traceback")
        return tally

    def state(self) -> str:
        return f"{ {key: self.raw.type(key) for key in self.raw.keys('*') if ':key:' not in key} } backlog {self.backlog()}"


async def until(condition: Any, timeout: float, what: str, state: Any = str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: did not come true in {timeout:.0f} s: {state()}"
        await asyncio.sleep(0.02)


def judge(flip: Flip) -> Counter[str]:
    """Nothing lost; whatever ran again had a reason that the history tells."""
    lines = [json.loads(line) for line in (flip.directory / "runs").read_text().splitlines()]
    killed = {member.worker_id: member.killed for member in flip.members if member.killed is not None}
    runs: dict[int, list[dict[str, Any]]] = defaultdict(list)
    open_: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        key = (line["n"], line["worker"], line["hop"], line["delivery"])
        if line["what"] == "started":
            run = open_[key] = {**line, "end": None}
            runs[line["n"]].append(run)
        else:
            open_[key]["end"] = line["what"]
    tally = Counter({"acknowledged": len(flip.producer.acknowledged), "runs": sum(map(len, runs.values()))})
    children = [n for n in flip.producer.children if -n in runs and any(run["end"] == "finished" for run in runs[-n])]
    for n in [*flip.producer.acknowledged, *children]:
        history = sorted(runs.get(n, []), key=lambda run: run["mono"])
        if not any(run["end"] == "finished" for run in history):
            tally["lost"] += 1
            flip.violations.append(f"job {n} is lost; its runs: {history}")
        modes = {run["mode"] for run in history}
        tally["in both modes"] += len(modes) == 2
        for mode in modes:
            tally[f"ran in {mode} mode"] += 1
        for before, after in itertools.pairwise(history):
            if before["end"] in OWN_ENDS and after["hop"] > before["hop"]:
                continue
            moment = killed.get(before["worker"])
            if before["end"] == "cancelled":
                tally["handed back"] += 1
            elif moment is not None and before["mono"] <= moment <= after["mono"]:
                tally["repeated because of a kill"] += 1
            else:
                flip.violations.append(f"job {n} ran again for no reason: {history}")
        if len({run["id"] for run in history}) > 1:
            flip.violations.append(f"job {n} changed its id: {history}")
    return tally


async def play(flip: Flip, *, seconds: float = 0.0, dwell: float = 1.0, kill_every: float = 0.0) -> Counter[str]:
    """Lists, streams and lists again: once, and on for so many seconds.

    Args:
        flip: what is played on.
        seconds: as above.
        dwell: seconds between two changes.
        kill_every: mean seconds between two SIGKILLs; 0 for none.
    """
    async with flip, asyncio.timeout(seconds + 300):
        for _ in range(flip.count):
            await flip.start("list")
        flip.producer.start()
        killing = asyncio.create_task(flip.kill_some(kill_every)) if kill_every else None
        deadline, flips = time.monotonic() + seconds, 0
        while flips == 0 or time.monotonic() < deadline:
            await asyncio.sleep(dwell)
            await flip.to_streams()
            await asyncio.sleep(dwell)
            await flip.to_lists()
            flips += 2
            if killing is not None and killing.done():
                killing.result()
        if killing is not None:
            killing.cancel()
            await until(lambda: len(flip.fleet) == flip.count or killing.done(), 30, "a whole fleet")
        tally = await flip.finish()
        tally["flips"], tally["kills of bridges"] = flips, flip.bridge_kills
        tally["kills of workers"] = sum(member.killed is not None for member in flip.members)
        tally["pushed a second"] = round(len(flip.producer.acknowledged) / flip.producer.elapsed)
        return tally


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="flip", description=str(__doc__).splitlines()[0])
    options.add_argument("--minutes", type=float, default=2.0)
    options.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--rate", type=float, default=1000.0, help="jobs a second")
    options.add_argument("--lease", type=float, default=3.0)
    options.add_argument("--kill-every", type=float, default=0.0, help="mean seconds between SIGKILLs; 0 for none")
    chosen = options.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="streamworker-flip-"))
    flip = Flip(directory, workers=chosen.workers, rate=chosen.rate, lease=chosen.lease, seed=chosen.seed)
    tally = asyncio.run(play(flip, seconds=chosen.minutes * 60, dwell=5, kill_every=chosen.kill_every))
    print(f"flip: seed {chosen.seed}")
    for name, count in sorted(tally.items()):
        print(f"{name:<28}{count:>10,}")
    print(f"{'lost':<28}{tally['lost']:>10,}\n{'violations':<28}{len(flip.violations):>10,}")
    for violation in flip.violations[:20]:
        print(f"violation: {violation}")
    if flip.violations:
        print(f"history and logs: {directory}")
        return 1
    shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
