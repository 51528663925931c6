-- The ledger: every durable job, its attempts, its queue. PostgreSQL 13 and up. docs/postgres.md explains the columns.

create schema if not exists streamworker;

-- Queues appear here by themselves. The first four columns are for people; the rest mirrors what the relay last saw of
-- the queue in Redis, so that a Redis that lost jobs is noticed.
create table streamworker.job_queues (
  name text primary key check (name ~ '^[A-Za-z0-9._:-]{1,100}$' and name !~ ':(high|low)$'),
  default_priority smallint not null default 100,
  is_active boolean not null default true,
  retention interval not null default '30 days',
  epoch text not null default '',       -- of the queue in Redis; '' before it was first seen
  epoch_since timestamptz not null default now(),
  relayed bigint not null default 0,    -- entries the relays have added, as Redis counts them
  server text not null default '',      -- the run id of the server that holds the queue
  recheck_at timestamptz,               -- entries may be missing: compare job by job, then; null: no need
  rechecks smallint not null default 0  -- so many times
);

create table streamworker.jobs (
  id text primary key check (octet_length(id) between 1 and 200),
  queue_name text not null,             -- no foreign key: jobs must not wait for a row of their queue
  kind text not null default '',
  payload jsonb,                        -- null if the document is kept as bytes
  level text not null default 'normal' check (level in ('high', 'normal', 'low')),
  status text not null default 'queued' check (status in
    ('queued', 'dispatching', 'dispatched', 'running', 'retrying', 'completed', 'dead', 'cancelled')),
  attempt_count integer not null default 0,
  max_attempts integer,
  hop bigint not null default 0,        -- how often it was put on a stream again; with deliveries the fence of records
  deliveries integer not null default 0,
  run_at timestamptz,
  worker_id text,
  created_at timestamptz not null default now(),
  started_at timestamptz,
  finished_at timestamptz,
  last_error text,
  result jsonb,
  headers jsonb,
  document bytea,                       -- the whole document, where payload or headers are no valid jsonb
  epoch text not null default '',       -- of the queue, when it was dispatched or last ran
  updated_at timestamptz not null default now()
) with (
  fillfactor = 85,
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
  autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 1000
);

-- One index per hot question, each as small as the question: the relay asks by level and due time, reconciling by queue.
create index jobs_queued on streamworker.jobs (level, coalesce(run_at, created_at)) where status = 'queued';
create index jobs_dispatching on streamworker.jobs (updated_at) where status = 'dispatching';
create index jobs_open on streamworker.jobs (queue_name, id) where status in ('dispatched', 'running', 'retrying');
create index jobs_dead on streamworker.jobs (finished_at) where status = 'dead';
create index jobs_finished on streamworker.jobs (queue_name, finished_at) where status in ('completed', 'cancelled');
create index jobs_created on streamworker.jobs (created_at, id);

-- One row per attempt; (job_id, hop, deliveries) names it, so that recording it again changes nothing.
create table streamworker.job_logs (
  job_id text not null,
  hop bigint not null,
  deliveries integer not null,
  attempt integer not null,
  worker_id text,
  started_at timestamptz,
  finished_at timestamptz,
  outcome text not null,
  error text,
  primary key (job_id, hop, deliveries)
) with (
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
  autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 1000
);

-- Deduplication keys of jobs that were enqueued in a transaction.
create table streamworker.job_keys (
  queue_name text not null,
  key text not null,
  job_id text not null,
  expires_at timestamptz not null,
  primary key (queue_name, key)
);
create index job_keys_expired on streamworker.job_keys (expires_at);

-- A fresh UUIDv7 (RFC 9562): 48 bits of milliseconds over random ones. Servers before PostgreSQL 18 have no uuidv7().
create function streamworker.new_id() returns text language sql volatile as $$
  select encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
    placing substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3) from 1 for 6),
    52, 1), 53, 1), 'hex')::uuid::text
$$;

-- Remember a deduplication key for a job: null if it is this job's now, else the id of the earlier job. Waits for other
-- transactions that are remembering the same key.
create function streamworker.take_key(queue_name text, key text, job_id text, ttl interval) returns text
language plpgsql volatile as $$
#variable_conflict use_column
declare
  earlier text;
begin
  loop
    insert into streamworker.job_keys as known (queue_name, key, job_id, expires_at)
      values (take_key.queue_name, take_key.key, take_key.job_id, clock_timestamp() + take_key.ttl)
      on conflict (queue_name, key) do update set job_id = excluded.job_id, expires_at = excluded.expires_at
        where known.expires_at <= clock_timestamp();
    if found then
      return null;
    end if;
    select known.job_id into earlier from streamworker.job_keys as known
      where known.queue_name = take_key.queue_name and known.key = take_key.key;
    if found then
      return earlier;
    end if; -- deleted in between: once more
  end loop;
end
$$;

-- Enqueue a job inside the caller's transaction, from any driver: select streamworker.enqueue('invoice.send',
-- '{"invoice_id": 7}', 'billing'). Returns the job's id; with a key (or an id) that is remembered, the earlier job's.
--   priority  up to 50 high, up to 150 normal, above that low; null takes the queue's default_priority
--   run_at    not before this moment
--   key       deduplication key, remembered for key_ttl
create function streamworker.enqueue(
  kind text, payload jsonb, queue text, priority integer default null, run_at timestamptz default null,
  key text default null, key_ttl interval default '24 hours', headers jsonb default null,
  max_attempts integer default null, id text default null
) returns text language plpgsql volatile as $$
#variable_conflict use_column
declare
  job text := coalesce(enqueue.id, streamworker.new_id());
  number integer := enqueue.priority;
  earlier text;
begin
  if enqueue.queue is null or enqueue.queue !~ '^[A-Za-z0-9._:-]{1,100}$' or enqueue.queue ~ ':(high|low)$' then
    raise exception '% is no queue name: use 1 to 100 of A-Z a-z 0-9 . _ : - and do not end in :high or :low',
      coalesce(quote_literal(enqueue.queue), 'null') using errcode = 'invalid_parameter_value';
  end if;
  if jsonb_typeof(enqueue.payload) is distinct from 'object' then
    raise exception 'the payload must be a JSON object' using errcode = 'invalid_parameter_value';
  end if;
  if jsonb_typeof(enqueue.headers) not in ('object', 'null') then
    raise exception 'the headers must be a JSON object' using errcode = 'invalid_parameter_value';
  end if;
  if number is null then
    select default_priority into number from streamworker.job_queues where name = enqueue.queue;
  end if;
  if enqueue.key is not null then
    earlier := streamworker.take_key(enqueue.queue, enqueue.key, job, coalesce(enqueue.key_ttl, '24 hours'));
    if earlier is not null then
      return earlier;
    end if;
  end if;
  insert into streamworker.jobs (id, queue_name, kind, payload, level, run_at, max_attempts, headers)
    values (job, enqueue.queue, coalesce(enqueue.kind, ''), enqueue.payload,
      case when number <= 50 then 'high' when number > 150 then 'low' else 'normal' end,
      enqueue.run_at, enqueue.max_attempts, nullif(enqueue.headers, 'null'))
    on conflict (id) do nothing;
  -- The same message twice in a transaction is sent once.
  perform pg_notify('streamworker', case when enqueue.run_at > now() then 'later' else '' end);
  return job;
end
$$;

-- Relays hear of queues that are paused or resumed by is_active.
create function streamworker.queue_changed() returns trigger language plpgsql as $$
begin
  perform pg_notify('streamworker', 'queues');
  return null;
end
$$;
create trigger job_queues_changed after insert or update of is_active on streamworker.job_queues
  for each row execute function streamworker.queue_changed();
