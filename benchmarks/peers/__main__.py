"""Other job queues beside ourselves: ``./dev bench-peers [NAME …] [--rounds N] [--json FILE] [--svg FILE]``.

Everyone runs the same workload (`workload`) in an environment of its own, one worker process on one core, Redis on
another, with a hundred jobs at once and the fastest settings its documentation names (each script says which). Our own
worker and the loop without any safety are in every run, so that results are ratios. Who cannot be installed or fails is
reported, never left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

import redis.asyncio as redis
import uvloop

from benchmarks import measure, report
from benchmarks.measure import Row
from benchmarks.peers.environments import OURS, PEERS, Environment, environment, script
from benchmarks.server import server

PROBE = 1000
LONGEST = 120.0
"""Seconds after which a contestant counts as stuck."""
MOST = {"noop": 200_000, "waits": 40_000}
LATENCIES = 500
NAMES = {"bare": "bare loop", "streamworker": "streamworker"}


class Failed(Exception):
    """A contestant gave no figures."""


class Race:
    """All questions to all contestants, one after the other.

    Args:
        url: of the server.
        contestants: where they run.
        rounds: measurements of each; medians are told.
        seconds: about how long one measurement of throughput lasts.
    """

    def __init__(self, url: str, contestants: list[Environment], rounds: int, seconds: float) -> None:
        self._url, self._contestants, self._rounds, self._seconds = url, contestants, rounds, seconds
        self.failed: dict[str, str] = {}
        self._figures: dict[tuple[str, str], list[float]] = {}

    async def run(self) -> list[Row]:
        """Ask everyone everything, in turns."""
        numbers: dict[tuple[str, str], int] = {}
        for number in range(self._rounds):
            for question in ("noop", "waits", "latency"):
                for one in self._contestants:
                    if one.name in self.failed:
                        continue
                    try:
                        if question != "latency" and number == 0:  # how many jobs fill the time?
                            probe = await self._measure(one, question, PROBE // 5 if one.name == "rq" else PROBE)
                            jobs = int(probe["rate"] * self._seconds)
                            numbers[question, one.name] = max(PROBE // 5, min(MOST[question], jobs))
                        found = await self._measure(one, question, numbers.get((question, one.name), LATENCIES))
                    except Failed as problem:
                        self.failed[one.name] = f"{question}: {problem}"
                        print(f"  {one.name} failed: {problem}", file=sys.stderr)
                        continue
                    told = ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
                    print(f"  round {number + 1}, {question}, {one.name}: {told}", file=sys.stderr)
                    for name, value in found.items():
                        self._figures.setdefault((question if name == "rate" else name, one.name), []).append(value)
        return self._rows()

    async def _measure(self, one: Environment, question: str, jobs: int) -> dict[str, float]:
        client = redis.Redis.from_url(self._url)
        await client.flushall()
        await client.aclose()
        process = await asyncio.create_subprocess_exec(
            one.python or "", str(script(one.name)), self._url, question, str(jobs),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "C_FORCE_ROOT": "1"},
        )  # fmt: skip
        try:
            output, errors = await asyncio.wait_for(process.communicate(), LONGEST)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise Failed(f"no figures after {LONGEST:g} s") from None
        try:
            found: dict[str, float] = json.loads(output.splitlines()[-1])
        except (ValueError, IndexError):
            said = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise Failed(said[-1]) from None
        found.pop("cpu_us", None)
        return found

    def _rows(self) -> list[Row]:
        rows = []
        for key, question, unit in (
            ("noop", "no-op jobs", "/s"), ("waits", "jobs of 10 ms (ideal 10,000)", "/s"),
            ("p50", "enqueue to start, p50", "ms"), ("p99", "enqueue to start, p99", "ms"),
        ):  # fmt: skip
            base = self._figures.get((key, "bare"), [])
            for one in self._contestants:
                values = self._figures.get((key, one.name))
                if not values:
                    continue
                what = NAMES.get(one.name, f"{one.name} {one.version}")
                against = [] if one.name == "bare" else base
                rows.append(
                    Row(
                        question=question, what=what, unit=unit, values=values, against=against,
                        versus="bare loop" if against else "", less=unit == "ms",
                    )
                )  # fmt: skip
        return rows


def main() -> int:
    """Race, and tell; 1 if somebody could not be measured."""
    parser = argparse.ArgumentParser(prog="./dev bench-peers", description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}; all of them if none is named")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (medians are told)")
    parser.add_argument("--seconds", type=float, default=5.0, help="about how long a measurement of throughput lasts")
    parser.add_argument("--install", action="store_true", help="only make the environments")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--svg", type=Path, help="draw the picture into this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.peers) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    measure.quiet()
    there = []
    for name in (*OURS, *(arguments.peers or PEERS)):
        print(f"{name} …", file=sys.stderr)
        there.append(environment(name))
    missing = {one.name: one.trouble for one in there if one.python is None}
    if not arguments.install:
        with server() as url:
            contestants = [one for one in there if one.python is not None]
            race = Race(url, contestants, arguments.rounds, arguments.seconds)
            rows = uvloop.run(race.run())
        missing |= race.failed
        report.table(rows)
        if arguments.json:
            report.as_json(rows, arguments.json, missing, command="./dev bench-peers")
        if arguments.svg:
            report.as_svg(rows, arguments.svg, "One worker process on one core, a hundred jobs at once", missing)
    for name, trouble in missing.items():
        print(f"not measured: {name}: {trouble}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
