"""The sentences of docs/security.md that no other test holds: what a producer may send, what a copy of the servers shows."""

from __future__ import annotations

import json
import socket
from typing import Any

import anyio
import msgspec

from streamworker import App, Context, Payload, codec
from streamworker.codec import State, sealed
from streamworker.settings.rules import QueueSpec
from tests.conftest import eventually
from tests.contract.helpers import DEAD, META, settings, stream_only, working


class Ping(Payload, kind="ping", queue="public"):
    """What strangers may send."""


class Pay(Payload, kind="pay", queue="billing"):
    """What they may not."""

    amount: int


class Note(Payload, kind="note", queue="q"):
    text: str
    fails: bool = False


async def test_a_worker_of_several_queues_runs_its_kinds_from_any_of_them(ground, raw):
    paid: list[tuple[str, int]] = []
    app = App(settings=settings(raw, ground, queues=(QueueSpec("public", None), QueueSpec("billing", None))))

    @app.handler
    async def ping(payload: Ping) -> None: ...

    @app.handler
    async def pay(payload: Pay, ctx: Context) -> None:
        paid.append((ctx.job.queue, payload.amount))

    ground.push(json.dumps({"kind": "pay", "payload": {"amount": 7}}), queue="public")
    async with working(app):
        await eventually(lambda: ground.empty("public"))
    assert paid == [("public", 7)]


async def test_a_worker_of_one_queue_has_no_handler_for_the_kinds_of_another_app(ground, raw):
    app = App(settings=settings(raw, ground, unknown_kind_ttl=0.0))
    ran: list[str] = []

    @app.handler
    async def note(payload: Note) -> None:
        ran.append(payload.text)

    ground.push(json.dumps({"id": "stranger", "kind": "pay", "payload": {"amount": 7}}))
    ground.push(json.dumps({"id": "module", "kind": "os.system", "payload": {"command": "true"}}))
    ground.push(json.dumps({"id": "mine", "kind": "note", "payload": {"text": "x"}}))
    async with working(app):
        await eventually(lambda: raw.xlen(DEAD) == 2 and ran == ["x"])
    assert {json.loads(fields[b"job"])["id"] for _, fields in raw.xrange(DEAD)} == {"stranger", "module"}


def everything(raw: Any) -> bytes:
    """What a dump holds: every key with all that is in it."""
    found = []
    for key in raw.keys("*"):
        match raw.type(key):
            case b"hash":
                value: Any = raw.hgetall(key)
            case b"list":
                value = raw.lrange(key, 0, -1)
            case b"zset":
                value = raw.zrange(key, 0, -1)
            case b"stream":
                value = raw.xrange(key)
            case b"set":
                value = raw.smembers(key)
            case _:
                value = raw.get(key)
        found.append(repr((key, value)).encode())
    return b"\n".join(found)


async def test_a_copy_of_redis_shows_jobs_keys_results_names_and_the_secret_and_no_password(ground, raw):
    plain = settings(raw, ground, worker_id="pod-7")
    url = str(plain.redis_url).replace("://", "://default:S3cr3t@")  # a server without a password takes any
    app = App(settings=msgspec.structs.replace(plain, redis_url=url))
    go = anyio.Event()

    @app.handler(max_attempts=1, result_ttl=60)
    async def note(payload: Note) -> str:
        if payload.fails:
            raise ValueError("no postgresql://shop:S3cr3t@db/shop for ada")
        if payload.text == "held":
            await go.wait()
        return "result of " + payload.text

    async with app, working(app):
        await app.enqueue(Note(text="done"), key="key-of-ada")
        await app.enqueue(Note(text="dead", fails=True))
        await app.enqueue(Note(text="held"), headers={"tenant": "header-of-ada"})
        await app.enqueue(Note(text="later"), delay=3600)
        await eventually(lambda: raw.xlen(DEAD) == 1 and ground.left() == 1 and raw.keys("streamworker:worker:*"))
        await eventually(lambda: b"result of done" in everything(raw))
        copy = everything(raw)
        go.set()
    for shown in (
        b"key-of-ada",
        b"held",
        b"header-of-ada",
        b"later",
        b"dead",
        b"for ada",
        b"pod-7",
        raw.hget(META, "secret"),
        socket.gethostname().encode(),
    ):
        assert shown in copy, shown
    assert b'"text":"done"' not in copy  # it has completed, and is gone
    assert b"S3cr3t" not in copy


@stream_only
async def test_who_has_read_the_secret_can_make_seals_where_it_may_write(ground, raw, broker_factory):
    async with broker_factory("w") as broker:
        state = sealed(State(4), "i", raw.hget(META, "secret"))
        ground.push(json.dumps({"id": "i", "payload": {}, "streamworker_state": state}))
        (claim,) = await broker.claim(1, 0, ())
        assert codec.state_of(codec.read(claim.body), claim.secret).deliveries == 4
