"""A million pending entries and a hundred thousand dead letters: no page may care. ``-m slow``."""

from __future__ import annotations

import json
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PATHS = ["/", "/queue?queue=q", "/pending", "/pending?queue=q&idle=3600", "/pending?kind=nothing-like-it", "/dead",
         "/dead?search=nothing-like-it", "/delayed", "/workers", "/workers?worker=w-3", "/jobs?id=job-999999",
         "/history"]  # fmt: skip

FILL = """
for n = 1, ARGV[1] do
  redis.call('XADD', KEYS[1], '*', 'job', ARGV[2])
  if n % 10 == 0 then redis.call('XADD', KEYS[2], '*', 'job', ARGV[2], 'id', 'd' .. n, 'kind', 'k', 'reason', 'raised') end
end
redis.call('XREADGROUP', 'GROUP', 'workers', ARGV[3], 'COUNT', ARGV[1], 'STREAMS', KEYS[1], '>')
"""


async def test_first_byte_with_a_million_pending(raw, browser, capsys):
    raw.xgroup_create("stream:{q}", "workers", "0", mkstream=True)
    raw.hset("stream:{q}:meta", "epoch", "e")
    document = json.dumps({"id": "x", "kind": "k", "payload": {"text": "t" * 100}})
    for n in range(100):
        raw.eval(FILL, 2, "stream:{q}", "stream:{q}:dead", 10_000, document, f"w-{n % 7}")
    assert raw.xpending("stream:{q}", "workers")["pending"] == 1_000_000
    assert raw.xlen("stream:{q}:dead") == 100_000
    await browser.text("/")
    seen = {}
    for path in PATHS:
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            async with browser.client.stream("GET", path) as answer:
                await anext(answer.aiter_bytes())
                times.append(time.perf_counter() - begun)
                assert answer.status_code == 200
        seen[path] = sorted(times)[2]
    with capsys.disabled():
        print()
        for path, seconds in seen.items():
            print(f"{seconds * 1000:7.1f} ms  {path}")
    assert max(seen.values()) < 0.3
