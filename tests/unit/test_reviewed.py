"""What a hostile review found around handlers: each of these once ended a worker, lost a job, or ran one for nothing."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import msgspec
import pytest

from streamworker import App, Context, Discard, Handlers, Payload, Settings, Snooze, testing
from streamworker.errors import ConfigurationError, UsageError
from streamworker.job import Ok, Raised, Undecodable
from streamworker.producer import make_job


class Odd(Payload, kind="odd", queue="odd"):
    n: int = 0

    def __post_init__(self) -> None:
        assert self.n < 10, "too odd"


class Plain(Payload, kind="plain", queue="plain"):
    n: int = 0


def app_of(function: Any) -> App[None]:
    app = App(settings=Settings(redis_url="redis://127.0.0.1:1"))
    app.handler(function)
    return app


async def test_a_payload_whose_post_init_raises_anything_is_undecodable():
    async def odd(payload: Odd) -> None: ...

    bad = msgspec.structs.replace(make_job(Odd(n=1)), payload=msgspec.Raw(b'{"n":11}'))
    assert isinstance(await testing.run(app_of(odd), bad), Undecodable)
    assert isinstance(await testing.run(app_of(odd), Odd(n=1)), Ok)


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
async def test_what_a_wrapper_returns_is_awaited_once(wraps, is_async):
    ran: list[int] = []

    async def real(payload: Plain) -> str:
        ran.append(payload.n)
        return "done"

    if is_async:

        async def wrapper(payload: Plain) -> Any:
            return real(payload)
    else:

        def wrapper(payload: Plain) -> Any:
            return real(payload)

    function = functools.wraps(real)(wrapper) if wraps else wrapper
    assert await testing.run(app_of(function), Plain(n=7)) == Ok("done")
    assert ran == [7]


async def test_a_second_parameter_with_a_default_of_its_own_is_not_the_context():
    seen: list[Any] = []

    async def plain(payload: Plain, limit: int = 10) -> None:
        seen.append(limit)

    await testing.run(app_of(plain), Plain())
    assert seen == [10]


def test_a_keyword_nobody_can_give_is_refused():
    async def plain(payload: Plain, *, limit: int) -> None: ...

    with pytest.raises(ConfigurationError, match="keyword-only"):
        Handlers[Any]().handler(plain)


@pytest.mark.parametrize("wish", [Snooze(5), Discard("no")])
async def test_a_wish_raised_inside_a_task_group_is_still_a_wish(wish):
    async def plain(payload: Plain, ctx: Context) -> None:
        async def inner() -> None:
            raise wish

        async with asyncio.TaskGroup() as group:
            group.create_task(inner())

    outcome = await testing.run(app_of(plain), Plain())
    assert isinstance(outcome, Raised)
    assert outcome.error is wish


@pytest.mark.parametrize(
    "options",
    [
        {"delay": "5"},
        {"run_at": "tomorrow"},
        {"key": "\ud800"},
        {"key": 5},
        {"queue": 5},
        {"headers": ["x"]},
        {"priority": []},
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_one_sentence(options):
    with pytest.raises(UsageError):
        make_job(Plain(), **options)
