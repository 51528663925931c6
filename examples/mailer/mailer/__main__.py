"""``mailer``: the commands. Workers are started with ``streamworker worker mailer.app:app``."""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import os
import secrets
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mailer import campaigns, database, ingest
from mailer.app import app
from mailer.config import Config
from mailer.jobs import CountEvents, WarmupOutbound
from streamworker import QueueWorker, StreamworkerError

Command: TypeAlias = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]

SINK_PORT = 2525


async def setup(_arguments: argparse.Namespace) -> None:
    """Create or update the tables: streamworker's and the mailer's."""
    async with app.migrator() as migrator:
        done = await migrator.up()
    async with database.connected() as pg:
        done += await database.migrate(pg)
    print("\n".join(f"applied {name}" for name in done) or "everything is there")


async def template(arguments: argparse.Namespace) -> None:
    """Create or replace a template."""
    html = arguments.html and arguments.html.read_text()
    async with database.connected() as pg:
        await campaigns.put_template(pg, arguments.name, arguments.subject, arguments.text.read_text(), html)


async def campaign(arguments: argparse.Namespace) -> None:
    """Start a campaign: one mail for each line of a CSV file with a column `email`."""
    with arguments.recipients.open(newline="", encoding="utf-8-sig") as file:
        async with database.connected() as pg:
            started = await campaigns.start(
                pg,
                app,
                name=arguments.name,
                template=arguments.template,
                sender=arguments.sender,
                domain=Config.load().domain,
                recipients=csv.DictReader(file),
            )
    for reason in started.left_out[:20]:
        print(f"left out: {reason}", file=sys.stderr)
    print(f"campaign {arguments.name}: {started.recipients} mails, {len(started.left_out)} lines left out")


async def report(arguments: argparse.Namespace) -> None:
    """What became of a campaign's mails."""
    async with database.connected() as pg:
        rows = await pg.fetch(
            "select status, count(*) as mails, sum(uncertain) as uncertain from mailer.email_deliveries delivery"
            " join mailer.campaigns campaign on campaign.id = delivery.campaign_id where campaign.name = $1"
            " group by status order by status",
            arguments.name,
        )
    for row in rows:
        print(f"{row['status']:12}{row['mails']:>10}")
    print(f"attempts whose end nobody knows (at most that many duplicates): {sum(row['uncertain'] for row in rows)}")


async def take_in(arguments: argparse.Namespace) -> None:
    """Enqueue the messages of an mbox file, a Maildir, or a single message."""
    async with database.connected() as pg:
        done = await ingest.ingest(pg, app, arguments.path, arguments.mailbox)
    print(f"{done.messages} messages, {done.new} of them new")


async def warmup(arguments: argparse.Namespace) -> None:
    """Begin to warm up a mailbox."""
    async with database.connected() as pg, pg.transaction():
        warmup_id = await pg.fetchval(
            "insert into mailer.warmup_configs (mailbox, seeds, template_id, reply_template_id)"
            " select $1, $2, first.id, reply.id from mailer.email_templates first, mailer.email_templates reply"
            " where first.name = $3 and reply.name = $4 returning id",
            arguments.mailbox,
            arguments.seeds.split(","),
            arguments.template,
            arguments.reply_template,
        )
        if warmup_id is None:
            raise campaigns.CampaignError("there is no such template: make both with `mailer template …`")
        await app.enqueue(WarmupOutbound(warmup_id=warmup_id, day=1), connection=pg)


async def count(arguments: argparse.Namespace) -> None:
    """Bring the metrics up to date, now and then every so often."""
    async with database.connected() as pg, pg.transaction():
        await app.enqueue(CountEvents(every=arguments.every), connection=pg)


async def webhook(arguments: argparse.Namespace) -> None:
    """Register a receiver; prints its secret."""
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
    async with database.connected() as pg:
        await pg.execute(
            "insert into mailer.webhooks (url, secret, events) values ($1, $2, $3)",
            arguments.url,
            secret,
            arguments.events.split(","),
        )
    print(secret)


async def sink(_arguments: argparse.Namespace) -> None:
    """An SMTP server on port 2525 that takes everything and delivers nothing."""
    from mailer.testing import smtp  # noqa: PLC0415 - needs aiosmtpd, which production does not

    async with smtp.serve(port=SINK_PORT):
        print(f"taking mail on 127.0.0.1:{SINK_PORT}")
        await asyncio.Event().wait()


async def try_it(arguments: argparse.Namespace) -> None:
    """Everything on this machine, until Ctrl-C: servers, tables, a template named welcome, `sink`, and a worker."""
    from mailer.testing import smtp  # noqa: PLC0415 - as above

    await setup(arguments)
    async with database.connected() as pg:
        await campaigns.put_template(pg, "welcome", "Welcome, {{name}}", "Dear {{name}},\n\nhello.\n", None)
    async with smtp.serve(port=SINK_PORT):
        await QueueWorker(app, redis=None, database=None, services=None).start()


def parser() -> argparse.ArgumentParser:
    """What may be said on the command line."""
    root = argparse.ArgumentParser(prog="mailer", description="An email pipeline on streamworker.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, *options: tuple[str, dict[str, Any]]) -> None:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        for flag, details in options:
            command.add_argument(flag, **details)

    needed: dict[str, Any] = {"required": True}
    file: dict[str, Any] = {"type": Path}
    add("setup", setup)
    add("try", try_it)
    add("sink", sink)
    add("template", template, ("name", {}), ("--subject", needed), ("--text", file | needed), ("--html", file))
    add(
        "campaign",
        campaign,
        ("name", {}),
        ("--template", needed),
        ("--sender", needed),
        ("--recipients", file | needed),
    )
    add("report", report, ("name", {}))
    add("ingest", take_in, ("path", file), ("--mailbox", needed))
    add("warmup", warmup, ("mailbox", {}), ("--seeds", needed), ("--template", needed), ("--reply-template", needed))
    add("count", count, ("--every", {"type": float}))
    add("webhook", webhook, ("url", {}), ("--events", {"default": "sent,failed,hard_bounce"}))
    return root


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; what went wrong is one sentence."""
    arguments = parser().parse_args(words)
    try:
        asyncio.run(arguments.run(arguments))
    except (ValueError, OSError, StreamworkerError) as error:
        if os.environ.get("MAILER_DEBUG"):
            raise
        print(f"mailer: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
