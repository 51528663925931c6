"""A producer that knows Redis and JSON, and nothing of streamworker: ``python plain.py [count]``."""

import json
import os
import sys
import uuid

import redis

QUEUE = os.environ.get("QUEUE", "email-sending")


def main() -> None:
    """Push ``count`` jobs, each in one of the usual ways."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        # The least there is.
        client.lpush(f"queue:{QUEUE}", json.dumps({"payload": {"to": "plain-0@example.com", "subject": "Hello"}}))

        # With an id, so that pushing it again after a lost reply is the same job; and ahead of the others.
        job = {"id": str(uuid.uuid4()), "kind": "email.send", "payload": {"to": "plain-1@example.com"}}
        client.lpush(f"queue:{QUEUE}:high", json.dumps(job))

        # Many in one round trip.
        jobs = [json.dumps({"payload": {"to": f"plain-{n}@example.com"}}) for n in range(2, count)]
        for start in range(0, len(jobs), 1000):
            client.lpush(f"queue:{QUEUE}", *jobs[start : start + 1000])


if __name__ == "__main__":
    main()
