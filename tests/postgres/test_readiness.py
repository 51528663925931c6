"""/healthz and /readyz of a worker with a ledger while PostgreSQL is away."""

import anyio

from streamworker.relay.loss_detector import ANOTHER_REDIS
from streamworker.wiring import examine_pair
from streamworker.worker.health import LEDGER_AWAY
from tests.conftest import Server, eventually_blocking
from tests.lifecycle.test_health import ask, put, raw, start, status
from tests.lifecycle.test_worker import traces
from tests.postgres.databases import beside
from tests.postgres.test_down import BROKEN, tell
from tests.postgres.working import settings_for

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


def test_two_redis_on_one_ledger_are_said_once_and_not_ready(start, redis_url, raw, database_url, own_server: Server):
    """The one that was there before relays nothing any more, and says so; its own jobs go on."""
    env = {"DATABASE_URL": database_url, "LEDGER": "on", "LEASE": 1}
    first = start(redis_url, **env).ready()
    eventually_blocking(lambda: status(first, "/readyz") == 200)
    settings = settings_for(redis_url, database_url, relay="on")
    assert anyio.run(lambda: examine_pair(settings, database_url, working=True)) == []
    second = start(own_server.url, **env).ready()
    eventually_blocking(lambda: status(first, "/readyz") == 503, 20)
    assert ask(first, "/readyz")[1]["why"] == ANOTHER_REDIS
    assert status(first, "/healthz") == status(second, "/readyz") == 200
    put(raw, "quick", "one")
    eventually_blocking(lambda: traces(raw, "quick") == ["one"], 20)
    (found,) = anyio.run(lambda: examine_pair(settings, database_url, working=True))
    assert (found.severity, found.subject) == ("error", "ledger") and "database of its own" in found.sentence
    (found,) = anyio.run(lambda: examine_pair(settings, database_url, working=False))
    assert (found.severity, "failover" in found.sentence) == ("warning", True)
    second.kill()
    third = start(redis_url, **env).ready()  # takes the ledger back
    eventually_blocking(lambda: status(first, "/readyz") == 200, 20)
    assert status(third, "/readyz") == 200
    assert len(first.said("ledger_has_another_redis")) == len(first.said("ledger_has_this_redis")) == 1
