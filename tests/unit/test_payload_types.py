"""Payloads that are dataclasses or pydantic models: the same names, the same typing, the same refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from streamworker import App, Context, Handlers, Payload, testing
from streamworker.codec import encode_payload
from streamworker.errors import ConfigurationError, InvalidJob, UsageError
from streamworker.integrations.dataclasses import DataclassPayload
from streamworker.integrations.pydantic import PydanticPayload
from streamworker.job import Ok, Undecodable


@dataclass
class Address:
    city: str


class AddressModel(BaseModel):
    city: str


@dataclass
class SendData(DataclassPayload, kind="data.send", queue="mail", aliases=("data.mail",)):
    invoice: UUID
    to: list[Address] = field(default_factory=list)
    at: datetime | None = None
    ratio: float | None = None


class SendModel(PydanticPayload, kind="model.send", queue="mail", aliases=("model.mail",)):
    invoice: UUID
    to: list[AddressModel] = Field(default_factory=list)
    at: datetime | None = None
    ratio: float | None = None


class Struct(Payload, kind="struct.send", queue="mail"):
    invoice: UUID


NUMBER = UUID(int=7)
FULL: list[Any] = [
    SendData(NUMBER, [Address("Kyiv")], datetime(2026, 1, 2, tzinfo=UTC), 0.5),
    SendModel(invoice=NUMBER, to=[AddressModel(city="Kyiv")], at=datetime(2026, 1, 2, tzinfo=UTC), ratio=0.5),
]
BOTH = pytest.mark.parametrize("cls", [SendData, SendModel])


@pytest.mark.parametrize("payload", FULL, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("sync", [False, True])
async def test_a_handler_is_given_what_was_enqueued(payload, sync):
    app, seen = App(), []
    cls = type(payload)
    if sync:

        def handler(payload: cls, ctx: Context) -> str:
            seen.append(payload)
            return ctx.job.kind
    else:

        async def handler(payload: cls, ctx: Context) -> str:
            seen.append(payload)
            return ctx.job.kind

    handler.__annotations__["payload"] = cls
    app.handler(handler)
    assert await testing.run(app, payload) == Ok(cls.__kind__)
    assert seen == [payload] and type(seen[0]) is cls
    job = app.job(payload, priority="high")
    assert (job.kind, job.queue) == (cls.__kind__, "mail")
    assert msgspec.json.decode(job.payload) == {
        "invoice": str(NUMBER),
        "to": [{"city": "Kyiv"}],
        "at": "2026-01-02T00:00:00Z",
        "ratio": 0.5,
    }
    assert app.handler_of(cls.__aliases__[0], "") is app.handler_of(cls.__kind__, "")


@BOTH
def test_what_does_not_fit_its_own_type_is_refused_at_enqueue(cls):
    wrong = cls(invoice=NUMBER) if cls is SendData else cls.model_construct(invoice=NUMBER)
    wrong.invoice = "secret-text"
    with pytest.raises(InvalidJob, match=rf"does not fit its own type: {cls.__name__}.invoice: ") as error:
        App().job(wrong)
    assert "secret-text" not in str(error.value)
    wrong = cls(invoice=NUMBER)
    wrong.to = [5]
    with pytest.raises(InvalidJob, match=rf"{cls.__name__}.to\[0\]"):
        App().job(wrong)


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_are_refused(cls, value):
    with pytest.raises(InvalidJob, match=rf"{cls.__name__}.ratio is NaN or an infinity"):
        App().job(cls(invoice=NUMBER, ratio=value))
    assert b"null" in bytes(encode_payload(cls(invoice=NUMBER)))


def test_a_model_that_writes_no_json_is_refused():
    class Odd(PydanticPayload, kind="odd", queue="q"):
        model_config = ConfigDict(ser_json_inf_nan="constants")
        ratio: float

    with pytest.raises(InvalidJob, match="no JSON object"):
        App().job(Odd(ratio=math.nan))


def test_models_keep_their_aliases_and_validators():
    class Aliased(PydanticPayload, kind="aliased", queue="q", frozen=True):
        number: int = Field(alias="Number", ge=1)

        @field_validator("number")
        @classmethod
        def even(cls, value: int) -> int:
            if value % 2:
                raise ValueError(f"{value} is odd")
            return value

    text = bytes(encode_payload(Aliased(Number=4)))
    assert text == b'{"Number":4}'
    app = App()
    seen = []

    @app.handler
    async def handler(payload: Aliased) -> None:
        seen.append(payload)

    registration = app.handler_of("aliased", "")
    assert registration is not None
    assert registration.decode(msgspec.Raw(text)) == Aliased(Number=4)
    with pytest.raises(msgspec.ValidationError, match=r"\.Number"):
        registration.decode(msgspec.Raw(b'{"Number": 0}'))


async def test_a_document_that_does_not_fit_is_undecodable_and_says_where_without_the_value():
    app = App()

    @app.handler
    async def handler(payload: SendModel) -> None: ...

    @app.handler
    async def data(payload: SendData) -> None: ...

    for kind in ("model.send", "data.send"):
        job = app.job(Struct(NUMBER))
        outcome = await testing.run(
            app, msgspec.structs.replace(job, kind=kind, payload=msgspec.Raw(b'{"invoice": "hidden"}'))
        )
        assert isinstance(outcome, Undecodable)
        assert "invoice" in outcome.error and "hidden" not in outcome.error


async def test_limits_and_batches_know_their_fields():
    group = Handlers[Any]()

    @group.handler(concurrency=1, limit_by="invoice")
    async def one(payload: SendModel) -> None: ...

    @group.handler(concurrency=1, limit_by="invoice", batch=10)
    async def many(payloads: list[SendData]) -> None: ...

    for cls in (SendModel, SendData):
        with pytest.raises(ConfigurationError, match="no field of its payload"):

            async def wrong(payload: cls) -> None: ...

            wrong.__annotations__["payload"] = cls
            Handlers[Any]().handler(concurrency=1, limit_by="nothing")(wrong)


def test_names_are_checked_as_those_of_payload():
    for base in (DataclassPayload, PydanticPayload):
        with pytest.raises(TypeError, match=rf"Odd needs a kind and a queue: class Odd\({base.__name__}, kind='...'"):
            type(base)("Odd", (base,), {"__module__": __name__})
        with pytest.raises(TypeError, match="is no kind"):
            type(base)("Odd", (base,), {"__module__": __name__}, kind="a b", queue="q")
        with pytest.raises(ConfigurationError, match="no queue name"):
            type(base)("Odd", (base,), {"__module__": __name__}, kind="a", queue="q:high")


def test_what_is_no_payload_is_refused_as_before():
    @dataclass
    class Plain:
        n: int

    class Undecorated(DataclassPayload, kind="undecorated", queue="q"):
        n: int

    with pytest.raises(UsageError, match="a Plain is no payload"):
        App().job(Plain(1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="SendModel is a class: enqueue an instance"):
        App().job(SendModel)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Undecorated is no dataclass: decorate it with @dataclass"):
        App().job(Undecorated())
    for root in (DataclassPayload, PydanticPayload):
        with pytest.raises(UsageError, match="is no payload"):
            App().job(root())


def test_order_and_fairness_keys_are_fields_of_theirs():
    @dataclass
    class Ordered(DataclassPayload, kind="ordered", queue="q", order_by="account", on_dead="halt"):
        account: int

    class Fair(PydanticPayload, kind="fair", queue="q", fair_by="tenant"):
        tenant: UUID

    @dataclass
    class Wrong(DataclassPayload, kind="wrong", queue="q", order_by="nothing"):
        account: int

    assert (App().job(Ordered(7)).order_key, Ordered.__halts__) == ("7", True)
    assert App().job(Fair(tenant=NUMBER)).fair_key == str(NUMBER)
    with pytest.raises(TypeError, match="Wrong: order_by='nothing' names no field of it"):
        App().job(Wrong(7))
    with pytest.raises(TypeError, match="'halt' beside order_by"):
        type("Odd", (DataclassPayload,), {"__module__": __name__}, kind="odd", queue="q", on_dead="halt")
