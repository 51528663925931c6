"""What is looked at while the containers run: mails that came, who consumes what, and the list of findings."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterable
from typing import Final

from tests.containers.engine import Compose, Failed

QUEUE: Final = "mail"
STREAMS: Final = tuple(f"stream:{{{QUEUE}}}{level}" for level in (":high", "", ":low"))

# One question each: starting redis-cli in a container costs more than all that it may be asked.
BACKLOG: Final = """
local sum = 0
for _, stream in ipairs(KEYS) do sum = sum + redis.call('XLEN', stream) end
return sum
"""
CONSUMERS: Final = """
local names = {}
for _, stream in ipairs(KEYS) do
  if redis.call('EXISTS', stream) == 1 then
    for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', stream, 'workers')) do names[#names + 1] = consumer[2] end
  end
end
return cjson.encode(names)
"""
HEARTS: Final = """
local hearts = {}
for _, key in ipairs(redis.call('KEYS', 'streamworker:worker:*')) do
  hearts[#hearts + 1] = {key, redis.call('HGETALL', key)}
end
return cjson.encode(hearts)
"""
HELD: Final = """
local held = {}
for _, stream in ipairs(KEYS) do
  if redis.call('EXISTS', stream) == 1 then
    for _, claim in ipairs(redis.call('XPENDING', stream, 'workers', '-', '+', 1000)) do
      local entry = redis.call('XRANGE', stream, claim[1], claim[1])[1]
      if entry then held[#held + 1] = {cjson.decode(entry[2][2]).id, claim[2]} end
    end
  end
end
return cjson.encode(held)
"""


class Findings:
    """What was promised and is so, one line each."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self.count = 0

    def holds(self, sentence: str, truth: object = True, detail: object = "") -> None:
        """Print a finding.

        Raises:
            Failed: it does not hold.
        """
        now = time.monotonic()
        print(f"{'ok  ' if truth else 'FAIL'} {now - self._last:6.1f} s  {sentence}", flush=True)
        self._last = now
        if not truth:
            raise Failed(f"{sentence}: {detail}")
        self.count += 1

    @property
    def seconds(self) -> float:
        """Since the first."""
        return time.monotonic() - self._began


class Stage:
    """One running project, seen from outside.

    Args:
        compose: the project.
        mailbox: host port of its mail catcher.
    """

    def __init__(self, compose: Compose, mailbox: int) -> None:
        self.compose = compose
        self._mailbox = f"http://127.0.0.1:{mailbox}/ids"

    def mails(self) -> dict[str, int]:
        """Job id to how many mails it sent."""
        with urllib.request.urlopen(self._mailbox, timeout=30) as reply:
            seen = json.load(reply)
        return {name.removeprefix("<").partition("@")[0]: count for name, count in seen.items()}

    def dashboard(self, *, password: str | None = None) -> int:
        """The status of its first page, asked with or without a password."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.compose.settings['DASHBOARD_PORT']}/")
        if password is not None:
            request.add_header("Authorization", f"Basic {b64encode(f'operator:{password}'.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    def enqueue(self, kind: str, count: int, seconds: float, *options: str, fresh: bool = False) -> list[str]:
        """Enqueue jobs as people do; returns their ids.

        Args:
            kind: of the jobs.
            count: of the jobs.
            seconds: how long each takes.
            options: of the command.
            fresh: in a container of its own, with what the environment says now, and not in one that runs.
        """
        payload = json.dumps({"to": "ada@example.com", "seconds": seconds})
        call = self.compose.streamworker if fresh else self.compose.inside
        out = call("enqueue", kind, payload, "--queue", QUEUE, "--count", str(count), "--json", *options)
        return [json.loads(line)["id"] for line in out.splitlines()]

    def backlog(self) -> int:
        """Jobs that wait or run in the streams."""
        return int(self.compose.redis("EVAL", BACKLOG, str(len(STREAMS)), *STREAMS))

    def delayed(self) -> int:
        """Jobs that wait for their time."""
        return int(self.compose.redis("ZCARD", f"stream:{{{QUEUE}}}:due"))

    def dead(self) -> int:
        """Jobs that failed for good."""
        return int(self.compose.redis("XLEN", f"stream:{{{QUEUE}}}:dead"))

    def consumers(self) -> set[str]:
        """Names in the groups."""
        return set(json.loads(self.compose.redis("EVAL", CONSUMERS, str(len(STREAMS)), *STREAMS)))

    def heartbeats(self) -> dict[str, dict[str, str]]:
        """Worker id to what its heart tells."""
        beats = json.loads(self.compose.redis("EVAL", HEARTS, "0")) or []
        return {
            key.removeprefix("streamworker:worker:"): dict(zip(pairs[::2], pairs[1::2], strict=True))
            for key, pairs in beats
        }

    def pending(self) -> dict[str, str]:
        """Job id to the worker that holds it, at one moment."""
        said = self.compose.redis("EVAL", HELD, str(len(STREAMS)), *STREAMS)
        return dict(json.loads(said) or ())

    def handed_back(self) -> dict[str, str]:
        """Job id to the worker that did not finish it, as the ledger has it."""
        rows = self.compose.sql("select job_id, worker_id from streamworker.job_logs where outcome = 'interrupted'")
        return {row[0]: row[1] for row in rows}

    def cut_off(self) -> set[str]:
        """Jobs with a run that did not end well, as the ledger has it: their mail may have been out already."""
        return {row[0] for row in self.compose.sql("select job_id from streamworker.job_logs where outcome <> 'ok'")}


def of(names: Iterable[str], hosts: Iterable[str]) -> set[str]:
    """The worker ids that belong to these containers."""
    prefixes = tuple(f"worker-{host}-" for host in hosts)
    return {name for name in names if name.startswith(prefixes)}
