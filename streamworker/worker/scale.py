"""Scaling signal of a queue: how many slots clear its backlog within a target wait. Pure: no I/O, no clock.

It is calculated from samples of the queue alone, so that jobs pay nothing for it. Jobs that come are the growth of the
queue plus those that left; the mean run time follows by Little's law: the slot-seconds that ran, by the jobs that left.

The rules, in their order:

1. Jobs that come hold ``rate * run time`` slots at any time; a backlog of B jobs is cleared within a time by
   ``B * run time / time`` more. The time is what the oldest job has left of the target wait, or half of it if less is
   left.
2. No more slots than there will be jobs: those that are there, those that are due soon, those that come meanwhile.
3. No fewer than jobs are running: a worker that goes would hand them back.
4. More slots are wanted at once. Fewer are wanted if none of the last `CALM` seconds wanted more, and a tenth is
   spared.
5. One at least, unless for `CALM` seconds nothing was ready, running or due soon, and nothing came.
6. A paused queue wants what it runs.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import msgspec

CALM: Final = 120.0
"""Seconds a smaller need has to last until fewer slots are wanted."""
KEPT: Final = 600.0
"""Seconds of samples that are looked at for an answer."""
RATE: Final = 60.0
"""Seconds over which the rate of arrivals is taken."""
MEMORY: Final = 600.0
"""Busy seconds after which the run times of old jobs weigh a third."""
SPARED: Final = 0.9
"""Slots are given back if less than this part of them is needed."""
HASTE: Final = 0.5
"""Part of the target wait within which a backlog that has waited for too long is to be cleared."""
GUESS: Final = 1.0
"""Seconds that a job is assumed to run until one has ended; it weighs as much as one job."""
SURE: Final = 10.0
"""Jobs that ended, from which on their mean is trusted."""
_WAITS: Final = 16
"""Target waits whose answers are kept until the next sample."""


class QueueSample(msgspec.Struct, frozen=True):
    """A queue at one moment.

    Attributes:
        at: seconds of a clock that never goes back.
        ready: jobs that wait to be claimed.
        running: jobs that are claimed.
        soon: delayed jobs that are due within `streamworker.job.SOON`.
        departed: runs that ever ended, however they did; ``None`` where the server does not count them.
        paused: nothing is claimed.
        oldest: seconds that the oldest ready job has waited.
    """

    at: float
    ready: int
    running: int
    soon: int = 0
    departed: int | None = None
    paused: bool = False
    oldest: float = 0.0

    @property
    def jobs(self) -> int:
        """Ready and running ones."""
        return self.ready + self.running


class _Need(msgspec.Struct, frozen=True):
    """What a sample and the estimates of its time say.

    Attributes:
        sample: the sample.
        rate: jobs that come per second.
        run_time: seconds that a job runs; ``None`` where the server does not count jobs that left.
        came: jobs that came since the sample before.
        soon: seconds within which `QueueSample.soon` are due.
    """

    sample: QueueSample
    rate: float
    run_time: float | None
    came: float
    soon: float

    @property
    def busy(self) -> bool:
        """Whether there have to be workers."""
        seen = self.sample
        return bool(seen.running or (not seen.paused and (seen.ready or seen.soon or self.came)))

    def slots(self, wait: float) -> float:
        """Slots for this moment alone."""
        seen = self.sample
        if seen.paused:
            return seen.running
        if self.run_time is None:
            return seen.jobs + seen.soon
        rate = max(self.rate, seen.soon / self.soon)
        needed = (rate + seen.ready / max(wait - seen.oldest, wait * HASTE)) * self.run_time
        most = seen.jobs + seen.soon + math.ceil(self.rate * wait)
        return max(min(needed, most), seen.running)


class ScalingSignal:
    """Samples of one queue, and the slots it wants.

    Args:
        soon: seconds within which `QueueSample.soon` are due.
    """

    def __init__(self, soon: float) -> None:
        self._soon = soon
        self._needs: deque[_Need] = deque()
        self._came: deque[tuple[float, float]] = deque()
        """(seconds, jobs) of the last samples, `RATE` seconds together."""
        self._spent, self._ended = 0.0, 0.0
        self._answers: dict[float, int] = {}

    @property
    def rate(self) -> float:
        """Jobs that come per second. The largest of many samples is left out: a lump is a backlog, no rate."""
        came = self._came
        seconds, jobs = sum(each for each, _ in came), sum(each for _, each in came)
        if len(came) >= 3:
            longest, most = max(came, key=lambda each: each[1])
            seconds, jobs = seconds - longest, jobs - most
        return jobs / seconds if seconds > 0 else 0.0

    @property
    def run_time(self) -> float:
        """Mean seconds that a job runs."""
        last = self._needs[-1].sample if self._needs else None
        # Few have ended: those that run have run for so long at least.
        ended = self._ended if self._ended >= SURE or last is None else max(self._ended, last.running)
        return (self._spent + GUESS) / (ended + 1.0)

    def add(self, sample: QueueSample) -> None:
        """Take the next sample."""
        before = self._needs[-1].sample if self._needs else None
        came = 0.0
        if before is not None:
            if sample.at <= before.at:
                return
            came = self._learn(before, sample)
        run_time = self.run_time if sample.departed is not None else None
        self._needs.append(_Need(sample, self.rate, run_time, came, self._soon))
        while self._needs[0].sample.at < sample.at - KEPT:
            self._needs.popleft()
        self._answers.clear()

    def _learn(self, before: QueueSample, sample: QueueSample) -> float:
        """The estimates learn from two samples; returns how many jobs came between them."""
        seconds = sample.at - before.at
        ended = 0
        if before.departed is not None and sample.departed is not None:
            ended = max(0, sample.departed - before.departed)  # less: the stream was deleted, and counts anew
        came = float(max(0, sample.jobs - before.jobs + ended))
        self._came.append((seconds, came))
        while len(self._came) > 1 and sum(each for each, _ in self._came) > RATE:
            self._came.popleft()
        spent = (before.running + sample.running) / 2 * seconds
        if spent or ended:  # an idle queue forgets nothing
            fade = math.exp(-seconds / MEMORY)
            self._spent, self._ended = self._spent * fade + spent, self._ended * fade + ended
        return came

    def slots(self, wait: float) -> int:
        """How many slots clear the backlog within ``wait`` seconds; 0 if no worker is needed.

        Args:
            wait: seconds that a job may wait until it starts.
        """
        known = self._answers.get(wait)
        if known is None:
            known = self._slots(wait)
            if len(self._answers) < _WAITS:
                self._answers[wait] = known
        return known

    def _slots(self, wait: float) -> int:
        answer = 0.0
        largest: deque[tuple[float, float]] = deque()
        """(moment, need) within `CALM`, needs falling: the first is the largest."""
        busy_at = -math.inf
        for need in self._needs:
            at, now = need.sample.at, need.slots(wait)
            while largest and largest[-1][1] <= now:
                largest.pop()
            largest.append((at, now))
            while largest[0][0] < at - CALM:
                largest.popleft()
            peak = largest[0][1]
            if now > answer or peak < answer * SPARED:
                answer = max(now, peak)
            busy_at = at if need.busy else busy_at
        if not self._needs or self._needs[-1].sample.at - busy_at > CALM:
            return 0
        return max(1, math.ceil(answer - 1e-9))
