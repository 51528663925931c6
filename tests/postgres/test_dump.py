"""What a dump of PostgreSQL shows to who steals it: a sentence of docs/security.md each."""

from __future__ import annotations

from streamworker import App, Payload
from tests.conftest import eventually
from tests.postgres.working import settings_for, working

TABLES = "select tablename from pg_tables where schemaname = 'streamworker' order by 1"


class Note(Payload, kind="note", queue="q"):
    text: str
    fails: bool = False


async def test_a_dump_shows_jobs_keys_results_and_names_and_no_password(redis_url, database_url, pg):
    url = redis_url.replace("://", "://default:S3cr3t@")  # a server without a password takes any
    app = App(settings=settings_for(url, database_url, relay="on", worker_id="pod-7"))

    @app.handler(max_attempts=1, result_ttl=60)
    async def note(payload: Note) -> str:
        if payload.fails:
            raise ValueError("no postgresql://shop:S3cr3t@db/shop for ada")
        return "result of " + payload.text

    async def ended() -> bool:
        found = await pg.fetch("select status from streamworker.jobs")
        return sorted(each["status"] for each in found) == ["completed", "completed", "dead"]

    async with app, working(app):
        async with pg.transaction():
            await app.enqueue(
                Note(text="payload-of-ada"), key="key-of-ada", headers={"tenant": "header-of-ada"}, connection=pg
            )
            await app.enqueue(Note(text="x", fails=True), connection=pg)
        await app.enqueue(Note(text="straight-into-redis"))
        await eventually(ended)
    rows: list[str] = []
    for (table,) in await pg.fetch(TABLES):
        rows += [row for (row,) in await pg.fetch(f"select t::text from streamworker.{table} t")]
    copy = "\n".join(rows)
    for shown in (
        "payload-of-ada",
        "key-of-ada",
        "header-of-ada",
        "straight-into-redis",
        "result of payload-of-ada",
        "for ada",
        "pod-7",
    ):
        assert shown in copy, shown
    assert "S3cr3t" not in copy
