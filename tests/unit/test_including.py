"""Groups of handlers: taken over whole or refused, filled before or after, conflicts named when they arise."""

from __future__ import annotations

import gc
import textwrap
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import msgspec
import pytest

from streamworker import App, Context, Handlers, Payload, Settings, codec, testing
from streamworker.errors import ConfigurationError, UsageError
from streamworker.job import Ok, Undecodable
from streamworker.observe import Observer

T = TypeVar("T")


class Send(Payload, kind="mail.send", queue="mail"):
    n: int = 0


class Bill(Payload, kind="bill", queue="billing", aliases=("invoice",)):
    n: int = 0


class Ping(Payload, kind="ping", queue="mail"):
    n: int = 0


class Box(Payload, Generic[T], kind="box", queue="boxes"):
    item: T


def group() -> Handlers[Any]:
    return Handlers()


def register(handlers: Handlers[Any], type_: type[Payload], name: str = "handle") -> None:
    async def handle(payload: Any) -> None: ...

    handle.__annotations__["payload"] = type_
    handle.__qualname__ = name
    handlers.handler(handle)


def kinds(handlers: Handlers[Any]) -> list[str]:
    return [each.kind for each in handlers.registrations]


# -- groups that are filled later


def test_a_group_may_be_filled_after_it_was_included():
    app, outer, inner, first = App(), group(), group(), group()
    app.include(first, outer)
    outer.include(inner)
    register(inner, Bill)
    register(app, Ping)
    register(first, Send)
    assert kinds(app) == ["mail.send", "bill", "ping"]  # by the place of the group, as workers take queues
    assert app.queues == ["mail", "billing"]
    assert app.handler_of("invoice", "") is inner.handler_of("bill", "")
    assert app.handler_of(None, "billing") is not None and app.handler_of(None, "mail") is None
    assert kinds(outer) == kinds(inner) == ["bill"]


def test_a_conflict_is_named_when_it_arises_and_leaves_nothing_behind():
    app, outer, inner, other = App(), group(), group(), group()
    app.include(outer, other)
    outer.include(inner)
    register(other, Bill, "the_first")
    with pytest.raises(ConfigurationError, match=r"'bill' has two handlers, .*the_first and .*the_second"):
        register(inner, Bill, "the_second")
    assert kinds(inner) == kinds(outer) == [] and kinds(app) == ["bill"]
    apart = group()
    register(apart, Send)
    register(apart, Bill, "the_third")
    with pytest.raises(ConfigurationError, match=r"'bill' has two handlers, .*the_first and .*the_third"):
        outer.include(apart)
    assert kinds(outer) == [] and kinds(app) == ["bill"]
    register(apart, Ping)
    assert app.handler_of("ping", "") is None  # it was refused, and is no part of it


def test_what_is_included_twice_is_said_to_be():
    app, left, right, shared = App(), group(), group(), group()
    app.include(left, right)
    left.include(shared)
    with pytest.raises(ConfigurationError, match="a group of handlers is included twice"):
        right.include(shared)
    register(shared, Send)
    for wrong in (right, app):
        with pytest.raises(ConfigurationError, match=r"'mail\.send' has two handlers.*: its group is included twice"):
            wrong.include(shared)
    assert kinds(app) == ["mail.send"]


def test_no_group_includes_itself():
    one, two, three = group(), group(), group()
    one.include(two)
    two.include(three)
    for wrong in (one, two, three):
        with pytest.raises(ConfigurationError, match="cannot include itself"):
            three.include(wrong)


@pytest.mark.parametrize("wrong", [5, None, Send, [Handlers()]])
def test_what_is_no_group_is_named(wrong):
    with pytest.raises(UsageError, match=r"include\(\) takes Handlers or an App, not \w+"):
        App().include(wrong)


def test_a_group_of_a_module_keeps_no_app_alive():
    shared, app = group(), App()
    app.include(shared)
    gone = weakref.ref(app)
    del app
    gc.collect()
    assert gone() is None
    register(shared, Send)
    again = App()
    again.include(shared)
    assert kinds(again) == ["mail.send"]


# -- apps in apps


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    yield


async def middleware(ctx: Any, call_next: Any) -> Any:
    return await call_next()


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"lifespan": lifespan}, "lifespan"),
        ({"middleware": [middleware]}, "middleware"),
        ({"observers": [Observer()]}, "observers"),
        ({"settings": Settings()}, "settings"),
        ({"lifespan": lifespan, "middleware": [middleware]}, "lifespan and middleware"),
    ],
)
def test_an_app_with_things_of_its_own_is_refused(own, words):
    between = group()
    inner: App[Any] = App(**own)
    register(inner, Send)
    between_ = group()
    for outer in (App(), between):
        with pytest.raises(ConfigurationError, match=rf"cannot take along the {words} of an App: give them to the App"):
            outer.include(inner)
        assert kinds(outer) == []
    outer = App()
    outer.include(between_)
    with pytest.raises(ConfigurationError, match=words):
        between_.include(inner)


def test_an_apps_schedules_come_along():
    outer, between, inner = App(), group(), App()
    inner.cron("@daily", Send(), name="mails")
    register(inner, Send)
    between.include(inner)
    outer.cron("@hourly", Ping())
    outer.include(between)
    inner.cron("@hourly", Bill())
    assert [each.name for each in outer.schedules] == ["ping", "mails", "bill"]
    assert [each.name for each in inner.schedules] == ["mails", "bill"]
    assert kinds(outer) == ["mail.send"]


def test_schedules_of_one_name_are_refused_whenever_they_meet():
    outer, inner, late = App(), App(), App()
    outer.include(inner)
    outer.cron("@daily", Send(), name="x")
    for wrong in (inner, outer):
        with pytest.raises(ConfigurationError, match="two schedules named 'x'"):
            wrong.cron("@hourly", Send(), name="x")
    late.cron("@hourly", Send(), name="x")
    with pytest.raises(ConfigurationError, match="two schedules named 'x'"):
        outer.include(late)
    with pytest.raises(ConfigurationError, match="two schedules named 'x'"):
        inner.include(late)
    assert [each.name for each in outer.schedules] == ["x"]


# -- types


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Import what a user wrote."""

    def make(name: str, text: str) -> Any:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(tmp_path))
        return __import__(name)

    return make


CHECKERS_ONLY = """\
    from __future__ import annotations
    from typing import TYPE_CHECKING
    import msgspec
    from streamworker import App, Payload
    if TYPE_CHECKING:
        from decimal import Decimal
    class Line(msgspec.Struct):
        name: str
        price: Decimal
    class Pay(Payload, kind="pay", queue="q"):
        name: str = ""

        amount: Decimal | None = None
    class Order(Payload, kind="order", queue="q"):
        lines: dict[str, list[Line]]
    class Child(Pay, kind="child", queue="q"):
        more: int = 0
    app = App()
"""


@pytest.mark.parametrize(
    ("name", "type_", "line", "field"),
    [("one", "Pay", 13, "Pay.amount"), ("two", "Order", 9, "Line.price"), ("three", "Child", 13, "Pay.amount")],
)
def test_types_for_type_checkers_alone_are_named_with_class_field_file_and_line(module, name, type_, line, field):
    user = module(f"checkers_{name}", CHECKERS_ONLY)
    says = rf"checkers_{name}\.py:{line}: the type '.*' of {field} cannot be resolved: import it at run time"
    with pytest.raises(ConfigurationError, match=says):
        register(user.app, getattr(user, type_))
    made = getattr(user, type_)(**({"lines": {}} if type_ == "Order" else {}))
    with pytest.raises(ConfigurationError, match=says):  # a producer has no handlers
        user.app.job(made)


def test_a_handlers_annotation_is_named_with_file_and_line(module):
    text = """\
        from __future__ import annotations
        from typing import TYPE_CHECKING
        from streamworker import App
        if TYPE_CHECKING:
            from nowhere import Pay
        app = App()

        @app.handler
        async def pay(payload: Pay) -> None: ...
    """
    with pytest.raises(ConfigurationError, match=r"annotated_late\.py:8: the annotation 'Pay' .* for pay"):
        module("annotated_late", text)


def test_a_type_that_cannot_be_decoded_is_named(module):
    text = """\
        import msgspec
        from streamworker import App, Payload
        class A(msgspec.Struct): ...
        class B(msgspec.Struct): ...
        class Either(Payload, kind="either", queue="q"):
            which: A | B
        app = App()
    """
    user = module("either_of_two", text)
    with pytest.raises(ConfigurationError, match=r"either_of_two\.py:5: the payload Either cannot be decoded: .*union"):
        register(user.app, user.Either)


async def test_local_classes_may_name_local_classes_under_future_annotations():
    class Line(msgspec.Struct):
        price: int

    class Local(Payload, kind="local", queue="q"):
        lines: list[Line]
        maybe: Line | None = None

    app = App()
    seen: list[Any] = []

    @app.handler
    async def local(payload: Local) -> None:
        seen.append(payload)

    assert isinstance(await testing.run(app, Local([Line(1)], Line(2))), Ok)
    assert seen == [Local([Line(1)], Line(2))]
    assert app.job(Local([])).payload


async def test_a_generic_payload_is_decoded_as_its_handler_says():
    app = App()
    seen: list[Any] = []

    @app.handler
    async def box(payload: Box[int]) -> None:
        seen.append(payload.item)

    (registration,) = app.registrations
    assert registration.payload is Box and registration.kind == "box"
    assert isinstance(await testing.run(app, Box(item=3)), Ok)
    assert isinstance(await testing.run(app, Box(item="x")), Undecodable)
    assert seen == [3]
    assert codec.encode_payload(Box[int](item=3)) == codec.encode_payload(Box(3))


def test_batches_of_a_generic_payload():
    app = App()

    @app.handler(batch=10)
    async def boxes(payloads: list[Box[int]], contexts: list[Context]) -> None: ...

    assert app.registrations[0].decode(msgspec.Raw(b'{"item":1}')) == Box(1)
    with pytest.raises(msgspec.ValidationError):
        app.registrations[0].decode(msgspec.Raw(b'{"item":"x"}'))
