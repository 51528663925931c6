"""Queue ``analytics``: daily metrics of campaigns, from events, each counted once.

Incremental, and the increment is the trap: events get their ids when they are written and become visible when they
commit, in another order. "Everything after the last id" loses those that commit late. So events carry their
transaction's id, and a count takes those of all transactions that were over, and no others: up to the oldest one
still running.
"""

from __future__ import annotations

from datetime import UTC, datetime
from time import time
from typing import Final

from mailer.jobs import CountEvents
from mailer.services import Services
from streamworker import Context, Handlers

analytics = Handlers[Services]()

_COUNT: Final = """
with horizon as (select pg_snapshot_xmin(pg_current_snapshot()) as xid),
progress as (select xid from mailer.analytics_progress),
fresh as (
    select event.* from mailer.email_events event, horizon, progress
    where event.xid >= progress.xid and event.xid < horizon.xid),
added as (
    insert into mailer.campaign_metrics as metrics
        (campaign_id, day, sent, failed, suppressed, hard_bounces, soft_bounces)
    select campaign_id, (at at time zone 'utc')::date,
        count(*) filter (where type = 'sent'), count(*) filter (where type = 'failed'),
        count(*) filter (where type = 'suppressed'), count(*) filter (where type = 'hard_bounce'),
        count(*) filter (where type = 'soft_bounce')
    from fresh where campaign_id is not null group by 1, 2
    on conflict (campaign_id, day) do update set
        sent = metrics.sent + excluded.sent, failed = metrics.failed + excluded.failed,
        suppressed = metrics.suppressed + excluded.suppressed,
        hard_bounces = metrics.hard_bounces + excluded.hard_bounces,
        soft_bounces = metrics.soft_bounces + excluded.soft_bounces)
update mailer.analytics_progress
set xid = horizon.xid, counted = counted + (select count(*) from fresh), at = now() from horizon
returning (select count(*) from fresh)
"""


@analytics.handler(max_attempts=10, timeout=300)
async def count_events(payload: CountEvents, ctx: Context[Services]) -> None:
    """Add what is new; then schedule the next count, if this is a series."""
    async with ctx.transaction() as pg:
        # One at a time, and locked by a statement of its own: the next one must see what the last one committed.
        await pg.execute("select from mailer.analytics_progress for update")
        counted = await pg.fetchval(_COUNT)
        if payload.every is not None:
            # The key makes two series that somebody started into one.
            turn = int(time() // payload.every) + 1
            await ctx.services.app.enqueue(
                payload,
                run_at=datetime.fromtimestamp(turn * payload.every, UTC),
                key=f"count:{payload.every:g}:{turn}",
                connection=pg,
            )
    ctx.log.info("events_counted", events=counted)
