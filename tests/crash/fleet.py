"""Worker processes out of the nursery, each with its log, its exit code and what was done to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.crash.ground import MODE, PARTITIONS

ROOT = Path(__file__).parents[2]


def clean_environment() -> dict[str, str]:
    """Ours without settings of whoever runs the tests."""
    skip = ("STREAMWORKER_", "REDIS", "DATABASE", "CRASH_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(skip)}
    parts = (
        {"CRASH_PARTITIONS": str(PARTITIONS), "STREAMWORKER_PARTITIONS": f"q={PARTITIONS}"} if PARTITIONS > 1 else {}
    )
    return {**kept, "CRASH_MODE": MODE, "STREAMWORKER_MODE": MODE, **parts}


class Worker:
    """One worker process."""

    def __init__(self, name: str, log: Path, pid: int, at: str = "") -> None:
        self.name, self.log, self.pid, self.at = name, log, pid, at
        self.ended = asyncio.Event()
        self.code: int | None = None
        self.stopped = False
        self.told = False
        self._ready = False

    @property
    def alive(self) -> bool:
        return self.code is None

    @property
    def ready(self) -> bool:
        """It has begun to work."""
        self._ready = self._ready or '"worker_ready"' in self.text
        return self._ready

    def signal(self, number: int) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.told = True
        self.signal(signal.SIGTERM)

    async def wait(self, timeout: float = 120.0) -> int:
        async with asyncio.timeout(timeout):
            await self.ended.wait()
        assert self.code is not None
        return self.code

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines() if line.startswith("{") and line.endswith("}")]

    def said(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each.get("event") == event]


class Fleet:
    """Starts workers and learns of their ends."""

    def __init__(self, directory: Path, url: str, **settings: Any) -> None:
        self._directory = directory
        self._url = url
        self._settings = settings
        self._births: asyncio.Queue[int] = asyncio.Queue()
        self._lock = asyncio.Lock()
        self.workers: list[Worker] = []
        self.on_end: Callable[[Worker], None] = lambda _: None

    @property
    def alive(self) -> list[Worker]:
        """Workers that run and were not told to stop."""
        return [worker for worker in self.workers if worker.alive and not worker.told]

    async def __aenter__(self) -> Fleet:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.crash.nursery",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
            env={**clean_environment(), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
        self._process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(10):
                await self._process.wait()
        await self._listener

    async def start(self, at: str = "", *, fresh: bool = False, **settings: Any) -> Worker:
        """Start one worker.

        Args:
            at: names a failpoint.
            fresh: in a Python of its own, as from a shell: half a second slower than out of the nursery.
            settings: more settings.
        """
        assert self._process.stdin is not None
        async with self._lock:
            name = f"w{len(self.workers)}"
            log = self._directory / f"{name}.log"
            url = settings.pop("url", self._url)
            chosen = {
                "QUEUES": "q",
                "WORKER_ID": name,
                "LOG_LEVEL": "info",
                "LOG_FORMAT": "json",
                **self._settings,
                **settings,
            }
            environment = {f"STREAMWORKER_{key}": str(value) for key, value in chosen.items()}
            environment |= {"REDIS_URL": url, "CRASH_DIR": str(self._directory), "CRASH_AT": at}
            environment |= {"PYTHONPATH": str(ROOT)}
            # Some always are, so that what is killed is what users start.
            fresh = fresh or len(self.workers) % 10 == 9
            order = {"env": environment, "log": str(log), "uvloop": len(self.workers) % 2 == 0, "fresh": fresh}
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            async with asyncio.timeout(120):
                worker = Worker(name, log, await self._births.get(), at)
            self.workers.append(worker)
            return worker

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        early: dict[int, int] = {}
        while line := await self._process.stdout.readline():
            told = json.loads(line)
            if "born" in told:
                self._births.put_nowait(told["born"])
                continue
            early[told["dead"]] = told["code"]
            for worker in self.workers:
                if worker.alive and worker.pid in early:
                    self._bury(worker, early.pop(worker.pid))

    def _bury(self, worker: Worker, code: int) -> None:
        worker.code = code
        self.on_end(worker)
        worker.ended.set()
