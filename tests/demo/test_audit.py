"""The audit finds everything that can be wrong: fabricated evidence, one lie at a time."""

from typing import Any

import msgspec
import pytest

from streamworker.demo import script
from streamworker.demo.audit import DUE, STREAMS, AuditReport, Evidence, Killed, Leftovers, audit, number_in
from streamworker.demo.script import Scenario
from streamworker.errors import UsageError

PLAY = Scenario(jobs=2_100, workers=3, kill=True)
HELD = frozenset({10, 11, 12})
KILLED = Killed("worker-1", "demo-1-abc", 4711, HELD, 3.2)
CLEAN = Leftovers(
    streams=dict.fromkeys(STREAMS, 0),
    pending=dict.fromkeys(STREAMS, 0),
    delayed={DUE: 0},
    dead=[7, 1_007, 2_007],
    consumers=["demo-1-abc"],
)
ARRIVED = {script.address(n): 1 for n in range(PLAY.jobs) if n not in PLAY.dead}


def evidence(arrived: dict[str, int] | None = None, **changes: Any) -> Evidence:
    kept = {name: changes.pop(name) for name in list(changes) if name in ("killed", "exits")}
    found = {"killed": KILLED, "exits": {"worker-2": 0, "worker-3": 0}, **kept}
    left = msgspec.structs.replace(CLEAN, **changes)
    return Evidence(arrived=ARRIVED | (arrived or {}), leftovers=left, **found)


def failed(report: AuditReport) -> list[str]:
    return [finding.name for finding in report.findings if not finding.ok]


def test_all_is_well():
    report = audit(PLAY, evidence())
    assert report.ok and failed(report) == [] == report.missing
    assert report.duplicates == 0


def test_mails_of_the_killed_worker_may_come_twice_and_are_counted():
    report = audit(PLAY, evidence({script.address(10): 2, script.address(12): 2}))
    assert report.ok
    assert report.duplicates == 2
    assert any("2 mails came twice" in finding.says for finding in report.findings)


@pytest.mark.parametrize(
    ("lie", "finding", "says"),
    [
        ({"arrived": {script.address(5): 0}}, "delivered", "1 of 2097 recipients got no mail: 5"),
        ({"arrived": {script.address(7): 1}}, "nobody_else", "customer-7@"),
        ({"arrived": {script.address(2_100): 1}}, "nobody_else", "customer-2100@"),
        ({"arrived": {"stranger@example.com": 1}}, "nobody_else", "stranger@"),
        ({"arrived": {script.address(13): 2}}, "duplicates", "customer-13@"),
        ({"arrived": {script.address(10): 3}}, "duplicates", "customer-10@"),
        ({"arrived": {script.address(10): 2}, "killed": None}, "duplicates", "customer-10@"),
        ({"dead": [7, 1_007]}, "dead_letters", "missing 2007, wrong none"),
        ({"dead": [7, 1_007, 2_007, 8]}, "dead_letters", "wrong 8"),
        ({"dead": [7, 1_007, 2_007, 7]}, "dead_letters", "double 1"),
        ({"dead": [7, 1_007, 2_007, None]}, "dead_letters", "1 dead letters cannot be read"),
        ({"streams": {STREAMS[1]: 3}}, "streams", f"3 in {STREAMS[1]}"),
        ({"pending": {STREAMS[0]: 1}}, "pending", f"1 in {STREAMS[0]}"),
        ({"delayed": {DUE: 2}}, "delayed", f"2 in {DUE}"),
        ({"consumers": ["demo-1-abc", "demo-2-xyz"]}, "consumers", "demo-2-xyz"),
        ({"exits": {"worker-2": 0, "worker-3": 1}}, "exits", "worker-3 (1)"),
        ({"exits": {"worker-2": None}}, "exits", "worker-2 (still runs)"),
        ({"killed": msgspec.structs.replace(KILLED, recovery=4.01)}, "recovery", "4.0 s after the kill"),
        ({"killed": msgspec.structs.replace(KILLED, recovery=None)}, "recovery", "nobody took over all 3 jobs"),
        ({"killed": msgspec.structs.replace(KILLED, held=frozenset())}, "recovery", "try more jobs"),
        ({"killed": None, "consumers": []}, "recovery", "try more jobs"),
    ],
)
def test_a_lie_is_found(lie: dict[str, Any], finding: str, says: str):
    report = audit(PLAY, evidence(**lie))
    assert not report.ok
    assert finding in failed(report)
    assert any(says in missing for missing in report.missing)


def test_without_a_kill_nobody_is_asked_about_recovery():
    play = Scenario(jobs=2_100, workers=1, kill=False)
    report = audit(play, evidence(killed=None, consumers=[]))
    assert report.ok
    assert "recovery" not in [finding.name for finding in report.findings]


def test_the_script_is_deterministic():
    assert not script.fails(0, 1)
    assert [script.fails(42, attempt) for attempt in (1, 2, 3)] == [True, True, False]
    assert all(script.fails(7, attempt) for attempt in range(1, script.MAX_ATTEMPTS + 1))
    assert PLAY.dead == {n for n in range(PLAY.jobs) if script.is_hopeless(n)}
    assert PLAY.mails == 2_097


@pytest.mark.parametrize(
    ("recipient", "number"),
    [
        (script.address(12), 12),
        ("customer-012@example.com", None),
        ("customer-@example.com", None),
        ("customer-1@example.org", None),
        ("", None),
    ],
)
def test_recipients_are_read_back_exactly(recipient: str, number: int | None):
    assert script.number_of(recipient) == number


@pytest.mark.parametrize(
    "options",
    [{"jobs": 0}, {"jobs": 1_000_001}, {"workers": 0}, {"workers": 65}, {"workers": 1}],
)
def test_scripts_that_cannot_be_played(options: dict[str, int]):
    with pytest.raises(UsageError, match="--"):
        Scenario(**{"jobs": 10, "workers": 3, "kill": True, **options})


@pytest.mark.parametrize("job", ["", "[]", "{}", '{"payload": {"number": "1"}}', '{"payload": 1}'])
def test_unreadable_jobs_have_no_number(job: str):
    assert number_in({"job": job}) is None
    assert number_in({}) is None
