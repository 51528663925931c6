"""The worker of the producers' jobs: ``streamworker worker worker:app``, in list mode or beside a bridge."""

import os

from streamworker import App, Context, Payload


class SendEmail(Payload, kind="email.send", queue=os.environ.get("QUEUE", "email-sending")):
    """A mail to send."""

    to: str
    subject: str = ""


app = App()


@app.handler
async def send_email(email: SendEmail, ctx: Context) -> None:
    """Stands for sending it."""
    # The only handler of its queue: jobs need no "kind".
    ctx.log.info("email_sent", to=email.to, subject=email.subject)
