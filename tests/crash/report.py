"""The table that `./dev crash` and `./dev soak` print."""

from __future__ import annotations

from collections import Counter

from benchmarks.measure import Row
from tests.crash.checker import Verdict

PARTS = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))


def percentile(values: list[float], part: float) -> float:
    """The value below which ``part`` of all lie; 0 without values."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * part))] if ranked else 0.0


def table(injected: Counter[str], verdict: Verdict) -> str:
    """Faults by kind, jobs, duplicates by their cause, recovery, lost."""
    lines = ["", "faults injected"]
    lines += [f"  {what:<24}{count:>8}" for what, count in sorted(injected.items())]
    lines += [f"  {'all':<24}{sum(injected.values()):>8}", "", "jobs"]
    rows: list[tuple[str, str]] = [
        ("acknowledged", f"{verdict.jobs}"),
        ("done", f"{verdict.done}"),
        ("dead", f"{verdict.dead}"),
        ("expired", f"{verdict.expired}"),
        ("deleted by a fault", f"{verdict.destroyed}"),
        ("runs", f"{verdict.runs}"),
        ("stale settles refused", f"{verdict.stale_settles}"),
        ("machine stalled, s", f"{verdict.stalled:.1f}"),
    ]
    lines += [f"  {name:<24}{value:>8}" for name, value in rows]
    lines += ["", "runs repeated because of"]
    lines += [f"  {what:<24}{count:>8}" for what, count in sorted(verdict.duplicates.items())]
    lines.append(f"  {'no processor':<24}{verdict.starved:>8}")
    for name, values in (
        ("recovery, s", verdict.recovery),
        ("recovery, alone, s", verdict.alone),
        ("  since its last run, s", verdict.waited),
    ):
        figures = "  ".join(f"{label} {percentile(values, part):.2f}" for label, part in PARTS)
        lines += ["", f"{name:<26}{figures}  ({len(values)} runs)"]
    broken = Counter(violation.partition(":")[0] for violation in verdict.violations)
    lines += [
        "",
        f"{'most of others before':<26}{verdict.share:>8}  starts beyond one each, while a tenant's job waited",
    ]
    lines += ["", f"{'lost':<26}{len(verdict.lost):>8}", f"{'settles by lost claims':<26}{broken['fence']:>8}"]
    lines += [f"{'violations':<26}{len(verdict.violations):>8}  {dict(broken) or ''}"]
    return "\n".join(lines)


def figures(mode: str, injected: Counter[str], verdict: Verdict) -> list[Row]:
    """The same as rows of ``benchmarks/results``, for docs/faults.md."""
    counts = {
        "faults": sum(injected.values()),
        "jobs": verdict.jobs,
        "repeated": sum(verdict.duplicates.values()),
        "lost": len(verdict.lost),
        "fence": sum(violation.startswith("fence:") for violation in verdict.violations),
    }
    times = {"recovery": verdict.recovery, "alone": verdict.alone}
    rows = [Row(question=mode, what=what, unit="", values=[float(count)]) for what, count in counts.items()]
    return rows + [
        Row(question=mode, what=f"{what} {label}", unit="s", values=[percentile(values, part)])
        for what, values in times.items()
        for label, part in PARTS
    ]
