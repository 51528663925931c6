"""What a bridge promises of each element: the same bytes, the same level, the same order, once; or it stays where it is."""

from __future__ import annotations

import asyncio
import os
import random
import threading

import pytest
import structlog

from streamworker.bridge import BridgeLoop
from streamworker.broker import list_bridge as bridge_module
from streamworker.broker import scripts
from streamworker.broker.redis.client import RedisAddress
from streamworker.errors import ConfigurationError
from tests.bridge.conftest import LISTS, STREAMS, blocked, push, running, stored
from tests.conftest import eventually
from tests.contract.helpers import names

STREAM = pytest.mark.parametrize("ground", ["stream"], indirect=True)


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b'{"payload":{"n":%d}}' % n for n in range(start, start + count)]


async def drained(bridge):
    bridging = BridgeLoop(bridge, drain=True)
    await bridging.run()
    return bridging.totals


async def test_what_was_pushed_first_is_first_in_the_stream_of_its_level(raw, bridge_of):
    for index, list_ in enumerate(LISTS):
        push(raw, list_, *numbered(1200, start=10_000 * index))
    async with bridge_of() as bridge:
        tally = await drained(bridge)
    for index, stream in enumerate(STREAMS):
        assert stored(raw, stream) == numbered(1200, start=10_000 * index)
    assert not raw.exists(*LISTS)
    assert (tally.jobs, sum(tally.left.values())) == (3600, 0)
    assert tally.bytes == sum(len(job) for stream in STREAMS for job in stored(raw, stream))


async def test_no_byte_is_touched(raw, bridge_of):
    random.seed(7)
    odd = [
        b"", b"\0", b"\0\0{\xff\xfe", b"not json", b'{"payload":{}}\r\n', b'\xef\xbb\xbf{"payload":{}}', "ü€😀".encode(), b"\xed\xa0\x80",
        b"123", b"9223372036854775808", b'{"streamworker":{"count":2},"payload":{}}', b'{"payload":' + b"[" * 5000, b" " * 70_000,
        random.randbytes(3_000_000), bytes(range(256)), b'{"id":"x","payload":{},"other":1e400}',
    ]  # fmt: skip
    push(raw, "queue:q", *odd)
    push(raw, "queue:q:low", *odd)
    async with bridge_of() as bridge:
        await drained(bridge)
    assert stored(raw) == odd
    assert stored(raw, "stream:{q}:low") == odd


async def test_a_batch_is_bounded_by_elements_and_by_bytes(raw, bridge_of):
    push(raw, "queue:q", *numbered(1500))
    push(raw, "queue:big", *[bytes([65 + n]) * 400_000 for n in range(6)])
    async with bridge_of("q", "big") as bridge:
        counts = [await bridge.move() for _ in range(2)]
    for batch in counts:
        jobs = sum(each.jobs for each in batch)
        size = sum(each.bytes for each in batch)
        assert 0 < jobs <= bridge_module.BATCH
        assert size < bridge_module.BATCH_BYTES + 400_000


async def test_a_queue_that_fills_every_batch_does_not_keep_the_others_waiting(raw, bridge_of):
    push(raw, "queue:a:high", *numbered(5000))
    push(raw, "queue:a", b"normal")
    push(raw, "queue:b", b"small")
    async with bridge_of("a", "b") as bridge:
        for _ in range(8):
            await bridge.move()
    assert stored(raw, "stream:{b}") == [b"small"]
    assert stored(raw, "stream:{a}") == [b"normal"]
    assert raw.llen("queue:a:high") > 0


async def test_several_bridges_share_the_work_and_keep_the_order(raw, bridge_of):
    expected = numbered(20_000)
    producing = threading.Thread(target=push, args=(raw, "queue:q", *expected))
    async with bridge_of() as one, bridge_of() as two, bridge_of() as three:
        async with running(one) as first, running(two) as second, running(three) as third:
            producing.start()
            await eventually(lambda: raw.xlen("stream:{q}") == len(expected), 30)
            await asyncio.to_thread(producing.join)
        tallies = [first.totals, second.totals, third.totals]
    assert stored(raw) == expected
    assert sum(tally.jobs for tally in tallies) == len(expected)


async def test_pushes_wake_a_waiting_bridge_at_once(raw, bridge_of, rarely):
    async with bridge_of("q", "other") as bridge, running(bridge):
        for number, list_ in enumerate([*LISTS, "queue:other:low"] * 5):
            await eventually(lambda: blocked(raw) == 6)
            push(raw, list_, b"%d" % number)
            stream = bridge_module.ListKeys(list_.split(":")[1]).stream(
                list_.split(":")[2] if list_.count(":") > 1 else "normal"
            )
            await eventually(lambda stream=stream, number=number: b"%d" % number in stored(raw, stream))


async def test_an_idle_bridge_sends_about_a_command_a_second(raw, bridge_of, monkeypatch):
    for name, seconds in (("SWEEP", 1.0), ("POLL", 0.2), ("DISCOVER", 1.0)):  # a fifth of each: five seconds in one
        monkeypatch.setattr(bridge_module, name, seconds)
    async with bridge_of("a", "b", "c") as bridge, running(bridge):
        await eventually(lambda: blocked(raw) == 9)
        raw.config_resetstat()
        await asyncio.sleep(1.0)
        calls = {name: stats["calls"] for name, stats in raw.info("commandstats").items()}
    ours = {name: calls.get(f"cmdstat_{name}", 0) for name in ("blmove", "evalsha", "eval", "scan")}
    assert sum(ours.values()) <= 12, ours  # nine bells, each once, and a look at all lists


async def test_ringing_takes_nothing_and_reorders_nothing(raw, bridge_of):
    """A bridge that is killed between the ring and the move leaves the list as it was."""
    async with bridge_of() as bridge:
        await bridge.move()
        waiting = asyncio.create_task(bridge.wait())
        await eventually(lambda: blocked(raw) == 3)
        push(raw, "queue:q", b"1", b"2", b"3")
        await waiting
        assert raw.lrange("queue:q", 0, -1) == [b"3", b"2", b"1"]
    assert raw.lrange("queue:q", 0, -1) == [b"3", b"2", b"1"]


async def test_the_namespace_goes_before_streams_and_not_before_lists(raw, bridge_of):
    push(raw, "queue:q", b"x")
    async with bridge_of(namespace="ns:") as bridge:
        await drained(bridge)
    assert stored(raw, "ns:stream:{q}") == [b"x"]


async def test_the_script_may_be_forgotten(raw, bridge_of):
    async with bridge_of() as bridge:
        push(raw, "queue:q", b"1")
        await bridge.move()
        raw.script_flush()
        push(raw, "queue:q", b"2")
        await bridge.move(everything=True)
    assert stored(raw) == [b"1", b"2"]


# -- what goes wrong


@pytest.mark.parametrize("wrong", ["queue:q", "stream:{q}"])
async def test_a_key_of_a_wrong_type_is_said_and_all_others_are_moved(raw, bridge_of, wrong):
    raw.set(wrong, "no")
    if wrong != "queue:q":
        push(raw, "queue:q", b"stays")
    push(raw, "queue:q:high", b"high")
    push(raw, "queue:other", b"other")
    with structlog.testing.capture_logs() as said:
        async with bridge_of("q", "other") as bridge:
            tally = await drained(bridge)
            await bridge.move(everything=True)
    assert raw.get(wrong) == b"no"
    assert stored(raw, "stream:{q}:high") == [b"high"]
    assert stored(raw, "stream:{other}") == [b"other"]
    if wrong != "queue:q":
        assert raw.lrange("queue:q", 0, -1) == [b"stays"]
    assert list(tally.stuck) == [("q", "normal")]
    (line,) = [each for each in said if each["event"] == "bridge_stuck"]  # once, and not at every look
    assert wrong in line["hint"]


async def test_a_key_that_has_become_right_is_moved(raw, bridge_of, monkeypatch):
    monkeypatch.setattr(bridge_module, "POLL", 0.02)
    raw.set("stream:{q}", "no")
    push(raw, "queue:q", b"x")
    async with bridge_of() as bridge, running(bridge) as bridging:
        await eventually(lambda: bridging.totals.stuck)
        raw.delete("stream:{q}")
        await eventually(lambda: raw.exists("stream:{q}") and stored(raw) == [b"x"])
        await eventually(lambda: not bridging.totals.stuck)


async def test_out_of_memory_jobs_are_moved_so_that_workers_can_make_room(raw, bridge_of):
    expected = [os.urandom(2_000) for _ in range(2000)]
    push(raw, "queue:q", *expected)
    async with bridge_of() as bridge, running(bridge, drain=False):
        await eventually(lambda: raw.xlen("stream:{q}") == 2000)
        await eventually(lambda: blocked(raw) == 3)
        push(raw, "queue:q", *expected)
        raw.config_set("maxmemory", 1)
        await eventually(lambda: raw.xlen("stream:{q}") == 4000)
        raw.config_set("maxmemory", 0)
        push(raw, "queue:q", b"after")
        await eventually(lambda: raw.xlen("stream:{q}") == 4001)
    assert stored(raw) == [*expected, *expected, b"after"]
    assert not raw.exists("queue:q")


@pytest.mark.parametrize("missing", ["rpop", "lindex", "xadd", "llen"])
async def test_whoever_may_not_do_all_of_it_does_none_of_it(own_server, bridge_of, missing):
    """Without RPOP each try would add the same element once more."""
    commands = {"rpop", "lindex", "llen", "xadd"} - {missing}
    with own_server.client() as raw:
        raw.execute_command(
            "ACL SETUSER", "half", "on", ">s", "~*", "-@all", "+evalsha", "+eval", "+info", "+blmove", "+client|id",
            "+client|setname", "+client|unblock", *(f"+{command}" for command in commands),
        )  # fmt: skip
        push(raw, "queue:q", b"x")
        async with bridge_of(url=f"redis://half:s@127.0.0.1:{own_server.port}/0") as bridge:
            for _ in range(3):
                with pytest.raises(ConfigurationError, match="extend the ACL"):
                    await bridge.move()
        assert len(raw.lrange("queue:q", 0, -1)) + raw.xlen("stream:{q}") == 1


async def test_an_error_in_the_script_that_is_everybodys_is_no_lists_fault(raw, bridge_of):
    push(raw, "queue:q", b"x")
    async with bridge_of() as bridge:
        raw.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            with structlog.testing.capture_logs() as said, pytest.raises(Exception, match="READONLY|can do nothing"):
                await bridge.move()
        finally:
            raw.execute_command("REPLICAOF", "NO", "ONE")
        assert not [each for each in said if each["event"] == "bridge_stuck"]
        await drained(bridge)
    assert stored(raw) == [b"x"]


# -- which lists


async def test_all_finds_lists_of_queues_and_leaves_everything_else_alone(raw, bridge_of):
    for list_ in ("queue:a", "queue:b:high", "queue:c.d-e:low", "queue:nested:name"):
        push(raw, list_, list_.encode())
    others = [
        "queue:a:claimed:worker-1",
        "queue:{x}",
        "queue:",
        "queue:has space",
        "queue:" + "x" * 101,
        "other",
        "xqueue:a",
    ]
    for list_ in others:
        push(raw, list_, b"stays")
    raw.set("queue:text", "no list")
    async with bridge_of(None) as bridge:
        await drained(bridge)
    expected = {b"stream:{a}", b"stream:{b}:high", b"stream:{c.d-e}:low", b"stream:{nested:name}"}
    # A look for orphans in between leaves its token in a meta key.
    assert {key for key in raw.keys("stream:*") if not key.endswith(b":meta")} == expected
    assert stored(raw, "stream:{a}") == [b"queue:a"]
    assert stored(raw, "stream:{b}:high") == [b"queue:b:high"]
    assert stored(raw, "stream:{c.d-e}:low") == [b"queue:c.d-e:low"]
    assert stored(raw, "stream:{nested:name}") == [b"queue:nested:name"]
    assert all(raw.lrange(list_, 0, -1) == [b"stays"] for list_ in others)
    raw.delete("other", "xqueue:a")


HELD = [
    "queue:q:processing",
    "queue:q:processing:host-1",
    "queue:processing:q",
    "queue:q:In-Progress",
    "queue:q:failed",
    "queue:q-processing",
    "queue:processing",
]
OURS = ["queue:q", "queue:q:high", "queue:order-processing", "queue:failed", "queue:active:low", "queue:my:processing"]


async def test_all_skips_and_names_what_other_programs_workers_hold(raw, bridge_of):
    for list_ in (*HELD, *OURS, "queue:old:active"):
        push(raw, list_, list_.encode())
    raw.lpush("queue:mine:active:claimed:worker-1", "ours")
    with structlog.testing.capture_logs() as logs:
        async with bridge_of(None, known=frozenset(["my:processing"])) as bridge:
            await drained(bridge)
            await bridge.move(everything=True)
    skipped = [each["list"] for each in logs if each["event"] == "bridge_skipped"]
    assert sorted(skipped) == sorted([*HELD, "queue:old:active"])  # each once
    assert all(raw.lrange(list_, 0, -1) == [list_.encode()] for list_ in skipped)
    assert not any(raw.exists(list_) for list_ in OURS)
    assert "queue:q:processing moves" not in str(logs) and "--queue q:processing moves it" in str(logs)
    assert {each["queue"] for each in logs if each["event"] == "bridge_found"} >= {"mine:active", "my:processing", "q"}
    async with bridge_of("old:active") as bridge:
        await drained(bridge)
    assert stored(raw, "stream:{old:active}") == [b"queue:old:active"]
    raw.delete(*skipped, "queue:mine:active:claimed:worker-1")


async def test_all_finds_queues_that_come_later(raw, bridge_of, monkeypatch):
    monkeypatch.setattr(bridge_module, "DISCOVER", 0.05)
    monkeypatch.setattr(bridge_module, "SWEEP", 0.05)
    async with bridge_of(None) as bridge, running(bridge):
        push(raw, "queue:new", b"x")
        await eventually(lambda: raw.exists("stream:{new}"))
        await eventually(lambda: blocked(raw) == 3)  # and hangs bells on their lists
    assert stored(raw, "stream:{new}") == [b"x"]


async def test_more_lists_than_bells_are_looked_at_now_and_then(raw, bridge_of, monkeypatch):
    queues = [f"q{n}" for n in range(40)]  # 120 lists, 96 bells, two calls of the script
    monkeypatch.setattr(bridge_module, "POLL", 0.05)
    async with bridge_of(*queues) as bridge, running(bridge):
        await eventually(lambda: blocked(raw) == 96)
        for queue in queues:
            push(raw, f"queue:{queue}:low", queue.encode())
        await eventually(lambda: all(raw.exists(f"stream:{{{queue}}}:low") for queue in queues))
    assert all(stored(raw, f"stream:{{{queue}}}:low") == [queue.encode()] for queue in queues)


# -- what workers see


@STREAM
async def test_a_group_that_is_made_later_gets_everything(raw, bridge_of, broker_factory):
    push(raw, "queue:q", *[b'{"id":"%d","payload":{}}' % n for n in range(10)])
    async with bridge_of() as bridge:
        await drained(bridge)
    async with broker_factory("later") as broker:
        assert names(await broker.claim(100, 0, ())) == [str(n) for n in range(10)]


@STREAM
async def test_a_worker_that_waits_is_woken(raw, bridge_of, broker_factory):
    async with broker_factory("waiting") as broker, bridge_of() as bridge, running(bridge):
        claiming = asyncio.create_task(broker.claim(1, 5, ()))
        await eventually(lambda: blocked(raw) == 4)
        push(raw, "queue:q:high", b'{"id":"x","payload":{}}')
        assert names(await claiming) == ["x"]


async def test_the_script_alone_moves_from_the_right_end(raw, redis_url):
    raw.rpush("queue:q", "newest", "middle", "oldest")
    client = RedisAddress(redis_url).commands()
    reply = await scripts.BRIDGE(client, ["queue:q", "stream:{q}"], [2, 1000])
    await client.aclose()
    assert reply == [[2, 12, 1, b""]]
    assert stored(raw) == [b"oldest", b"middle"]
    assert raw.lrange("queue:q", 0, -1) == [b"newest"]
