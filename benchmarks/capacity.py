"""How many jobs a second the nodes of a queue with partitions can do: a model of what a job costs.

A job has a price of its own, and a share of the round trips that carry it: of claims, settlements, blocking reads and
what ends them. How many round trips a job needs depends on how many jobs there are for each, and grows with the number
of nodes, because a worker asks each of them. So, in microseconds of CPU::

    Redis    = stored + run + call * trips     (all nodes together)
    a worker = job + trip * trips

`fit` finds the five prices, `required` says what a rate takes. Nothing here measures or reads anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one run, for each job.

    Attributes:
        nodes: how many servers the queue is on.
        load: what the run was.
        stored: jobs were enqueued in it.
        run: jobs were run in it.
        trips: round trips that the nodes served, producers' included.
        producer_trips: those of producers.
        redis: microseconds of CPU, of all nodes.
        worker: the same of all workers.
    """

    nodes: int
    load: str
    stored: bool
    run: bool
    trips: float
    producer_trips: float
    redis: float
    worker: float


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds of CPU, as fitted; see above."""

    stored: float
    run: float
    call: float
    job: float
    trip: float

    def redis(self, sample: Sample) -> float:
        """What a job of the sample costs Redis by the model."""
        return self.stored * sample.stored + self.run * sample.run + self.call * sample.trips

    def worker(self, sample: Sample) -> float:
        """What it costs workers; nothing where none is run."""
        return (self.job + self.trip * (sample.trips - sample.producer_trips)) * sample.run


def fit(samples: Sequence[Sample]) -> Prices:
    """The prices with the least squares of relative errors: a percent counts the same for cheap and dear jobs.

    Raises:
        ValueError: the samples do not tell the prices apart.
    """
    stored, run, call = least_squares(
        [[each.stored, each.run, each.trips] for each in samples], [each.redis for each in samples]
    )
    ran = [each for each in samples if each.run]
    job, trip = least_squares([[1.0, each.trips - each.producer_trips] for each in ran], [each.worker for each in ran])
    return Prices(stored=stored, run=run, call=call, job=job, trip=trip)


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The factors by which the columns of ``rows`` come closest to ``values``, each error relative to its value."""
    scaled = [[cell / value for cell in row] for row, value in zip(rows, values, strict=True)]
    width = len(scaled[0])
    normal = [[sum(row[i] * row[j] for row in scaled) for j in range(width)] for i in range(width)]
    right = [sum(row[i] for row in scaled) for i in range(width)]
    for i in range(width):
        pivot = max(range(i, width), key=lambda k: abs(normal[k][i]))
        if abs(normal[pivot][i]) < 1e-12:
            raise ValueError("the samples do not tell the prices apart: measure more numbers of nodes, or more loads")
        normal[i], normal[pivot], right[i], right[pivot] = normal[pivot], normal[i], right[pivot], right[i]
        for k in range(i + 1, width):
            share = normal[k][i] / normal[i][i]
            normal[k] = [a - share * b for a, b in zip(normal[k], normal[i], strict=True)]
            right[k] -= share * right[i]
    found = [0.0] * width
    for i in reversed(range(width)):
        found[i] = (right[i] - sum(normal[i][j] * found[j] for j in range(i + 1, width))) / normal[i][i]
    return found


class Producers(msgspec.Struct, frozen=True):
    """How jobs are enqueued.

    Attributes:
        bulk: jobs of a call, which are spread over the nodes.
        stored: microseconds of Redis a job, where it is not the model's price; then round trips are included.
    """

    bulk: int = 1000
    stored: float | None = None

    def cost(self, prices: Prices, nodes: int) -> float:
        """Microseconds of Redis to store a job."""
        if self.stored is not None:
            return self.stored
        return prices.stored + prices.call * min(nodes, self.bulk) / self.bulk


class Needs(msgspec.Struct, frozen=True):
    """What a rate takes.

    Attributes:
        nodes: Redis servers, each with a core of its own.
        workers: worker processes, each with a core of its own.
        redis: microseconds of Redis a job.
        worker: microseconds of a worker a job.
    """

    nodes: int
    workers: int
    redis: float
    worker: float


def required(prices: Prices, rate: float, trips: float, producers: Producers, *, used: float) -> Needs:
    """What a rate takes.

    Args:
        prices: as fitted.
        rate: jobs a second, enqueued and run.
        trips: round trips of workers for each job.
        producers: how jobs are enqueued.
        used: share of a core that may be used.
    """
    worker, nodes = prices.job + prices.trip * trips, 1
    while most(prices, nodes, trips, producers, used=used) < rate:
        nodes += 1
    redis = producers.cost(prices, nodes) + prices.run + prices.call * trips
    return Needs(nodes, math.ceil(rate * worker / 1e6 / used), redis, worker)


def most(prices: Prices, nodes: int, trips: float, producers: Producers, *, used: float) -> float:
    """Jobs a second that so many nodes can store and hand out."""
    return nodes * used * 1e6 / (producers.cost(prices, nodes) + prices.run + prices.call * trips)
