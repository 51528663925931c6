"""Chooses faults by a seed and does them to a running rig, a few at a time; everything it begins it also ends."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from typing import Any

import redis

from streamworker import StreamworkerError
from tests.crash.app import Poison
from tests.crash.failpoints import POINTS
from tests.crash.fleet import Worker
from tests.crash.rig import Rig

WORKERS_ONLY = {
    "kill": 10,
    "freeze": 3,
    "short freeze": 2,
    "terminate": 2,
    "terminate twice": 1,
    "failpoint": 3,
    "poison": 1,
}
ALL = {
    **WORKERS_ONLY,
    "server restart": 1, "outage": 0.5, "server freeze": 0.5, "client kill": 2, "script flush": 1, "client pause": 1, "reset": 2,
    "delay": 1, "drop": 1, "truncate": 1, "black hole": 0.5, "out of memory": 0.7, "group deleted": 0.7,
}  # fmt: skip


class Nemesis:
    """Faults at random times.

    Args:
        rig: whom they befall.
        workers: how many workers to keep alive.
        every: mean seconds between faults.
        kinds: weight of each kind; ``None`` for all.
    """

    def __init__(self, rig: Rig, *, workers: int, every: float, kinds: dict[str, float] | None = None) -> None:
        self._rig = rig
        # A generator of its own: what producers draw must not shift the schedule.
        self._random = random.Random(rig.seed + 1)
        self._workers = workers
        self._every = every
        self._kinds = kinds or ALL
        self._running: set[asyncio.Task[None]] = set()
        self._server_busy = asyncio.Lock()
        self._ceased = asyncio.Event()

    async def rage(self) -> None:
        """Faults until `cease`."""
        names, weights = list(self._kinds), list(self._kinds.values())
        while not self._ceased.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._random.expovariate(1 / self._every)):
                    await self._ceased.wait()
            (what,) = self._random.choices(names, weights)
            dice = self._random.random()
            if self._ceased.is_set():
                break
            if what in WORKERS_ONLY and not self._enough():
                what = ""  # nobody is left who could recover anything: that would measure how fast processes start
            task = asyncio.create_task(self._do(what, dice))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            for _ in range(self._workers - len(self._rig.fleet.alive)):
                await self._rig.fleet.start()

    async def cease(self) -> None:
        """No new faults; waits for those that last."""
        self._ceased.set()
        while self._running:
            await asyncio.gather(*self._running)

    def _enough(self) -> bool:
        """Half of the workers are at work."""
        return sum(worker.ready for worker in self._rig.fleet.alive) > self._workers // 2

    def _victim(self) -> Worker | None:
        able = [worker for worker in self._rig.fleet.alive if not worker.stopped]
        return able[int(self._random.random() * len(able))] if able else None

    async def _do(self, what: str, dice: float) -> None:
        rig, victim = self._rig, self._victim()
        match what:
            case "kill" if victim is not None:
                rig.kill(victim)
            case "freeze" if victim is not None:
                await rig.freeze(victim, rig.lease * (1.2 + dice))
            case "short freeze" if victim is not None:
                await rig.freeze(victim, rig.lease * 0.5 * dice)
            case "terminate" if victim is not None:
                rig.terminate(victim)
            case "terminate twice" if victim is not None:
                rig.terminate(victim)
                await asyncio.sleep(dice * 0.3)
                victim.terminate()
            case "failpoint":
                await self._failpoint(dice)
            case "poison":
                await self._poison()
            case "" | "kill" | "freeze" | "short freeze" | "terminate" | "terminate twice":
                pass
            case _:
                async with self._server_busy:  # one at a time, or nobody could tell what came of what
                    await self._to_server(what, dice)

    async def _failpoint(self, dice: float) -> None:
        point = POINTS[int(dice * len(POINTS))]
        if point in ("draining", "leaving"):
            point = "settling"
        worker = await self._rig.fleet.start(at=f"{point}:{1 + int(dice * 97) % 5}")
        with suppress(TimeoutError):
            await worker.wait(20)
            return
        self._rig.terminate(worker)

    async def _poison(self) -> None:
        with suppress(StreamworkerError):
            await self._rig.put(Poison())

    async def _to_server(self, what: str, dice: float) -> None:
        rig, proxy, began = self._rig, self._rig.proxy, time.monotonic()
        lasting = rig.lease * (0.2 + dice)
        match what:
            case "server restart":
                await rig.restart_server()
                return
            case "outage":
                await rig.restart_server(rig.lease * (1 + dice))
                return
            case "server freeze":
                rig.server.pause()
                await asyncio.sleep(rig.lease * 1.5 * dice)
                rig.server.resume()
            case "client kill":
                for _ in range(5):
                    self._admin("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                    await asyncio.sleep(0.05)
            case "script flush":
                self._admin("SCRIPT", "FLUSH")
            case "client pause":
                self._admin("CLIENT", "PAUSE", int(lasting * 1000), "WRITE" if dice < 0.5 else "ALL")
                await asyncio.sleep(lasting)
            case "out of memory":
                self._admin("CONFIG", "SET", "maxmemory", 1)
                await asyncio.sleep(lasting)
                self._admin("CONFIG", "SET", "maxmemory", 0)
            case "group deleted":
                with suppress(redis.RedisError):
                    rig.ground.forget_groups(rig.ground.places[int(dice * 3)])
            case "reset" if proxy is not None:
                proxy.reset_all()
            case _ if proxy is not None:
                setattr(proxy, what, dice * 0.3) if what != "black hole" else proxy.swallow()
                await asyncio.sleep(lasting)
                proxy.calm()
            case _:
                return
        rig.fault(what, began=began, tail=2 * rig.lease + 6)

    def _admin(self, *command: Any) -> None:
        with suppress(redis.RedisError):
            self._rig.raw.execute_command(*command)
