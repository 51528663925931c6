"""Payload classes and the registry: what is taken, what is refused, and how a kind finds its handler."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any  # noqa: TID251 - this is about users who do it

import msgspec
import pytest

from streamworker import App, Backoff, Context, Handlers, Payload
from streamworker.errors import ConfigurationError
from streamworker.policy import Limits

if TYPE_CHECKING:
    from somewhere_else import Ctx, OnlyForCheckers


class Send(Payload, kind="mail.send", queue="mail", aliases=("mail.send.v1", "sendMail")):
    to: str
    copies: int = 0


class Other(Payload, kind="mail.other", queue="mail"):
    pass


class Lone(Payload, kind="lone", queue="lonely"):
    pass


# -- payloads


def test_a_payload_is_frozen_and_its_json_holds_the_fields_alone():
    made = Send("a@example.org")
    assert msgspec.json.encode(made) == b'{"to":"a@example.org","copies":0}'
    with pytest.raises(AttributeError):
        made.to = "x"
    assert (Send.__kind__, Send.__queue__, Send.__aliases__) == ("mail.send", "mail", ("mail.send.v1", "sendMail"))
    assert hash(made) == hash(Send("a@example.org"))


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({}, "needs a kind and a queue"),
        ({"kind": "k"}, "needs a kind and a queue"),
        ({"queue": "q"}, "needs a kind and a queue"),
        ({"kind": "", "queue": "q"}, "is no kind"),
        ({"kind": "a b", "queue": "q"}, "is no kind"),
        ({"kind": "a\n", "queue": "q"}, "is no kind"),
        ({"kind": "a\0", "queue": "q"}, "is no kind"),
        ({"kind": "k" * 201, "queue": "q"}, "is no kind"),
        ({"kind": "k", "queue": "q", "aliases": ("fine", "not fine")}, "is no kind"),
        ({"kind": "k", "queue": "q", "aliases": "old"}, "must be a tuple"),
        ({"kind": "k", "queue": ""}, "is no queue name"),
        ({"kind": "k", "queue": "q:high"}, "is no queue name"),
        ({"kind": "k", "queue": "a:low"}, "is no queue name"),
        ({"kind": "k", "queue": "q\n"}, "is no queue name"),
        ({"kind": "k", "queue": "q:high\n"}, "is no queue name"),
        ({"kind": "k", "queue": "a{b}"}, "is no queue name"),
        ({"kind": "k", "queue": "ä"}, "is no queue name"),
        ({"kind": "k", "queue": "q" * 101}, "is no queue name"),
    ],
)
def test_class_keywords_are_checked(keywords, says):
    with pytest.raises((TypeError, ConfigurationError), match=says):
        type(Payload)("Wrong", (Payload,), {}, **keywords)


@pytest.mark.parametrize("queue", ["q", "high", "low", "a:b", "A.b-c_d:9", "q" * 100, "highs:higher", "x:highest"])
def test_queue_names(queue):
    made = type(Payload)("Fine", (Payload,), {}, kind="k", queue=queue)
    assert made.__queue__ == queue


def test_a_subclass_names_its_own_kind():
    with pytest.raises(TypeError, match="needs a kind"):

        class Child(Send):
            pass

    class Named(Send, kind="named", queue="mail"):
        more: int = 1

    assert Named("x", more=2).more == 2
    assert Named.__aliases__ == ()


def test_options_of_msgspec_reach_it():
    class Renamed(Payload, kind="r", queue="q", rename="camel", omit_defaults=True):
        some_thing: int
        other_thing: int = 0

    assert msgspec.json.encode(Renamed(1)) == b'{"someThing":1}'


# -- registration


def test_with_and_without_parentheses_the_function_stays_as_it_was():
    handlers: Handlers[Any] = Handlers()

    def plain(payload: Send) -> str:
        return payload.to

    async def with_context(payload: Other, ctx: Context) -> None: ...

    assert handlers.handler(plain) is plain
    assert handlers.handler(max_attempts=3, timeout=None, backoff=Backoff(base=2))(with_context) is with_context
    assert plain(Send("x")) == "x"
    first, second = handlers.registrations
    assert (first.kind, first.queue, first.is_async, first.wants_context) == ("mail.send", "mail", False, False)
    assert first.limits == Limits(20, 300, Backoff(1, 300, 0.25))
    assert (second.kind, second.is_async, second.wants_context) == ("mail.other", True, True)
    assert second.limits == Limits(3, None, Backoff(base=2))
    assert first.name.endswith(
        "test_handlers.test_with_and_without_parentheses_the_function_stays_as_it_was.<locals>.plain"
    )


def test_a_kind_finds_its_handler_under_all_its_names():
    handlers: Handlers[Any] = Handlers()

    @handlers.handler
    async def send(payload: Send) -> None: ...

    (registration,) = handlers.registrations
    for kind in ("mail.send", "mail.send.v1", "sendMail"):
        assert handlers.handler_of(kind, "mail") is registration
        assert handlers.handler_of(kind, "elsewhere") is registration
    assert handlers.handler_of("mail.sent", "mail") is None
    assert handlers.queues == ["mail"]


def test_only_a_queue_with_one_handler_takes_jobs_without_kind():
    handlers: Handlers[Any] = Handlers()

    @handlers.handler
    async def send(payload: Send) -> None: ...
    @handlers.handler
    async def lone(payload: Lone) -> None: ...

    assert handlers.handler_of(None, "lonely") is handlers.handler_of("lone", "lonely")
    assert handlers.handler_of("", "mail") is handlers.handler_of("mail.send", "mail")
    assert handlers.handler_of(None, "nowhere") is None

    @handlers.handler
    async def other(payload: Other) -> None: ...

    assert handlers.handler_of(None, "mail") is None
    assert handlers.handler_of(None, "lonely") is not None
    assert handlers.queues == ["mail", "lonely"]


def test_groups_come_together():
    mail: Handlers[Any] = Handlers()
    lone: Handlers[Any] = Handlers()

    @mail.handler
    async def send(payload: Send) -> None: ...
    @lone.handler
    def single(payload: Lone) -> None: ...

    app = App()
    app.include(mail, lone)
    assert [each.kind for each in app.registrations] == ["mail.send", "lone"]
    assert app.handler_of("sendMail", "mail") is mail.handler_of("mail.send", "mail")
    with pytest.raises(ConfigurationError, match=r"'mail\.send' has two handlers"):
        app.include(mail)
    assert len(app.registrations) == 2


def test_a_kind_has_one_handler_also_through_aliases():
    class Old(Payload, kind="sendMail", queue="mail"):
        pass

    handlers: Handlers[Any] = Handlers()

    @handlers.handler
    async def send(payload: Send) -> None: ...

    with pytest.raises(ConfigurationError, match="two handlers, .*send and .*again"):

        @handlers.handler
        async def again(payload: Send) -> None: ...

    with pytest.raises(ConfigurationError, match="'sendMail' has two handlers"):

        @handlers.handler
        async def old(payload: Old) -> None: ...

    assert [each.kind for each in handlers.registrations] == ["mail.send"]
    assert handlers.handler_of(None, "mail") is not None  # nothing of the refused ones stayed


# -- annotations; this file is under `from __future__ import annotations`, they are all strings


def test_payload_classes_inside_functions_are_found():
    class Local(Payload, kind="local", queue="q"):
        pass

    handlers: Handlers[Any] = Handlers()

    @handlers.handler
    async def bare(payload: Local) -> None: ...

    assert handlers.registrations[0].payload is Local
    more: Handlers[Any] = Handlers()

    @more.handler(timeout=1)
    async def called(payload: Local, ctx: Context) -> None: ...

    assert more.registrations[0].payload is Local


def test_the_context_may_be_known_to_type_checkers_only():
    handlers: Handlers[Any] = Handlers()

    @handlers.handler
    async def typed(payload: Send, ctx: Ctx) -> OnlyForCheckers: ...

    assert handlers.registrations[0].wants_context


def test_a_payload_known_to_type_checkers_only_is_an_error_that_says_so():
    handlers: Handlers[Any] = Handlers()
    with pytest.raises(ConfigurationError, match="'OnlyForCheckers' of a handler's payload cannot be resolved"):

        @handlers.handler
        async def typed(payload: OnlyForCheckers) -> None: ...


def no_parameters() -> None: ...
def three(payload: Send, ctx: Context, more: int) -> None: ...
def keyword_only(*, payload: Send) -> None: ...
def unannotated(payload) -> None: ...
def wrong_type(payload: int) -> None: ...
def the_base(payload: Payload) -> None: ...
def not_a_class(payload: Send | None) -> None: ...
def many(*payload: Send) -> None: ...


@pytest.mark.parametrize(
    "function", [no_parameters, three, keyword_only, unannotated, wrong_type, the_base, not_a_class, many]
)
def test_functions_that_can_be_no_handler(function):
    handlers: Handlers[Any] = Handlers()
    with pytest.raises(ConfigurationError, match=function.__name__):
        handlers.handler(function)
    assert handlers.registrations == []


@pytest.mark.parametrize(
    "options",
    [{"max_attempts": 0}, {"timeout": 0}, {"timeout": -1}, {"retries": 3}, {"max_attempts": "many"}],
)
def test_senseless_options(options):
    with pytest.raises(ConfigurationError, match="options are wrong"):
        Handlers[Any]().handler(**options)


def test_decorated_functions_and_methods_and_callables():
    handlers: Handlers[Any] = Handlers()

    def timed(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    @handlers.handler
    @timed
    async def send(payload: Send) -> None: ...

    class Callee:
        async def __call__(self, payload: Other) -> None: ...

        async def method(self, payload: Lone, ctx: Context) -> None: ...

    instance = Callee()
    handlers.handler(instance)
    handlers.handler(instance.method)
    # A plain wrapper is called where plain functions are; what it returns is awaited.
    assert [each.is_async for each in handlers.registrations] == [False, True, True]
    assert [each.wants_context for each in handlers.registrations] == [False, False, True]


async def awaits(more: int, payload: Send) -> None: ...
def plain(more: int, payload: Send) -> None: ...


@pytest.mark.parametrize("function", [awaits, plain])
def test_partials(function):
    handlers: Handlers[Any] = Handlers()
    handlers.handler(functools.partial(function, 1))
    assert handlers.registrations[0].is_async == (function is awaits)
    assert not handlers.registrations[0].wants_context


def generator(payload: Send):
    yield


async def async_generator(payload: Send):
    yield


@pytest.mark.parametrize("function", [generator, async_generator])
def test_what_runs_nothing_when_called_is_no_handler(function):
    with pytest.raises(ConfigurationError, match="yields"):
        Handlers[Any]().handler(function)


def test_a_payload_decodes_strictly_and_ignores_what_it_does_not_know():
    handlers: Handlers[Any] = Handlers()

    @handlers.handler
    async def send(payload: Send) -> None: ...

    decode = handlers.registrations[0].decode
    assert decode(msgspec.Raw(b'{"to":"x","later":1}')) == Send("x")
    for wrong in (b'{"to":1}', b"{}", b"[]", b"null", b'"x"'):
        with pytest.raises(msgspec.ValidationError):
            decode(msgspec.Raw(wrong))


def test_registering_keeps_no_frame_alive():
    class Witness:
        pass

    import gc
    import weakref

    handlers: Handlers[Any] = Handlers()

    def register() -> weakref.ref[Witness]:
        witness = Witness()

        @handlers.handler
        async def send(payload: Send) -> None: ...

        return weakref.ref(witness)

    alive = register()
    gc.collect()
    assert alive() is None, sys.getrefcount(alive())
