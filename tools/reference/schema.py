"""The tables of the ledger: the migrations run on an embedded PostgreSQL, and its catalogue read."""

from __future__ import annotations

import asyncio
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import asyncpg

from streamworker import embedded
from streamworker.postgres.migrate import Migrator
from tools.reference.tables import code, table
from tools.site.sources import ROOT

Rows: TypeAlias = list[dict[str, Any]]

_COLUMN: Final = re.compile(r"^\s+(?P<name>[a-z_]+) [a-z].*?--\s*(?P<what>.+)$")
_COLUMNS: Final = """
  select c.relname as relation, a.attname as name, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull as required,
         coalesce(pg_get_expr(d.adbin, d.adrelid), '') as value
  from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
       left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
  where n.nspname = 'streamworker' and c.relkind in ('r', 'p') and a.attnum > 0 and not a.attisdropped
  order by c.relname, a.attnum"""
_INDEXES: Final = (
    "select tablename as relation, indexdef as text from pg_indexes where schemaname = 'streamworker' order by 1, 2"
)
_FUNCTIONS: Final = """
  select p.proname as name, pg_get_function_arguments(p.oid) as arguments, pg_get_function_result(p.oid) as result
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = 'streamworker' order by 1"""


def page() -> str:
    """The page."""
    return _page(
        tuple((path.name, path.read_text(encoding="utf-8")) for path in sorted((ROOT / "migrations").glob("*.sql")))
    )


@lru_cache(maxsize=2)
def _page(migrations: tuple[tuple[str, str], ...]) -> str:
    """Made again only when a migration changes: it takes a server."""
    with tempfile.TemporaryDirectory(prefix="streamworker-reference-") as home, embedded.acquire(Path(home)) as servers:
        columns, indexes, functions = asyncio.run(_catalogue(servers.database_url))
    said = _comments(migrations)
    parts = [
        (
            "# Tables in PostgreSQL\n\nMade by running the migrations and asking the server. Everything is in the schema "
            "`streamworker`; `streamworker migrate print` shows the SQL. What it is for: [PostgreSQL](../postgres.md).\n"
        )
    ]
    for relation in dict.fromkeys(row["relation"] for row in columns):
        rows = [
            [
                code(row["name"]),
                row["type"],
                "" if row["required"] else "may be null",
                code(row["value"]),
                said.get((relation, row["name"]), ""),
            ]
            for row in columns
            if row["relation"] == relation
        ]
        parts.append(f"## {relation}\n\n{table(['column', 'type', '', 'default', 'what'], rows)}")
        parts.append(
            "```sql\n" + "\n".join(row["text"] + ";" for row in indexes if row["relation"] == relation) + "\n```\n"
        )
    parts.append("## Functions\n")
    parts += [
        f"```sql\nstreamworker.{row['name']}(\n  {row['arguments'].replace(', ', chr(10) + '  , ')}\n) returns {row['result']}\n```\n"
        for row in functions
        if row["result"] != "trigger"
    ]
    return "\n".join(parts)


async def _catalogue(
    url: str,
) -> tuple[Rows, Rows, Rows]:
    await Migrator(url).up()
    connection = await asyncpg.connect(url)
    try:
        columns, indexes, functions = [await connection.fetch(query) for query in (_COLUMNS, _INDEXES, _FUNCTIONS)]
        return [dict(row) for row in columns], [dict(row) for row in indexes], [dict(row) for row in functions]
    finally:
        await connection.close()


def _comments(migrations: tuple[tuple[str, str], ...]) -> dict[tuple[str, str], str]:
    """(table, column) → the comment beside it in a migration."""
    found: dict[tuple[str, str], str] = {}
    for _, text in migrations:
        relation = ""
        for line in text.splitlines():
            begins = re.match(
                r"create table (?:if not exists )?streamworker\.(\w+)|alter table streamworker\.(\w+)", line
            )
            if begins:
                relation = begins[1] or begins[2]
            column = _COLUMN.match(line)
            if relation and column:
                found[relation, column["name"]] = column["what"].strip()
            elif line.startswith(")"):
                relation = ""
    return found
