"""examples/everyday/order.py: payment, approval and refund as a flow."""

from pathlib import Path

from tests.postgres import test_fanout
from tests.postgres.test_fanout import call, environment


def test_it_runs(ground, redis_url, database_url, monkeypatch):
    monkeypatch.setattr(test_fanout, "PROGRAM", Path(__file__).parents[2] / "examples/everyday/order.py")
    lines = call(environment(redis_url, database_url, ground.mode)).splitlines()
    assert lines == ["paid, approved by ann, packed, shipped", "paid, refunded 20", "declined"]
