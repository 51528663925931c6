"""``streamworker history``: sparklines and numbers, those of the dashboard."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from typing import Any

import pytest

from streamworker import App, Settings
from streamworker.broker.redis.redis_history import RedisHistory
from streamworker.telemetry.run_history import DAY, HOUR, HistoryQuery, HistoryRow, RunTally, bucket_of
from streamworker.views import history as views
from streamworker.views.history import BLOCKS, PLAIN_BLOCKS, duration, look_back, percent, sparkline
from tests.conftest import eventually_blocking


def ran(done: int, *, run: float = 0.02, wait: float = 0.2, failed: int = 0, retried: int = 0) -> RunTally:
    times = [{bucket_of(seconds): done + failed} for seconds in (run, wait)]
    return RunTally(done + failed, done, failed, retried, *times)


async def written(url: str, rows: Any, mode: str = "stream") -> None:
    """Rows of (seconds ago, queue, kind, tally) as workers keep them."""
    app = App(settings=Settings(redis_url=url, mode=mode))  # type: ignore[arg-type]
    async with app:
        broker = app._connection.broker()
        assert broker is not None and isinstance(broker.history, RedisHistory)
        now = await broker.clock("q")
        await broker.history.add([HistoryRow(now - ago, queue, kind, tally) for ago, queue, kind, tally in rows])


ROWS = [
    (90, "bills", "invoice.send", ran(600, run=0.02)),
    (HOUR, "bills", "invoice.send", ran(300, run=0.5, failed=10, retried=9)),
    (2 * HOUR, "post", "letter.print", ran(50, run=3.0, wait=400.0)),
    (7 * DAY + 2 * HOUR, "bills", "invoice.send", ran(450)),
]


@pytest.mark.parametrize("mode", ["stream", "list"])
def test_kinds_and_the_sum_of_all(sw, redis_url, mode):
    asyncio.run(written(redis_url, ROWS, mode))
    shown = sw.ok("history", STREAMWORKER_MODE=mode).stdout
    lines = shown.splitlines()
    assert "the last 24 hours" in lines[0]
    assert [line.split()[0] for line in lines if line.split()[0] in ("(all)", "invoice.send", "letter.print")] == [
        "(all)", "invoice.send", "letter.print",
    ]  # fmt: skip
    (invoices,) = [line for line in lines if line.startswith("invoice.send")]
    assert {"bills", "900", "10"} <= set(invoices.split())
    assert any(block in invoices for block in BLOCKS[1:])
    rows = sw.ok("history", "--json", STREAMWORKER_MODE=mode).rows
    assert [(row["kind"], row["queue"], row["started"], row["done"], row["failed"], row["retried"]) for row in rows] == [
        ("invoice.send", "bills", 910, 900, 10, 9), ("letter.print", "post", 50, 50, 0, 0),
    ]  # fmt: skip
    assert rows[1]["run_p50_s"] == pytest.approx(3.0, rel=0.07)
    assert rows[1]["wait_p99_s"] == pytest.approx(400, rel=0.07)
    assert rows[0]["week_before_per_s"] > 0
    assert rows[1]["week_before_per_s"] is None
    assert sum(rows[0]["shape"]) == 900


def test_a_range_a_queue_and_a_kind_are_chosen(sw, redis_url):
    asyncio.run(written(redis_url, ROWS))
    (row,) = sw.ok("history", "--range", "1h", "--json").rows
    assert row["done"] == 600
    (row,) = sw.ok("history", "--queue", "post", "--json").rows
    assert row["kind"] == "letter.print"
    *steps, row = sw.ok("history", "--kind", "invoice.send", "--json").rows
    assert row["done"] == 900 == sum(step["step"]["done"] for step in steps)
    assert len(steps) == 144  # a day of ten minutes
    assert sw.ok("history", "--range", "60d", "--json").rows[0]["done"] == 1350
    assert sw("history", "--range", "2h").returncode == 2


def test_terminals_without_blocks_get_letters(sw, redis_url):
    asyncio.run(written(redis_url, ROWS))
    for more in ({"PYTHONIOENCODING": "latin-1"}, {"TERM": "dumb"}):
        shown = sw.ok("history", **more).stdout
        assert not set(shown) & set(BLOCKS)
        assert "#" in shown
        assert "\\u" not in shown


def test_nothing_ran(sw, redis_url):
    done = sw("history")
    assert (done.returncode, done.stdout, done.sentence) == (0, "", "no runs in this time")
    done = sw("history", STREAMWORKER_HISTORY="off")
    assert "STREAMWORKER_HISTORY is off" in done.stderr


def test_a_worker_s_runs_are_there_when_it_has_ended(sw, redis_url, raw):
    for _ in range(3):
        raw.xadd("stream:{notes}", {"job": json.dumps({"kind": "note.write", "payload": {"text": "x"}})})
    sw.ok("worker", "jobs:app", "--burst")
    (row,) = sw.ok("history", "--range", "1h", "--json").rows
    assert (row["kind"], row["queue"], row["started"], row["done"]) == ("note.write", "notes", 3, 3)


def test_a_killed_worker_leaves_what_it_wrote(sw, redis_url, raw):
    """Two workers add to the same rows; what the one wrote before it was killed stays."""
    sw.constants = {"streamworker.worker.history_recorder.EVERY": 0.2}
    note = {"job": json.dumps({"kind": "note.write", "payload": {"text": "x"}})}

    def done() -> int:
        return sum(row["done"] for row in sw.ok("history", "--range", "1h", "--json").rows)

    one = sw.worker()
    for _ in range(3):
        raw.xadd("stream:{notes}", note)
    eventually_blocking(lambda: done() == 3)
    other = sw.worker()
    one.kill()
    for _ in range(4):
        raw.xadd("stream:{notes}", note)
    eventually_blocking(lambda: done() == 7)
    other.signal(signal.SIGTERM)
    assert other.wait(15) == 0
    assert done() == 7


async def test_steps_are_those_of_the_clock_and_the_last_is_shorter(redis_url):
    await written(redis_url, ROWS)
    async with App(settings=Settings(redis_url=redis_url)).operator() as operator:
        for name, range_ in views.RANGES.items():
            look = await look_back(operator.history, name)
            step = range_.coarse[1]
            assert len(look.points) == range_.seconds // step
            assert all(point.epoch % step == 0 for point in look.points)
            assert [point.seconds for point in look.points[:-1]] == [step] * (len(look.points) - 1)
            assert 0 <= look.points[-1].seconds <= step
            begun = look.points[-1].seconds < step / 2
            assert look.drawn == (look.points[:-1] if begun else look.points)
            assert sum(point.done for point in look.points) == look.total.done == sum(row.done for row in look.kinds)
            fine = await look_back(operator.history, name, queue="bills", kind="invoice.send", compare=False)
            assert len(fine.points) == range_.seconds // range_.fine[1]
            assert fine.before == []


async def test_the_week_before_is_read_once_and_as_it_is_kept(redis_url, raw):
    """Where its steps are among those of the range, as in sixty days, they are not read again."""
    chance = random.Random(7)
    await written(redis_url, [
        (days * DAY, f"q{chance.randrange(2)}", f"k{chance.randrange(3)}", ran(chance.randrange(1, 90), failed=3))
        for days in range(60) for _ in range(3)
    ])  # fmt: skip
    async with App(settings=Settings(redis_url=redis_url)).operator() as operator:
        for name, range_ in views.RANGES.items():
            raw.config_resetstat()
            look = await look_back(operator.history, name)
            asked = raw.info("commandstats")
            assert asked["cmdstat_zrange"]["calls"] == (1 if name == "60d" else 2)
            begin = look.before[0].epoch if look.before else 0.0
            past = await operator.history.read(
                HistoryQuery(range_.before, begin, begin + len(look.before) * range_.before, range_.before)
            )
            assert {point.epoch: point.done for point in look.before if point.started} == {
                at: tally.done for at, tally in past.steps.items()
            }
            elapsed = len(look.before) * range_.before
            assert {(row.queue, row.kind): row.week_before_per_s for row in look.kinds} == {
                (row.queue, row.kind): pytest.approx(past.kinds[row.queue, row.kind].done / elapsed, rel=1e-3)
                if (row.queue, row.kind) in past.kinds else None for row in look.kinds
            }  # fmt: skip
            if together := sum(tally.done for tally in past.steps.values()):
                assert look.total.week_before_per_s == pytest.approx(together / elapsed, rel=1e-3)
            else:
                assert look.total.week_before_per_s is None


def test_words():
    assert sparkline([0, 1, 2, 4]) == "▁▃▅█"
    assert sparkline([0, 0.001, 4], PLAIN_BLOCKS) == "_.#"
    assert sparkline([]) == ""
    assert sparkline([None, 0.0]) == "▁▁"
    assert len(sparkline(list(range(144)), most=60)) == 48
    assert [duration(s) for s in (None, 0.0001, 0.0123, 1.5, 90, 5400, 2 * DAY)] == [
        "-", "0.1 ms", "12 ms", "1.5 s", "1.5 min", "1.5 h", "2.0 d",
    ]  # fmt: skip
    assert [percent(c) for c in (None, -0.001, 0.123, -0.5, 20.0)] == ["", "0 %", "+12 %", "-50 %", "x21"]
