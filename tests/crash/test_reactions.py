"""One test per row of the table of reactions: what the server says, as it says it, and what a broker makes of it."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis

from streamworker.broker.redis.reactions import TABLE, Reaction, reaction_to, row_of
from streamworker.errors import ConfigurationError, PublishUncertain, StreamworkerError, Unreachable
from streamworker.job import Claim, Done
from tests.conftest import Server, eventually, free_port
from tests.contract.ground import GROUNDS
from tests.contract.helpers import ENDINGS, NORMAL, done, job, one, settle_one, stream_only

SAID = {
    "WRONGPASS": ["WRONGPASS invalid username-password pair or user is disabled.", "NOAUTH Authentication required."],
    "NOPERM": [
        "NOPERM User w has no permissions to run the 'evalsha' command",
        "ERR ACL failure in script: User w has no permissions to run the 'xpending' command script: on @user_script:1.",
        "ERR Error running script: @user_script: 1: The user executing the script can't run this command or subcommand",
    ],
    "READONLY": [
        "READONLY You can't write against a read only replica.",
        "ERR Error running script: -READONLY You can't",
    ],
    "UNBLOCKED": ["UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)"],
    "LOADING": ["LOADING Redis is loading the dataset in memory"],
    "MASTERDOWN": ["MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."],
    "CLUSTERDOWN": ["CLUSTERDOWN The cluster is down"],
    "TRYAGAIN": ["TRYAGAIN Multiple keys request during rehashing of slot"],
    "MISCONF": ["MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk."],
    "NOREPLICAS": ["NOREPLICAS Not enough good replicas to write."],
    "BUSY": ["BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."],
    "OOM": [
        "OOM command not allowed when used memory > 'maxmemory'.",
        "ERR Error running script: -OOM command not allowed",
    ],
    "NOGROUP": ["NOGROUP No such key 'stream:{q}' or consumer group 'workers'"],
    "WRONGTYPE": ["WRONGTYPE Operation against a key holding the wrong kind of value"],
}
RAISES = {
    Reaction.WAIT: Unreachable,
    Reaction.RECONNECT: Unreachable,
    Reaction.FATAL: ConfigurationError,
    Reaction.FULL: StreamworkerError,
    Reaction.HEAL: StreamworkerError,
    Reaction.KEY: StreamworkerError,
}


def sweep_soon(broker):
    for index, _ in enumerate(broker._source._reclaim_at):
        broker._source._reclaim_at[index] = 0.0


def test_every_row_is_here():
    assert {row.name for row in TABLE} - {"NOSCRIPT", "no connection"} == set(SAID)


class Liar:
    """Answers every script and XADD with one error line, and everything else with OK; counts connections."""

    def __init__(self, line: str) -> None:
        self._line = line.encode()
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Liar:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await self._answer(reader, writer)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            words = []
            for _ in range(int(head[1:])):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2])
            answer = b":7" if words[:2] == [b"CLIENT", b"ID"] else b"+OK"
            if words[0] in (b"EVALSHA", b"EVAL", b"XADD", b"LPUSH", b"LRANGE", b"LLEN"):
                answer = b"-" + self._line
            writer.write(answer + b"\r\n")
            await writer.drain()


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in SAID.items() for line in lines])
@pytest.mark.parametrize("mode", GROUNDS)
async def test_what_becomes_of_each_error(mode, name, line):
    row = row_of(line)
    assert row is not None and row.name == name
    ground = GROUNDS[mode](None)
    claim = Claim("q", "normal", ground.place(), b"1-1", 1, b"{}", b"")
    async with Liar(line) as liar:
        broker = ground.broker(liar.url, (("q", None),))
        try:
            for verb in (broker.claim(1, 0, ()), broker.settle([done(claim)]), broker.own_pending(()), broker.leave()):
                if name == "WRONGTYPE" or (name in ("NOGROUP", "OOM")):
                    await asyncio.gather(verb, return_exceptions=True)  # scripts never pass these on: see below
                    continue
                with pytest.raises(RAISES[row.reaction]) as caught:
                    await verb
                assert type(caught.value) is RAISES[row.reaction]
            if row.reaction is not Reaction.FATAL:
                with pytest.raises(RAISES[row.reaction]):
                    await broker.renew([claim])
            # An error is an answer: nothing was stored, and nobody need wonder.
            with pytest.raises(StreamworkerError) as caught:
                await broker.publish([job()])
            assert not isinstance(caught.value, PublishUncertain)
            before = liar.connections
            await asyncio.gather(broker.claim(1, 0, ()), return_exceptions=True)
            if name not in ("WRONGPASS", "LOADING"):  # those the client itself gives up a connection for
                assert (liar.connections > before) == (row.reaction is Reaction.RECONNECT)
        finally:
            await broker.close()


def test_no_connection_and_unknown_errors():
    assert reaction_to(redis.ConnectionError("reset")) is Reaction.WAIT
    assert reaction_to(redis.TimeoutError()) is Reaction.WAIT
    assert reaction_to(redis.BusyLoadingError("x")) is Reaction.WAIT
    assert reaction_to(redis.AuthenticationError("x")) is Reaction.FATAL  # a ConnectionError, and yet no outage
    assert reaction_to(redis.ResponseError("ERR unknown command")) is Reaction.REFUSE


async def test_noscript_is_sent_again(broker_factory, ground, raw):
    async with broker_factory("w") as broker:
        await broker.publish([job("a")])
        claim = await one(broker)
        for _ in range(3):
            raw.script_flush()
            assert await broker.renew([claim]) == []
        raw.script_flush()
        await settle_one(broker, done(claim))
    assert ground.left() == 0


@stream_only
async def test_nogroup_is_healed_while_waiting(broker_factory, raw):
    async with broker_factory("w") as broker:
        waiting = asyncio.create_task(broker.claim(1, 5, ()))
        await asyncio.sleep(0.1)
        raw.delete(NORMAL)
        while not (claims := await waiting):
            raw.xadd(NORMAL, {"job": '{"id":"x","payload":{}}'})
            waiting = asyncio.create_task(broker.claim(1, 0.2, ()))
        assert claims[0].place == NORMAL


@stream_only
async def test_unblocked_by_force_is_no_error(broker_factory, raw):
    async with broker_factory("w") as broker:
        waiting = asyncio.create_task(broker.claim(1, 5, ()))
        reader = broker._session.reader
        await eventually(lambda: reader.client_id is not None and raw.client_unblock(reader.client_id, error=True))
        assert await waiting == []
        await broker.publish([job("a")])
        assert len(await broker.claim(1, 1, ())) == 1


async def test_out_of_memory_finishes_claims_and_rescues(broker_factory, ground, raw):
    async with broker_factory("dead", lease=0.2) as other, broker_factory("w", lease=0.2) as broker:
        await broker.publish([job(str(n)) for n in range(3)])
        await other.claim(1, 0, ())
        mine = await one(broker)
        for claim in (mine,):
            assert await broker.renew([claim]) == []
        raw.config_set("maxmemory", 1)
        assert await broker.renew([mine]) == []
        await broker.beat({"pid": 1})
        await settle_one(broker, done(mine))
        await asyncio.sleep(0.25)
        ground.sweep_soon(broker)
        rest = await broker.claim(10, 0, ())
        assert sorted(claim.count for claim in rest) == [1, 2]
        assert all([await settle_one(broker, done(claim)) for claim in rest])
        raw.config_set("maxmemory", 0)
    assert ground.left() == 0


DENIED = {
    "xpending": "-xpending",
    "xreadgroup": "-xreadgroup",
    "xautoclaim": "-xautoclaim",
    "xack": "-xack",
    "xclaim": "-xclaim",
}


@stream_only
@pytest.mark.parametrize("command", DENIED)
async def test_a_missing_permission_is_never_a_lost_claim(broker_factory, raw, redis_url, command):
    raw.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "&*", "+@all")
    try:
        async with broker_factory("w", url=redis_url.replace("//", "//w:p@"), lease=1) as broker:
            await broker.publish([job(str(n)) for n in range(3)])
            claim = await one(broker)
            raw.execute_command("ACL", "SETUSER", "w", DENIED[command])
            if command not in ("xreadgroup", "xautoclaim"):
                refused = [broker.settle([done(claim)])]
                if command == "xclaim":
                    refused[0].close()
                    refused = []
                if command == "xpending":
                    refused += [broker.own_pending(()), broker.leave()]
                for verb in refused:
                    with pytest.raises(ConfigurationError):
                        await verb
            if command in ("xpending", "xclaim"):
                with pytest.raises(ConfigurationError):
                    await broker.renew([claim])
            if command in ("xreadgroup", "xautoclaim"):
                raw.hdel("stream:{q}:meta", "sweep")
                sweep_soon(broker)
                with pytest.raises(ConfigurationError):
                    await broker.claim(5, 0, [claim])
            raw.execute_command("ACL", "SETUSER", "w", "+@all")
            assert raw.xpending(NORMAL, "workers")["pending"] == 1
            await settle_one(broker, done(claim))
    finally:
        raw.execute_command("ACL", "DELUSER", "w")


@stream_only
@pytest.mark.parametrize("forgotten", ["group", "entry", "nothing"])
async def test_a_replica_never_calls_a_claim_lost(broker_factory, raw, forgotten):
    """A demoted master answers from its past, perhaps from somebody else's: that is READONLY, whatever it knows."""
    try:
        async with broker_factory("w", lease=30) as broker:
            await broker.publish([job(str(n)) for n in range(4)])
            claims = await broker.claim(4, 0, ())
            if forgotten == "group":
                raw.xgroup_destroy(NORMAL, "workers")
            elif forgotten == "entry":
                raw.xack(NORMAL, "workers", *(claim.entry for claim in claims))
            raw.replicaof("127.0.0.1", free_port())
            with pytest.raises(Unreachable, match="READONLY"):
                await broker.renew(claims)
            for ending in ENDINGS.values():
                with pytest.raises(Unreachable, match="READONLY"):
                    await broker.settle([ending(claim) for claim in claims])
            with pytest.raises(Unreachable, match="READONLY"):
                await broker.confirm(claims[0])
            if forgotten != "nothing":
                with pytest.raises(Unreachable, match="READONLY"):
                    await broker.leave()
            raw.replicaof("NO", "ONE")
            assert sorted(map(repr, await broker.renew(claims))) == sorted(
                map(repr, claims if forgotten != "nothing" else [])
            )
    finally:
        raw.replicaof("NO", "ONE")


@pytest.mark.parametrize("mode", GROUNDS)
async def test_the_first_command_after_an_outage_takes_nobody_for_dead(mode, own_server: Server):
    """Whoever could not renew gets a lease to come back, from the very first sweep on."""
    of = GROUNDS[mode]
    slow, quick = (of(None).broker(own_server.url, (("q", None),), lease=0.6) for _ in range(2))
    try:
        for broker, name in ((slow, "slow"), (quick, "quick")):
            await broker.open()
            await broker.join(name)
            of(None).sweep_soon(broker)
        await slow.publish([job("a")])
        claim = await one(slow)
        own_server.kill()
        for _ in range(2):
            with pytest.raises(Unreachable):
                await quick.claim(1, 0, ())
            await asyncio.sleep(0.5)
        own_server.start()
        of(None).sweep_soon(quick)
        began = time.monotonic()
        assert await quick.claim(1, 0, ()) == []
        assert await slow.renew([claim]) == []
        assert isinstance(done(claim).verdict, Done)
        while time.monotonic() - began < 0.9:
            assert await quick.claim(1, 0, ()) == []
            assert await slow.renew([claim]) == []
        with own_server.client() as raw:
            of(raw).ripen(claim)
            await asyncio.sleep(0.7)
            assert len(await quick.claim(1, 0, ())) == 1
    finally:
        await slow.close()
        await quick.close()


async def test_a_worker_starts_while_the_server_is_out_of_memory(broker_factory, ground, raw):
    async with broker_factory("first") as broker:
        await broker.publish([job("a")])
    raw.config_set("maxmemory", 1)
    async with broker_factory("second") as broker:
        claim = await one(broker)
        await settle_one(broker, done(claim))
    assert ground.left() == 0
