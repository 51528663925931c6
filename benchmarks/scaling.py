"""Does the scaling signal hold a target wait, and at what cost, beside scaling by the length of the queue?

``./dev bench-scaling [SHAPE …] [--json FILE]``. A simulation: the loads are data (``benchmarks/loads.json``: jobs that
came, step by step), the signal is the one of `streamworker.worker.scale`, and the autoscaler follows the rules of
Kubernetes' HorizontalPodAutoscaler and of KEDA with the manifest of ``deploy/kubernetes/keda``. ``--record`` draws the
loads anew, from seeds.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks import report
from benchmarks.measure import Row
from streamworker.job import SOON
from streamworker.worker.scale import QueueSample, ScalingSignal

LOADS = Path(__file__).parent / "loads.json"
SLOTS = 10
"""Of a worker."""
MOST = 40
"""Workers, at most."""
START = 20
"""Seconds from the decision until a worker claims."""
WAIT = 60.0
"""The target wait, in seconds."""
LOOK = 5
"""Seconds between two samples of the queue."""
SYNC = 15
"""Seconds between two decisions of the autoscaler."""
POINTS = 120
"""Of a curve."""


class Load(msgspec.Struct, frozen=True):
    """A recorded load.

    Attributes:
        step: seconds of each count.
        run_time: mean seconds of a job; run times are exponential.
        counts: jobs that came.
        words: what it is.
    """

    step: int
    run_time: float
    counts: list[int]
    words: str


class Curve(msgspec.Struct, frozen=True):
    """What is drawn of one run: workers, and the longest wait, over equal parts of the time."""

    shape: str
    scaler: str
    seconds: int
    workers: list[float]
    waits: list[float]


class Autoscaler:
    """How many workers there are, by a metric of which each should have ``target``."""

    def __init__(self, target: float, down: int) -> None:
        self._target, self._down = target, down
        self.workers = 0
        self.changes = 0
        self._starting: deque[tuple[int, int]] = deque()
        self._wished: deque[tuple[int, int]] = deque()
        self._active_at = -down

    def decide(self, at: int, metric: float) -> None:
        if metric > 0:
            self._active_at = at
        wanted = min(MOST, math.ceil(metric / self._target - 1e-9))
        if self.workers and abs(metric / (self._target * self.workers) - 1) <= 0.1:
            wanted = self.workers  # the tolerance of the HPA
        self._wished.append((at, wanted))
        while self._wished[0][0] < at - self._down:
            self._wished.popleft()
        if wanted > self.workers:
            new = min(wanted, max(2 * self.workers, self.workers + 4))  # 100 % or 4 pods
        else:
            new = max(min(self.workers, max(number for _, number in self._wished)), self.workers // 2)
            new = max(new, 1) if self.workers and at - self._active_at < self._down else new
        if new != self.workers:
            self.changes += 1
            if new > self.workers:
                self._starting.append((at + START, new - self.workers))
            self.workers = new

    def ready(self, at: int) -> int:
        """Workers that claim. Those that start are the first to go."""
        while self._starting and self._starting[0][0] <= at:
            self._starting.popleft()
        return max(0, self.workers - sum(number for _, number in self._starting))


class Queue:
    """Jobs that wait and run; the first to come is the first to start."""

    def __init__(self, run_time: float, seed: int) -> None:
        self._random, self._rate = random.Random(seed), 1 / run_time
        self.waiting: deque[float] = deque()
        self.ends: list[float] = []
        self.departed = 0
        self.waits: list[float] = []

    def second(self, at: int, came: int, slots: int) -> None:
        """One second: jobs come, end and start."""
        self._start(at, slots)
        for moment in sorted(at + self._random.random() for _ in range(came)):
            self._end(moment, slots)
            self.waiting.append(moment)
            self._start(moment, slots)
        self._end(at + 1, slots)

    def _end(self, until: float, slots: int) -> None:
        while self.ends and self.ends[0] <= until:
            moment = heapq.heappop(self.ends)
            self.departed += 1
            self._start(moment, slots)

    def _start(self, at: float, slots: int) -> None:
        while self.waiting and len(self.ends) < slots:
            self.waits.append(at - self.waiting.popleft())
            heapq.heappush(self.ends, at + self._random.expovariate(self._rate))


class Scaler(NamedTuple):
    """An autoscaler's settings.

    Attributes:
        target: of the metric for each worker.
        down: seconds for which a smaller number has to last (stabilizationWindowSeconds, cooldownPeriod).
        metric: by the signal, and the number of jobs.
    """

    target: float
    down: int
    metric: Callable[[ScalingSignal, int], float]


SCALERS = {
    "slots": Scaler(SLOTS, 15, lambda signal, _: signal.slots(WAIT)),  # the signal waits itself
    "length, one a slot": Scaler(SLOTS, 120, lambda _, jobs: jobs),
    "length, two a slot": Scaler(2 * SLOTS, 120, lambda _, jobs: jobs),
}


def simulate(shape: str, load: Load, scaler: str) -> tuple[list[Row], Curve]:
    """One load under one autoscaler."""
    target, down, metric = SCALERS[scaler]
    queue, autoscaler, signal = Queue(load.run_time, 11), Autoscaler(target, down), ScalingSignal(SOON)
    spread = random.Random(7)
    seconds = load.step * len(load.counts)
    workers, waits, seen, bucket = [0.0] * POINTS, [0.0] * POINTS, 0, seconds / POINTS
    for at in range(seconds):
        if at % load.step == 0:
            due = [0] * load.step
            for _ in range(load.counts[at // load.step]):
                due[spread.randrange(load.step)] += 1
        if at % LOOK == 0:
            oldest = at - queue.waiting[0] if queue.waiting else 0.0
            signal.add(QueueSample(at, len(queue.waiting), len(queue.ends), departed=queue.departed, oldest=oldest))
        active = autoscaler.workers > 0 or at % LOOK == 0  # KEDA itself goes from none to one
        if active and at % (SYNC if autoscaler.workers else LOOK) == 0:
            autoscaler.decide(at, metric(signal, len(queue.waiting) + len(queue.ends)))
        queue.second(at, due[at % load.step], autoscaler.ready(at) * SLOTS)
        part = int(at / bucket)
        workers[part] += autoscaler.workers / bucket
        waits[part] = max(waits[part], *queue.waits[seen:], at - queue.waiting[0] if queue.waiting else 0.0)
        seen = len(queue.waits)
    started = sorted(queue.waits + [seconds - each for each in queue.waiting])
    figures = {
        "p50": (started[len(started) // 2], "s"),
        "p99": (started[len(started) * 99 // 100], "s"),
        "in time": (100 * sum(each <= WAIT for each in started) / len(started), "%"),
        "worker-hours": (sum(workers) * bucket / 3600, "h"),
        "used": (100 * sum(load.counts) * load.run_time / (sum(workers) * bucket * SLOTS), "%"),
        "changes": (float(autoscaler.changes), ""),
    }
    rows = [
        Row(question=shape, what=f"{scaler}: {name}", unit=unit, values=[round(value, 2)])
        for name, (value, unit) in figures.items()
    ]
    return rows, Curve(shape, scaler, seconds, [round(n, 2) for n in workers], [round(n, 1) for n in waits])


def poisson(draw: random.Random, mean: float) -> int:
    """A Poisson number."""
    if mean > 50:
        return max(0, round(draw.gauss(mean, math.sqrt(mean))))
    number, chance, limit = 0, draw.random(), math.exp(-mean)
    while chance > limit:
        number, chance = number + 1, chance * draw.random()
    return number


def record() -> dict[str, Load]:
    """The five loads, from seeds."""
    draw = random.Random(23)
    hour = 360  # steps of 10 s

    def day(n: int) -> float:  # a night at 0.5/s, a morning's peak at 10/s, a smaller one in the afternoon
        at = n / 1440 * 24
        return 0.5 + 9.5 * math.exp(-(((at - 10) / 2) ** 2)) + 6 * math.exp(-(((at - 16) / 2.5) ** 2))

    bursts = {draw.randrange(4 * hour): draw.randrange(2_000, 8_000) for _ in range(8)}
    return {
        "steady": Load(10, 2.0, [poisson(draw, 300) for _ in range(4 * hour)], "30 jobs/s of 2 s, for four hours"),
        "daily": Load(60, 5.0, [poisson(draw, 60 * day(n)) for n in range(1440)], "a day: 0.5 to 10 jobs/s of 5 s"),
        "burst": Load(
            10, 0.2, [poisson(draw, 10) + bursts.get(n, 0) for n in range(4 * hour)],
            "1 job/s of 0.2 s, and eight times thousands at once",
        ),
        "ramp": Load(
            10, 4.0, [poisson(draw, 10 * (1 + 59 * n / (3 * hour)) if n < 3 * hour else 20) for n in range(4 * hour)],
            "1 to 60 jobs/s of 4 s within three hours, then 2",
        ),
        "on/off": Load(
            10, 10.0, [poisson(draw, 100) if n % (hour // 2) < 60 else 0 for n in range(4 * hour)],
            "ten minutes of 10 jobs/s of 10 s, twenty minutes of nothing",
        ),
    }  # fmt: skip


def main() -> int:
    """Simulate, and tell."""
    parser = argparse.ArgumentParser(prog="./dev bench-scaling", description=__doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE")
    parser.add_argument("--json", type=Path, help="write figures and curves to this file")
    parser.add_argument("--record", action="store_true", help="draw the loads anew")
    arguments = parser.parse_args()
    if arguments.record:
        LOADS.write_bytes(msgspec.json.encode(record()).replace(b'},"', b'},\n"') + b"\n")
    loads = msgspec.json.decode(LOADS.read_bytes(), type=dict[str, Load])
    rows, curves = [], []
    for shape in arguments.shapes or loads:
        for scaler in SCALERS:
            found, curve = simulate(shape, loads[shape], scaler)
            rows += found
            curves.append(curve)
    report.table(rows)
    if arguments.json:
        report.as_json(rows, arguments.json, command="./dev bench-scaling")
        document = {**msgspec.json.decode(arguments.json.read_bytes()), "curves": curves, "wait": WAIT}
        document["loads"] = {shape: load.words for shape, load in loads.items()}
        arguments.json.write_bytes(msgspec.json.encode(document).replace(b"},{", b"},\n{") + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
