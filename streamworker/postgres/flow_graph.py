"""Flows in PostgreSQL: the graph is written in the caller's transaction; operators look at flows, and end them.

The rest is in the database (migrations/0017_flows.sql): a trigger on the rows of jobs releases the successors of a node
in the commit that ends it. What two transactions cannot see of each other the relay looks at after both.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec

from streamworker.errors import UsageError
from streamworker.job import FlowGraph, FlowNode, FlowOfJob, FlowRecord, FlowStarted, NodeRecord
from streamworker.loops import in_loop
from streamworker.postgres import MAX_COUNTED, JobKey, RunRecord, SqlConnection
from streamworker.postgres.encoding import stored_id, within_python
from streamworker.postgres.enqueue import COPY_FROM, QueuedRow, copied, queued_row, row_values
from streamworker.postgres.pool import Database
from streamworker.postgres.sqlstate import schema_expected, understood

T = TypeVar("T")

BATCH: Final = 2000
"""Most rows of one statement."""
WIDE: Final = 100
"""Edges to a node above which the relay looks at it, and no end of a predecessor does; as flow_decide says."""

BEGIN: Final = """
insert into streamworker.flows (id, name, key) values ($1::text, $2::text, $3::text)
on conflict (name, key) where key is not null and status <> 'cancelled' do nothing returning id"""
EARLIER: Final = """
select id from streamworker.flows where name = $1::text and key = $2::text and status <> 'cancelled'"""
NUMBERS: Final = "select nextval('streamworker.node_numbers')::text from generate_series(1, $1::text::integer)"

JOBS: Final = """
insert into streamworker.jobs (id, queue_name, kind, payload, level, run_at, max_attempts, headers, document,
    expires_at, order_key, fair_key, place, status, node)
  select id, queue_name, kind, payload::jsonb, level,
    case when status = 'blocked' or delay is null then run_at::timestamptz
      else clock_timestamp() + make_interval(secs => delay::double precision) end,
    max_attempts::integer, headers::jsonb, decode(document, 'hex'),
    case when status = 'blocked' or expires_in is null then expires_at::timestamptz
      else clock_timestamp() + make_interval(secs => expires_in::double precision) end,
    order_key, fair_key,
    case when status = 'queued' and order_key is not null then streamworker.take_place(queue_name, order_key) end,
    status, node::bigint
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
              $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[], $16::text[])
    as job (id, queue_name, kind, payload, level, delay, run_at, max_attempts, headers, document, expires_in,
            expires_at, order_key, fair_key, status, node)
returning 1"""
NODES: Final = """
insert into streamworker.flow_nodes (node, flow_id, gate, name, job_id, queue_name, if_failed, edges, delay, expires_in)
  select node::bigint, flow_id, gate::bigint, name, job_id, queue_name, if_failed, edges::integer,
    delay::double precision, expires_in::double precision
  from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
              $9::text[], $10::text[])
    as node (node, flow_id, gate, name, job_id, queue_name, if_failed, edges, delay, expires_in)
returning 1"""
EDGES: Final = """
insert into streamworker.flow_edges (node, after, condition)
  select node::bigint, after::bigint, condition from unnest($1::text[], $2::text[], $3::text[])
    as edge (node, after, condition)
returning 1"""
JOB_COLUMNS: Final = (
    "id", "queue_name", "kind", "payload", "level", "run_at", "max_attempts", "headers", "document", "expires_at",
    "fair_key", "status", "node",
)  # fmt: skip
NODE_COLUMNS: Final = (
    "node", "flow_id", "gate", "name", "job_id", "queue_name", "if_failed", "edges", "delay", "expires_in",
)  # fmt: skip
EDGE_COLUMNS: Final = ("node", "after", "condition")
# Of the row as this very transaction wrote it: elsewhere the nodes might be added, and the run that adds them not end.
INSIDE: Final = """
select node.node::text, node.flow_id, node.gate::text, node.name, flow.status
from streamworker.jobs as job join streamworker.flow_nodes as node on node.node = job.node
  join streamworker.flows as flow on flow.id = node.flow_id
where job.id = $1::text and job.queue_name = $2::text and job.status = 'running'
  and job.xmin = pg_current_xact_id()::xid
for key share of flow"""
LINKS: Final = """
with links as (
  select edge.node, edge.condition from streamworker.flow_edges as edge
  where edge.after = $1::text::bigint and edge.condition <> 'failed'
), linked as (
  insert into streamworker.flow_edges (node, after, condition)
    select node, $2::text::bigint, condition from links
    union all select $3::text::bigint, $2::text::bigint, 'end' where not exists (select from links)
  returning node
), several as (
  update streamworker.flow_nodes as node set edges = 2 from linked where node.node = linked.node and node.edges = 1
)
select count(*)::text from linked"""
TELL: Final = "select pg_notify('streamworker', '')"


async def start(
    connection: SqlConnection, graph: FlowGraph, *, max_bytes: int, inside: tuple[str, str] | None = None
) -> FlowStarted:
    """Write a flow in the caller's transaction; its first nodes are visible to the relay when that commits.

    Args:
        connection: the caller's, inside a transaction.
        graph: the flow.
        max_bytes: the largest document allowed.
        inside: (queue, id) of the running job that adds these nodes to its own flow, inside ``ctx.transaction()``.

    Raises:
        UsageError: the job is in no flow, or this is not its transaction.
        JobTooLarge: a document is too large; nothing was written.
        ConfigurationError: the database has no schema streamworker.
    """
    rows = [None if node.job is None else queued_row(node.job, max_bytes, 0.0) for node in graph.nodes]
    with schema_expected("start flows"):
        host: Host | None = None
        if inside is None:
            earlier = await _begun(connection, graph)
            if earlier is not None:
                return FlowStarted(earlier, new=False)
        else:
            host = await _host(connection, *inside)
        numbers = [row[0] for row in await connection.fetch(NUMBERS, str(len(graph.nodes)))]
        numbers.sort(key=int)
        if host is not None:  # before its new nodes come after it, too
            await connection.fetch(LINKS, host.node, numbers[0], host.gate)
        await _write(connection, Written(graph, rows, numbers, host))
        if host is None:
            await connection.fetch(TELL)
    return FlowStarted(graph.id if host is None else host.flow_id, new=True)


class Host(msgspec.Struct, frozen=True):
    """The node that adds others to its flow."""

    node: str
    flow_id: str
    gate: str
    name: str


async def _begun(connection: SqlConnection, graph: FlowGraph) -> str | None:
    """Write the flow's own row; the id of the earlier flow with its key, if there is one."""
    while not await connection.fetch(BEGIN, graph.id, graph.name, graph.key):
        found = await connection.fetch(EARLIER, graph.name, graph.key)
        if found:
            return str(found[0][0])
    return None


async def _host(connection: SqlConnection, queue: str, job_id: str) -> Host:
    found = await connection.fetch(INSIDE, stored_id(job_id), queue)
    if not found:
        raise UsageError(
            "inside=ctx adds nodes to the flow of the running job, in the transaction that ends it: use it inside "
            "`async with ctx.transaction() as pg:` with connection=pg, in a job of a flow"
        )
    if found[0][-1] == "cancelled":
        raise UsageError("the flow was cancelled: no node is added to it any more")
    return Host(*found[0][:-1])


class Written:
    """A flow as rows.

    Args:
        graph: the flow.
        rows: of its jobs.
        numbers: of its nodes, rising.
        host: the node that adds them, if one does.
    """

    def __init__(
        self, graph: FlowGraph, rows: Sequence[QueuedRow | None], numbers: Sequence[str], host: Host | None
    ) -> None:
        self.graph = graph
        self.numbers = numbers
        self.edges = [(numbers[node], numbers[after], condition) for node, after, condition in graph.edges]
        counts = [0] * len(numbers)
        for node, _, _ in graph.edges:
            counts[node] += 1
        if host is not None:  # what would come first comes after the node that adds it
            for place, each in enumerate(graph.nodes):
                if each.job is not None and not counts[place]:
                    self.edges.append((numbers[place], host.node, "ok"))
                    counts[place] = 1
        flow_id, self._path = (graph.id, "") if host is None else (host.flow_id, f"{host.name}/{graph.name}")
        self.jobs = [
            (row, "blocked" if counts[place] else "queued", numbers[place])
            for place, row in enumerate(rows)
            if row is not None
        ]
        self.nodes = [
            self._node(node, place, flow_id, None if host is None else host.gate, counts[place])
            for place, node in enumerate(graph.nodes)
        ]

    def _node(self, node: FlowNode, place: int, flow_id: str, outer: str | None, edges: int) -> tuple[str | None, ...]:
        job = node.job
        gate = outer if node.gate is None else self.numbers[node.gate]
        later = job is not None and edges > 0
        name = node.name
        if self._path:
            name = f"{self._path}/{name}" if place else self._path
        return (
            self.numbers[place], flow_id, gate, name,
            None if job is None else job.id, None if job is None else job.queue, node.if_failed, str(edges),
            _seconds(job.delay) if job is not None and later else None,
            _seconds(job.expires_in) if job is not None and later else None,
        )  # fmt: skip


def _seconds(value: float | None) -> str | None:
    return None if value is None else repr(float(value))


async def _write(connection: SqlConnection, written: Written) -> None:
    jobs = written.jobs
    # COPY cannot take a place, and has no clock of the server's.
    plain = not any(row.job.order_key or row.job.delay or row.job.expires_in for row, _, _ in jobs)
    many = len(written.nodes) >= COPY_FROM
    if not (many and plain and await connection.copy("jobs", JOB_COLUMNS, _lines(map(_job_line, jobs)))):
        for some in _parts([_job_values(*each) for each in jobs]):
            await connection.fetch(JOBS, *some)
    for table, columns, rows, statement in (
        ("flow_nodes", NODE_COLUMNS, written.nodes, NODES),
        ("flow_edges", EDGE_COLUMNS, written.edges, EDGES),
    ):
        if not (many and rows and await connection.copy(table, columns, _lines(map(copied, rows)))):
            for some in _parts(rows):
                await connection.fetch(statement, *some)


def _parts(rows: Sequence[Sequence[str | None]]) -> Iterator[list[list[str | None]]]:
    """The columns of each batch of rows."""
    for start in range(0, len(rows), BATCH):
        yield [list(column) for column in zip(*rows[start : start + BATCH], strict=True)]


def _lines(lines: Iterator[str]) -> Iterator[bytes]:
    batch: list[str] = []
    for line in lines:
        batch.append(line)
        if len(batch) == BATCH:
            yield "".join(batch).encode()
            batch = []
    if batch:
        yield "".join(batch).encode()


def _job_values(row: QueuedRow, status: str, number: str) -> list[str | None]:
    values = row_values(row, 0.0)
    return [*values[:10], *values[12:16], status, number]


def _job_line(job: tuple[QueuedRow, str, str]) -> str:
    row, status, number = job
    values = row_values(row, 0.0)
    document = None if row.document is None else f"\\x{row.document}"
    return copied([*values[:5], *values[6:9], document, values[13], values[15], status, number])


# -- the results of those before a node

# Of a gate the last nodes of its flow stand for it.
PARENTS: Final = """
with recursive before as (
  select edge.after as node from streamworker.jobs as job join streamworker.flow_edges as edge on edge.node = job.node
  where job.id = $1 and job.queue_name = $2
  union
  select edge.after from before join streamworker.flow_nodes as gate on gate.node = before.node and gate.job_id is null
    join streamworker.flow_edges as edge on edge.node = gate.node
)
select node.name, job.id, job.result::text from before join streamworker.flow_nodes as node on node.node = before.node
  join streamworker.jobs as job on job.id = node.job_id and job.queue_name = node.queue_name
where node.outcome = 'ok' order by node.node"""


class NodeParents:
    """`ParentSource` on PostgreSQL.

    Args:
        database: of the ledger.
        run: of the job.
    """

    def __init__(self, database: Database, run: RunRecord) -> None:
        self._database = database
        self._run = run

    async def read(self) -> Sequence[tuple[str, str, str | None]]:
        with understood("reading the results of a flow"):
            rows = await self._database.fetch(PARENTS, stored_id(self._run.job_id), self._run.queue)
        return [(row[0], row[1], row[2]) for row in rows]

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return in_loop(self._database.loop, work)


# -- for operators

_STATE: Final = """case when node.outcome is not null then node.outcome
  when job.status in ('dispatching', 'dispatched') then 'queued' else coalesce(job.status, 'blocked') end"""
# The job is looked up only if its node has not ended.
_FLOW: Final = """
select flow.id, flow.name, flow.key, flow.status, flow.created_at, flow.finished_at, (
  select json_object_agg(state, count)::text from (
    select coalesce(node.outcome, (
      select case when job.status in ('dispatching', 'dispatched') then 'queued' else job.status end
      from streamworker.jobs as job where job.id = node.job_id and job.queue_name = node.queue_name
    ), 'blocked') as state, count(*) from (
      select * from streamworker.flow_nodes where flow_id = flow.id and job_id is not null {most}
    ) as node group by 1
  ) as states
) as nodes from streamworker.flows as flow"""
FLOWS: Final = f"""{_FLOW.format(most="limit $6")}
where ($1::text is null or flow.status = $1) and ($2::text is null or flow.name = $2)
  and ($3::timestamptz is null or (flow.created_at, flow.id) < ($3, $4::text))
order by flow.created_at desc, flow.id desc limit $5"""
FIND: Final = f"{_FLOW.format(most='')} where flow.id = $1"
OF_KEY: Final = f"{_FLOW.format(most='')} where flow.key = $1 order by flow.created_at desc limit 2"
OF_JOB: Final = """
select flow.id, flow.name, node.name as node from streamworker.jobs as job
  join streamworker.flow_nodes as node on node.node = job.node join streamworker.flows as flow on flow.id = node.flow_id
where job.id = $1 and job.queue_name = $2"""
NODE_ROWS: Final = f"""
select node.node as number, node.name, {_STATE} as state, node.gate, node.job_id, node.queue_name as queue,
  coalesce(job.kind, '') as kind, coalesce(job.attempt_count, 0) as attempts,
  {within_python("job.started_at")} as started_at, {within_python("job.finished_at")} as finished_at,
  job.last_error as error, coalesce((
    select json_agg(json_build_array(edge.after, edge.condition) order by edge.after)::text
    from (select after, condition from streamworker.flow_edges where node = node.node order by after limit $3) as edge
    where (select sum(edges) <= $4 from streamworker.flow_nodes where flow_id = $1)
  ), '[]') as after
from streamworker.flow_nodes as node
  left join streamworker.jobs as job on job.id = node.job_id and job.queue_name = node.queue_name
where node.flow_id = $1 order by node.node limit $2"""  # noqa: S608
CANCEL: Final = "select queue_name, id from streamworker.cancel_flow($1)"
FAILED: Final = """
select node.queue_name, node.job_id from streamworker.flow_nodes as node
  join streamworker.jobs as job on job.id = node.job_id and job.queue_name = node.queue_name
where node.flow_id = $1 and not node.unrun and job.status in ('dead', 'cancelled', 'expired')"""
RETRY: Final = "select streamworker.retry_flow($1)"
DELETE: Final = "select streamworker.delete_flow($1)"
LOOK: Final = "select streamworker.flow_look($1)"
_nodes: Final = msgspec.json.Decoder(dict[str, int]).decode
_after: Final = msgspec.json.Decoder(list[tuple[int, str]]).decode


class PostgresFlows:
    """`Flows` on PostgreSQL.

    Args:
        database: of the ledger.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def flows(
        self,
        *,
        status: str | None = None,
        name: str | None = None,
        after: tuple[datetime, str] | None = None,
        limit: int = 50,
        most: int = MAX_COUNTED,
    ) -> list[FlowRecord]:
        at, last = after or (None, None)
        with understood("reading flows"):
            rows = await self._database.fetch(FLOWS, status, name, at, last, limit, most)
        return [_record(row) for row in rows]

    async def find(self, flow: str) -> FlowRecord | None:
        with understood("looking a flow up"):
            rows = await self._database.fetch(FIND, flow) or await self._database.fetch(OF_KEY, flow)
        if len(rows) > 1:
            raise UsageError(f"several flows have the key {flow}: give the id of one (`streamworker flows list`)")
        return _record(rows[0]) if rows else None

    async def of_job(self, queue: str, job_id: str) -> FlowOfJob | None:
        with understood("looking a flow up"):
            rows = await self._database.fetch(OF_JOB, stored_id(job_id), queue)
        return FlowOfJob(rows[0]["id"], rows[0]["name"], rows[0]["node"]) if rows else None

    async def nodes(
        self, flow_id: str, *, limit: int = 10_000, edges: int = 1000, all_edges: int = MAX_COUNTED
    ) -> list[NodeRecord]:
        with understood("reading a flow"):
            rows = await self._database.fetch(NODE_ROWS, flow_id, limit, edges, all_edges)
        return [NodeRecord(**{**row, "after": _after(row["after"])}) for row in rows]

    async def cancel(self, flow_id: str) -> list[JobKey]:
        with understood("cancelling a flow"):
            return [(row[0], row[1]) for row in await self._database.fetch(CANCEL, flow_id)]

    async def failed(self, flow_id: str) -> list[JobKey]:
        with understood("reading a flow"):
            return [(row[0], row[1]) for row in await self._database.fetch(FAILED, flow_id)]

    async def retry(self, flow_id: str) -> int:
        with understood("queueing a flow anew"):
            return int((await self._database.fetch(RETRY, flow_id))[0][0])

    async def delete(self, flow_id: str) -> bool:
        with understood("deleting a flow"):
            return bool((await self._database.fetch(DELETE, flow_id))[0][0])


def _record(row: Any) -> FlowRecord:
    return FlowRecord(
        id=row["id"],
        name=row["name"],
        key=row["key"],
        status=row["status"],
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        nodes=_nodes(row["nodes"] or "{}"),
    )
