"""/healthz and /readyz of a worker with a ledger while PostgreSQL is away."""

from streamworker.worker.health import LEDGER_AWAY
from tests.conftest import eventually_blocking
from tests.lifecycle.test_health import ask, put, raw, start, status
from tests.lifecycle.test_worker import traces
from tests.postgres.databases import beside
from tests.postgres.test_down import BROKEN, tell

__all__ = ["raw", "start"]


def test_postgres_that_may_not_write_is_not_ready_and_alive_and_comes_back(start, redis_url, raw, own_postgres):
    worker = start(redis_url, DATABASE_URL=own_postgres.url(), LEDGER="on").ready()
    eventually_blocking(lambda: status(worker, "/readyz") == 200)
    breaks, mends = BROKEN["read-only"]
    beside(tell, own_postgres, breaks)
    put(raw, "quick", "one")
    eventually_blocking(lambda: status(worker, "/readyz") == 503)
    assert ask(worker, "/readyz")[1]["why"] == LEDGER_AWAY
    assert status(worker, "/healthz") == 200
    beside(tell, own_postgres, mends)
    eventually_blocking(lambda: not raw.xlen("stream:{q}"), 20)
    eventually_blocking(lambda: status(worker, "/readyz") == 200, 20)
    assert traces(raw, "quick") == ["one"]


def test_postgres_away_is_not_ready_and_alive_and_comes_back(start, redis_url, raw, own_postgres):
    worker = start(redis_url, DATABASE_URL=own_postgres.url(), LEDGER="on").ready()
    eventually_blocking(lambda: status(worker, "/readyz") == 200)
    own_postgres.kill()
    put(raw, "quick", "one")  # an idle worker asks PostgreSQL nothing
    eventually_blocking(lambda: status(worker, "/readyz") == 503)
    assert ask(worker, "/readyz")[1]["why"] == LEDGER_AWAY
    assert status(worker, "/healthz") == 200
    own_postgres.start()
    eventually_blocking(lambda: traces(raw, "quick") == ["one"] and not raw.xlen("stream:{q}"), 20)
    eventually_blocking(lambda: status(worker, "/readyz") == 200, 20)
