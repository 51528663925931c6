"""Mistakes that type checkers must find: each ignore is required, and an unused one fails the test."""

from uuid import UUID

from streamworker import App, Context, Discard, Handlers, Payload


class SendInvoice(Payload, kind="invoice.send", queue="billing"):
    invoice_id: UUID
    copy_to: str | None = None


class Services:
    pass


class Others:
    pass


app = App()
billing = Handlers[Services]()

SendInvoice("no uuid")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SendInvoice()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
SendInvoice(UUID(int=1), unknown=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
SendInvoice(UUID(int=1)).copy_to = "x"  # pyright: ignore[reportAttributeAccessIssue]


@app.handler  # type: ignore[type-var, arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue, reportUntypedFunctionDecorator]
async def no_payload(payload: int) -> None: ...


@app.handler(max_attempts="three")  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportArgumentType]
async def wrong_option(payload: SendInvoice) -> None: ...


@app.handler(batch=10)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue, reportUntypedFunctionDecorator]
async def no_list(payload: SendInvoice) -> None: ...


@app.handler(batch=10)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue, reportUntypedFunctionDecorator]
async def one_context(payloads: list[SendInvoice], ctx: Context) -> None: ...


@app.handler(rate=100)  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportArgumentType]
async def no_rate(payload: SendInvoice) -> None: ...


@billing.handler  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue, reportUntypedFunctionDecorator]
async def other_services(payload: SendInvoice, ctx: Context[Others]) -> None: ...


@billing.handler
async def fine(payload: SendInvoice, ctx: Context[Services]) -> None:
    print(ctx.services.nothing)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType]
    ctx.attempt = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    print(Discard())  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def produce() -> None:
    await app.enqueue({"invoice_id": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await app.enqueue(SendInvoice(UUID(int=1)), later=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await app.enqueue(SendInvoice(UUID(int=1)), delay="soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await app.enqueue(SendInvoice(UUID(int=1)), expires_in="soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    app.job(SendInvoice(UUID(int=1)), run_at=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await fine(SendInvoice(UUID(int=1)))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


app.include(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
