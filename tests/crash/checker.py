"""Judges a history: what producers were promised, what handlers did, what the server's witnesses saw. See docs/faults.md."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.crash.ground import home_of
from tests.crash.history import read

MAX_ATTEMPTS = {"work": 4}
SOON = 0.3
"""Seconds from the look at the clock to the start of a job, at most."""
FOR_EVER = 86_400.0
"""Seconds that no run of the suite lasts."""
OWN_ENDS = {"ValueError", "Snooze", "Discard"}
"""Ends of a run after which the job goes on by its own rules, with another hop."""
DEADLY = {"kill", "failpoint", "poison"}
FREEZING = {"freeze"}


class Verdict:
    """What the checker found; no ``violations``, or the run failed."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.jobs = self.done = self.dead = self.destroyed = self.expired = self.runs = 0
        self.share = 0
        """Most starts of other tenants, beyond one of each, that a tenant with a job in its line has waited for."""
        self.duplicates: Counter[str] = Counter()
        self.recovery: list[float] = []
        self.alone: list[float] = []
        self.waited: list[float] = []
        """The same suspects, from the end of the run before: one may lose several workers that only waited with it."""
        self.lost: list[str] = []
        self.stale_settles = 0
        self.refused_settles = 0
        self.starved = 0
        """Runs that were repeated because the machine did not let a worker renew its lease."""
        self.stalled = 0.0
        """Seconds the machine did not let the harness or the server run."""

    def complain(self, rule: str, what: str) -> None:
        self.violations.append(f"{rule}: {what}")


def check(
    directory: Path,
    witnesses: Iterable[str],
    dead: Iterable[str],
    *,
    max_deliveries: int,
    lease: float,
    destroyed: Iterable[str] = (),
    slots: int = 0,
) -> Verdict:
    """Judge a run that has come to rest.

    Args:
        directory: of the history.
        witnesses: lines of the server's witness list, in order.
        dead: ids of dead letters.
        max_deliveries: the workers' setting.
        lease: the workers' setting, in seconds.
        destroyed: ids that a fault deleted on purpose.
        slots: jobs that all workers run at once.
    """
    verdict = Verdict()
    runs = _runs(read(directory / "runs"))
    enqueued = read(directory / "enqueued")
    faults = read(directory / "faults")
    witnesses = list(witnesses)
    settled = _fence(verdict, witnesses)
    expired = {ending[0].partition(":")[2] for ending in settled.values() if ending[0].startswith("expired:")}
    _nothing_lost(verdict, enqueued, runs, settled, set(dead), set(destroyed) | expired)
    verdict.expired, verdict.destroyed = len(expired), verdict.destroyed - len(expired & {e["job"] for e in enqueued})
    _limits(verdict, runs, max_deliveries)
    _order(verdict, runs, faults)
    _order_keys(verdict, runs, settled, set(destroyed))
    stalls = read(directory / "stalls")
    _expiry(verdict, enqueued, runs, expired, stalls)
    _held_keys(verdict, runs, settled, set(destroyed))
    _shares(verdict, enqueued, runs, faults, stalls, slots)
    verdict.stalled = sum(stall["late"] for stall in stalls if stall["worker"] == "*")
    _duplicates(verdict, runs, faults, _takers(witnesses), lambda *pair: _starved(*pair, stalls, lease))
    return verdict


def _runs(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by job, by the time of their start; each with ``end`` (what, or None) and ``ended`` (when)."""
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    by_job: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        key = (line["place"], line["entry"], line["worker"], line["count"])
        if line["what"] == "started":
            run = runs[key] = {**line, "end": None, "ended": None}
            by_job[line["job"]].append(run)
        else:
            runs[key].update(end=line["what"], ended=line["mono"])
    for each in by_job.values():
        each.sort(key=lambda run: run["mono"])
    return by_job


def _fence(verdict: Verdict, witnesses: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """(place, entry) to [script, worker, count] of what settled it; complains of settles by claims that were lost."""
    settled: dict[tuple[str, str], list[str]] = {}
    for line in witnesses:
        script, place, entry, who, count, owner, true_count, *result = line.split(" ")
        if script == "sweep":
            continue
        held = (who, count) == (owner, true_count)
        if script == "renew":
            if owner != who:
                verdict.complain("fence", f"a renewal by {who} took {entry} from {owner} (delivery {true_count})")
            continue
        if result == ["1"]:
            if not held:
                verdict.complain(
                    "fence", f"{script} by the lost claim ({who}, {count}) of {entry}: held by ({owner}, {true_count})"
                )
            if (place, entry) in settled:
                verdict.complain("fence", f"{entry} was settled twice")
            settled[place, entry] = [script, who, count]
        elif result == ["0"]:
            verdict.stale_settles += 1
            if held:
                verdict.complain("fence", f"{script} refused ({who}, {count}) the entry {entry} that it holds")
        else:
            verdict.refused_settles += 1
    return settled


def _takers(witnesses: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """(place, entry) to the workers that took it over or reserved it."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line in witnesses:
        script, place, entry, who, *_ = line.split(" ")
        if script == "sweep":
            found[place, entry].add(who.rpartition("-")[0])
    return found


def _nothing_lost(
    verdict: Verdict,
    enqueued: list[dict[str, Any]],
    runs: dict[str, list[dict[str, Any]]],
    settled: dict[tuple[str, str], list[str]],
    dead: set[str],
    destroyed: set[str],
) -> None:
    cancelled = {line["job"] for line in enqueued if line["what"] == "cancelled"}
    promised = {line["job"] for line in enqueued if line["what"] == "acknowledged"}
    known = promised | {line["job"] for line in enqueued}
    verdict.jobs = len(promised)
    for job in known:
        history = runs.get(job, [])
        # A group that was deleted counts anew: the same worker may come to the same claim twice, and finish the second.
        finished = {(run["entry"], run["worker"], run["count"]) for run in history if run["end"] == "finished"}
        for run in history:
            ending = settled.get((run["place"], run["entry"]))
            mine = ending is not None and ending[1:] == [run["worker"], str(run["count"])]
            token = (run["entry"], run["worker"], run["count"])
            if mine and ending is not None and ending[0] == "done" and token not in finished:
                verdict.complain(
                    "truth", f"{job} was settled as done by {run['worker']}, whose run ended as {run['end']}"
                )
        done = any(
            run["end"] == "finished" and settled.get((run["place"], run["entry"]), [""])[0] == "done" for run in history
        )
        verdict.done += done
        verdict.dead += job in dead
        verdict.destroyed += job in destroyed and not done and job not in dead
        if done and job in dead:
            # A dead letter whose run finished elsewhere: told twice, and operators would replay it.
            verdict.complain("once", f"{job} is done and dead")
        if job in promised and not done and job not in dead | destroyed | cancelled:
            verdict.lost.append(job)
            verdict.complain("lost", f"{job}: acknowledged, neither done nor dead; its runs: {_tell(history)}")


def _limits(verdict: Verdict, runs: dict[str, list[dict[str, Any]]], max_deliveries: int) -> None:
    for job, history in runs.items():
        verdict.runs += len(history)
        for run in history:
            if run["delivery"] > max_deliveries:
                verdict.complain("limits", f"{job} ran at delivery {run['delivery']} of {max_deliveries}")
            if run["attempt"] > 4:
                verdict.complain("limits", f"{job} ran attempt {run['attempt']}")
        # Each hop charges at most one attempt, and none is taken back. By hop and not by time: a zombie may start late.
        charged = [run["attempt"] for run in sorted(history, key=lambda run: run["hop"])]
        if charged != sorted(charged):
            verdict.complain("limits", f"{job} went back in its attempts: {_tell(history)}")


def _order(verdict: Verdict, runs: dict[str, list[dict[str, Any]]], faults: list[dict[str, Any]]) -> None:
    """Fresh entries of one stream start in their order in every worker; a lost reply may put one behind."""
    disturbed = any(fault["worker"] == "*" for fault in faults)
    last: dict[tuple[str, str], tuple[int, ...]] = {}
    every = sorted((run for history in runs.values() for run in history), key=lambda run: run["mono"])
    for run in every:
        if run["threaded"] or run["count"] != 1 or run["delivery"] != 1 or run.keys() & {"key", "held", "expires"}:
            continue  # the last three ask for something first
        # A stream's entry ids are decimal; a list's are UUIDs by the server's clock.
        entry = tuple(int(part, 16 if len(run["entry"]) == 36 else 10) for part in run["entry"].split("-"))
        key = (run["worker"], run["place"])
        if entry < last.get(key, (0,)) and not disturbed:
            verdict.complain("order", f"{run['worker']} started {run['entry']} after a later one of {run['place']}")
        last[key] = max(entry, last.get(key, (0,)))


def _order_keys(
    verdict: Verdict,
    runs: dict[str, list[dict[str, Any]]],
    settled: dict[tuple[str, str], list[str]],
    destroyed: set[str],
) -> None:
    """Jobs with one order key start in the order of their numbers, and none while the job before it may still settle.

    Runs whose settle was refused do not count: a zombie's successor may start, and end, while the zombie sleeps.
    """
    by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for history in runs.values():
        for run in history:
            if "key" in run and run["job"] not in destroyed:
                by_key[run["key"]].append(run)
    if destroyed:
        return  # lines that were deleted with the server's memory begin anew
    for key, found in by_key.items():
        found.sort(key=lambda run: run["mono"])
        firsts = list(dict.fromkeys(run["number"] for run in found))
        if firsts != sorted(firsts):
            at = next(n for n, (a, b) in enumerate(itertools.pairwise(firsts)) if a > b)
            verdict.complain("order", f"of the key {key} {firsts[at + 1]} started after {firsts[at]}")
        last: dict[str, Any] | None = None
        for run in found:
            ending = settled.get((run["place"], run["entry"]))
            if ending is None or ending[1:] != [run["worker"], str(run["count"])]:
                continue
            if last is not None and last["job"] != run["job"] and run["mono"] < last["ended"]:
                verdict.complain("order", f"of the key {key} {run['number']} started while {last['number']} ran")
            if run["ended"] is not None:
                last = run


def _expiry(
    verdict: Verdict,
    enqueued: list[dict[str, Any]],
    runs: dict[str, list[dict[str, Any]]],
    expired: set[str],
    stalls: list[dict[str, Any]],
) -> None:
    """No job starts after its moment, none is expired before it, and none that has no such moment."""
    for history in runs.values():
        for run in history:
            late = run["wall"] - run["expires"] if run.get("expires") is not None else 0.0
            waited = sum(each["late"] for each in stalls if run["mono"] - 5 < each["mono"] < run["mono"] + 1)
            if late > SOON + waited:
                verdict.complain("expiry", f"{run['job']} started {late:.2f} s after it had expired")
    lives = {line["job"]: line["lives"] for line in enqueued if "lives" in line}
    known = {line["job"] for line in enqueued if line["what"] == "acknowledged"}
    for job in expired & known:
        if lives.get(job, FOR_EVER) >= FOR_EVER:
            verdict.complain("expiry", f"{job} has expired, and had time")


def _held_keys(
    verdict: Verdict,
    runs: dict[str, list[dict[str, Any]]],
    settled: dict[tuple[str, str], list[str]],
    destroyed: set[str],
) -> None:
    """Of the jobs with one key that is held until they are done none starts before the one before it has ended."""
    by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in (run for history in runs.values() for run in history):
        ending = settled.get((run["place"], run["entry"]))
        if "held" in run and ending is not None and ending[1:] == [run["worker"], str(run["count"])]:
            by_key[run["held"]].append(run)
    if destroyed:
        return  # keys that were deleted with the server's memory are free
    for key, found in by_key.items():
        found.sort(key=lambda run: run["mono"])
        for before, after in itertools.pairwise(found):
            if before["job"] != after["job"] and (before["ended"] is None or after["mono"] < before["ended"]):
                verdict.complain("key", f"{after['job']} started while {before['job']} held the key {key}")
        firsts = [job for job, _ in itertools.groupby(found, key=lambda run: run["job"])]
        if len(firsts) != len(set(firsts)):
            verdict.complain("key", f"another job of the key {key} ran between two runs of one")


def _shares(
    verdict: Verdict,
    enqueued: list[dict[str, Any]],
    runs: dict[str, list[dict[str, Any]]],
    faults: list[dict[str, Any]],
    stalls: list[dict[str, Any]],
    slots: int,
) -> None:
    """A tenant's job starts within the next (jobs in flight + tenants) starts, and tenants with work start equally often.

    A start that a fault may have put off (of its worker, of the server) is not judged. Each partition has shares of its own.
    """
    homes: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in enqueued:
        if "tenant" in line and line["what"] == "acknowledged" and line["job"] in runs:
            homes[home_of(runs[line["job"]][0]["place"])][line["job"]] = line
    for put in homes.values():
        _shares_of(verdict, put, runs, faults, stalls, slots)


def _shares_of(
    verdict: Verdict,
    put: dict[str, dict[str, Any]],
    runs: dict[str, list[dict[str, Any]]],
    faults: list[dict[str, Any]],
    stalls: list[dict[str, Any]],
    slots: int,
) -> None:
    """The shares of one partition's tenants.

    Args:
        put: the acknowledged jobs of its tenants, all of which started.
    """
    starts = sorted(
        ((runs[job][0]["mono"], line["tenant"], line["mono"], runs[job][0]) for job, line in put.items()),
        key=lambda start: start[0],
    )
    troubles = [(each["began"], each["ended"] + each.get("tail", 0.0), each["worker"]) for each in faults]
    troubles += [(each["began"], each["mono"], each["worker"]) for each in stalls]
    times = [start[0] for start in starts]
    last: dict[str, float] = {}
    spans: dict[str, tuple[float, float]] = {}
    """Tenant to when the last of its jobs was stored, and when the last one started that no fault had put off."""
    for at, tenant, stored, run in starts:
        since = max(stored, last.get(tenant, 0.0))
        last[tenant] = at
        name = run["worker"].rpartition("-")[0]
        if run["count"] > 1 or any(b < at and e > since and w in (name, "*") for b, e, w in troubles):
            continue
        spans[tenant] = max(stored, spans.get(tenant, (0.0, 0.0))[0]), at
        others = Counter(each[1] for each in starts[bisect_right(times, since) : bisect_left(times, at)])
        verdict.share = max(verdict.share, others.total() - len(others))
        if others.total() > slots + len(others):
            verdict.complain("share", f"{run['job']} of {tenant} started after {dict(others)} of others")
    for one, other in itertools.combinations(sorted(spans), 2):
        begin, end = max(spans[one][0], spans[other][0]), min(spans[one][1], spans[other][1])
        both = [start for start in starts if start[1] in (one, other) and begin <= start[0] < end]
        counts = Counter(start[1] for start in both)
        if abs(counts[one] - counts[other]) > slots + 2 + sum(start[3]["count"] > 1 for start in both):
            verdict.complain(
                "share", f"both had work, and {counts[one]} of {one} started and {counts[other]} of {other}"
            )


def _duplicates(
    verdict: Verdict,
    runs: dict[str, list[dict[str, Any]]],
    faults: list[dict[str, Any]],
    takers: dict[tuple[str, str], set[str]],
    starved: Callable[[dict[str, Any], dict[str, Any]], bool],
) -> None:
    for job, history in runs.items():
        for before, after in itertools.pairwise(history):
            if before["end"] in OWN_ENDS and after["hop"] > before["hop"]:
                continue
            fault = _explanation(before, after, faults)
            if fault is None and starved(before, after):
                verdict.starved += 1
                continue
            if fault is None:
                verdict.complain("duplicate", f"{job} ran again for no reason: {_tell(history)}")
                continue
            verdict.duplicates[fault["what"]] += 1
            if (
                fault["what"] in DEADLY | FREEZING
                and after["mono"] > fault["began"]
                and after["count"] > before["count"]
            ):
                waited = after["mono"] - fault["began"]
                if after["delivery"] < 3:
                    verdict.recovery.append(waited)
                    continue
                verdict.waited.append(waited)
                # Whoever held it last and died: reserved and not begun counts too.
                holders = takers[after["place"], after["entry"]] - {after["worker"].rpartition("-")[0]}
                deaths = [
                    each["began"]
                    for each in faults
                    if each["what"] in DEADLY and each["worker"] in holders and each["began"] < after["mono"]
                ]
                verdict.alone.append(after["mono"] - max([fault["began"], *deaths]))


def _suspect_of(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, bool]:
    """The worker whose fate may explain a repeated run, and whether that is a zombie that came late.

    A zombie may wake and start what it had claimed before, after its successor has finished.
    """
    same = before["entry"] == after["entry"]
    late = after["hop"] < before["hop"] or (same and after["count"] < before["count"])
    return (after if late else before)["worker"].rpartition("-")[0], late


def _explanation(before: dict[str, Any], after: dict[str, Any], faults: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fault between two runs of a job that explains the second: it hit the first one's worker, or everybody."""
    name, late = _suspect_of(before, after)
    fitting = [
        fault
        for fault in faults
        if fault["worker"] in (name, "*")
        and fault["began"] <= after["mono"]
        and fault["ended"] + fault.get("tail", 0.0) >= (fault["began"] if late else before["mono"])
    ]
    own = [fault for fault in fitting if fault["worker"] == name]
    return (own or fitting or [None])[-1]


def _starved(before: dict[str, Any], after: dict[str, Any], stalls: list[dict[str, Any]], lease: float) -> bool:
    """The machine kept the first run's worker, or everybody, from running for half of the lease that it lost.

    A lease is renewed when a third of it is over, so that two thirds can be waited out; what is not written down (delays
    of less than 50 ms) takes its share of that.
    """
    name, _ = _suspect_of(before, after)
    lost = sum(
        stall["late"]
        for stall in stalls
        if stall["worker"] in (name, "*")
        and stall["began"] <= after["mono"]
        and stall["mono"] >= after["mono"] - 2 * lease
    )
    return lost >= lease / 2


def _tell(history: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{run['worker']} {run['entry']} delivery {run['delivery']} attempt {run['attempt']} hop {run['hop']} "
        f"at {run['mono']:.3f} {run['end']} {run['ended'] or 0:.3f}"
        for run in history
    )
