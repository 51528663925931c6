"""What contract tests say often: jobs to publish, endings to settle, a look at what the server holds."""

from __future__ import annotations

import json
from typing import Any

import redis

from streamworker import codec
from streamworker.broker import Broker, Ending
from streamworker.job import Claim, Dead, Done, Level, Outgoing, ReleaseAt, RetryAt, Settled, Verdict
from tests.conftest import sweep_soon

HIGH, NORMAL, LOW = "stream:{q}:high", "stream:{q}", "stream:{q}:low"
DUE, BODIES, DEAD, META = "stream:{q}:due", "stream:{q}:bodies", "stream:{q}:dead", "stream:{q}:meta"
GROUP = "workers"


def job(name: str = "", queue: str = "q", level: Level = "normal", **options: Any) -> Outgoing:
    name = name or codec.new_id()
    return Outgoing(name, queue, level, document(name), **{"key_ttl": 60.0, **options})


def document(name: str) -> bytes:
    return json.dumps({"id": name, "payload": {"name": name}}).encode()


def names(claims: list[Claim]) -> list[str]:
    return [json.loads(claim.body or b"{}").get("id", "") for claim in claims]


def done(claim: Claim) -> Ending:
    return Ending(claim, Done())


def ended(claim: Claim, verdict: Verdict, **options: Any) -> Ending:
    return Ending(
        claim, verdict, options.pop("body", b'{"id":"next","payload":{}}'), **{"job_id": "next", "kind": "k", **options}
    )


def retry(claim: Claim, at: float, **options: Any) -> Ending:
    return ended(claim, RetryAt(at, "why"), **options)


def release(claim: Claim, at: float | None = None, **options: Any) -> Ending:
    return ended(claim, ReleaseAt(at, "why"), **options)


def dead(claim: Claim, reason: str = "why", error: str = "e", **options: Any) -> Ending:
    return ended(claim, Dead(reason, error), **options)


ENDINGS = {"done": done, "retry": lambda claim: retry(claim, 0), "release": release, "dead": dead}


async def one(broker: Broker, running: Any = ()) -> Claim:
    (claim,) = await broker.claim(1, 0, running)
    return claim


async def settle_one(broker: Broker, ending: Ending) -> Settled:
    (result,) = await broker.settle([ending])
    return result


def state(raw: redis.Redis, queue: str = "q") -> dict[str, Any]:
    """Everything the server holds of a queue but times, to compare before and after."""
    base = f"stream:{{{queue}}}"
    found: dict[str, Any] = {}
    for key in (f"{base}:high", base, f"{base}:low", f"{base}:dead"):
        found[key] = raw.xrange(key)
    for key in (f"{base}:high", base, f"{base}:low"):
        if raw.exists(key):
            found[key + " pending"] = [
                (entry["message_id"], entry["consumer"], entry["times_delivered"])
                for entry in raw.xpending_range(key, GROUP, "-", "+", 10_000)
            ]
    found["due"] = raw.zrange(f"{base}:due", 0, -1, withscores=True)
    found["bodies"] = raw.hgetall(f"{base}:bodies")
    return found


def ripen(raw: redis.Redis, claim: Claim, ms: int = 10_000_000, count: int | None = None) -> None:
    """Make a claim's lease run out now; ``count`` sets the delivery count."""
    consumer = raw.xpending_range(claim.place, GROUP, claim.entry, claim.entry, 1)[0]["consumer"]
    extra = [] if count is None else ["RETRYCOUNT", count]
    hand_over(raw, claim, consumer, "IDLE", ms, *extra)
    raw.hdel(f"stream:{{{claim.queue}}}:meta", "sweep")


def hand_over(raw: redis.Redis, claim: Claim, consumer: str | bytes, *extra: Any) -> None:
    """Give a claim to somebody else, without counting a delivery unless ``extra`` says so."""
    script = "return redis.call('XCLAIM', KEYS[1], unpack(ARGV))"  # redis-py stumbles over the reply to JUSTID
    raw.eval(script, 1, claim.place, GROUP, consumer, 0, claim.entry, *extra, "JUSTID")


async def recover(
    broker: Broker, raw: redis.Redis, limit: int = 100, running: Any = (), queue: str = "q"
) -> list[Claim]:
    raw.hdel(f"stream:{{{queue}}}:meta", "sweep")
    sweep_soon(broker)
    return await broker.claim(limit, 0, running)
