"""Every metric, from the families that `streamworker.worker.metrics` declares."""

from __future__ import annotations

from streamworker.telemetry.exposition import Family
from streamworker.worker import metrics
from tools.reference.tables import code, table


def page() -> str:
    """The page."""
    found = families()
    rows = [
        [code(each.name), each.kind, ", ".join(code(label) for label in each.labels), each.help]
        for each in sorted(found, key=lambda each: each.name)
    ]
    buckets = [
        [code(each.name), ", ".join(f"{bound:g}" for bound in each.bounds)]
        for each in found
        if each.kind == "histogram"
    ]
    return f"""# Metrics

Made from `streamworker.worker.metrics`. A worker with `STREAMWORKER_HTTP=0.0.0.0:8080` answers `/metrics` in Prometheus' text format, from the
thread that answers probes: also while a handler blocks the event loop.

{table(["metric", "type", "labels", "what"], rows)}
Counters of one worker begin at 0 when it starts: ask for `rate(...)`, and sum over workers. Names and labels are pinned
([versions](../policy.md)).

## Buckets

{table(["histogram", "upper bounds"], buckets)}"""


def families() -> list[Family]:
    """All of them, in the order they are declared."""
    return [each for each in vars(metrics).values() if isinstance(each, Family)]
