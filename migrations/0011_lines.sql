-- Order and fairness: jobs keep the keys that they are enqueued with, and a place among those with their order key. Only locks
-- that last for a moment: rows are not read here.

set local lock_timeout = '10s';
alter table streamworker.jobs add column order_key text, add column fair_key text, add column place bigint;
create sequence streamworker.job_places;

-- The place of a job among those with its order key; null without one. The lock is held until the transaction ends, so that
-- places rise in the order of commits.
create function streamworker.take_place(queue text, order_key text) returns bigint language plpgsql volatile as $$
begin
  if order_key is null or order_key = '' then
    return null;
  end if;
  perform pg_advisory_xact_lock(hashtextextended(queue || E'\n' || order_key, 8140));
  return nextval('streamworker.job_places');
end
$$;

-- The function gets two parameters, and is another one for that: who may execute it stays as it was.
select set_config('streamworker.grants', coalesce((
  select proacl::text from pg_proc
  where oid = 'streamworker.enqueue(text,jsonb,text,integer,timestamptz,text,interval,jsonb,integer,text,timestamptz)'::regprocedure
), ''), true);
drop function streamworker.enqueue(text, jsonb, text, integer, timestamptz, text, interval, jsonb, integer, text, timestamptz);

-- Enqueue a job inside the caller's transaction, from any driver: select streamworker.enqueue('invoice.send',
-- '{"invoice_id": 7}', 'billing'). Returns the job's id; with a key (or an id) that the queue remembers, the earlier job's;
-- but a dead job's id stands for a new one.
--   priority  up to 50 high, up to 150 normal, above that low; null takes the queue's default_priority
--   run_at    not before this moment
--   key       deduplication key, remembered for key_ttl
--   expires_at  the job never starts at this moment or later, and ends as expired
--   order_key   of the jobs of the queue with one order key at most one runs at a time, in the order of their commits
--   fair_key    the tenant, which gets its share of the starts
-- The limits are those of every other way in: a document of STREAMWORKER_MAX_JOB_BYTES, here the setting
-- streamworker.max_job_bytes (262144 unless set: alter database d set streamworker.max_job_bytes = 1000000), 500 brackets
-- deep, an id of 200 bytes, attempts from 0 up.
create function streamworker.enqueue(
  kind text, payload jsonb, queue text, priority integer default null, run_at timestamptz default null,
  key text default null, key_ttl interval default '24 hours', headers jsonb default null,
  max_attempts integer default null, id text default null, expires_at timestamptz default null,
  order_key text default null, fair_key text default null
) returns text language plpgsql volatile as $$
#variable_conflict use_column
declare
  job text := coalesce(enqueue.id, streamworker.new_id());
  number integer := enqueue.priority;
  earlier text;
  expiry timestamptz := greatest(least(enqueue.expires_at, '9999-12-30 00:00:00+00'), '0001-01-02 00:00:00+00');
  size bigint := coalesce(octet_length(enqueue.payload::text), 0) + coalesce(octet_length(enqueue.headers::text), 0);
  most bigint := coalesce(nullif(current_setting('streamworker.max_job_bytes', true), ''), '262144')::bigint;
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
  if octet_length(job) not between 1 and 200 then
    raise exception 'the id must have 1 to 200 bytes' using errcode = 'invalid_parameter_value';
  end if;
  if enqueue.expires_at <= enqueue.run_at then
    raise exception 'expires_at must be later than run_at: no run would ever start' using errcode = 'invalid_parameter_value';
  end if;
  if octet_length(enqueue.order_key) > 200 or octet_length(enqueue.fair_key) > 200 then
    raise exception 'order_key and fair_key must have 200 bytes at most' using errcode = 'invalid_parameter_value';
  end if;
  if enqueue.max_attempts < 0 then
    raise exception 'max_attempts must be 0 or more' using errcode = 'invalid_parameter_value';
  end if;
  if size > most then
    raise exception 'the job % has % bytes and % are allowed: store the data elsewhere and enqueue a reference, or raise '
      'streamworker.max_job_bytes here and STREAMWORKER_MAX_JOB_BYTES of the workers', quote_literal(enqueue.kind), size, most
      using errcode = 'invalid_parameter_value';
  end if;
  -- As many brackets are at least 1,000 bytes, and most jobs have less.
  if size > 1000 and (enqueue.payload @? 'strict $.**{500}' or enqueue.headers @? 'strict $.**{500}') then
    raise exception 'the job % is more than 500 brackets deep', quote_literal(enqueue.kind)
      using errcode = 'invalid_parameter_value';
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
  insert into streamworker.jobs (id, queue_name, kind, payload, level, run_at, max_attempts, headers, expires_at,
      order_key, fair_key, place)
    values (job, enqueue.queue, coalesce(enqueue.kind, ''), enqueue.payload,
      case when number <= 50 then 'high' when number > 150 then 'low' else 'normal' end,
      case when enqueue.run_at > '0001-01-02 00:00:00+00' then least(enqueue.run_at, '9999-12-30 00:00:00+00') end,
      enqueue.max_attempts, nullif(enqueue.headers, 'null'), expiry, nullif(enqueue.order_key, ''), nullif(enqueue.fair_key, ''),
      streamworker.take_place(enqueue.queue, enqueue.order_key))
    on conflict (queue_name, id) do nothing;
  -- Looked for first: whoever uses no dead job's id needs no right to update.
  if not found and exists (
    select from streamworker.jobs as known
    where known.id = job and known.queue_name = enqueue.queue and known.status = 'dead'
  ) then
    -- The next hop, so that no run of before can record anything any more.
    update streamworker.jobs as known set
        status = 'queued', kind = coalesce(enqueue.kind, ''), payload = enqueue.payload, document = null,
        level = case when number <= 50 then 'high' when number > 150 then 'low' else 'normal' end,
        run_at = case when enqueue.run_at > '0001-01-02 00:00:00+00'
          then least(enqueue.run_at, '9999-12-30 00:00:00+00') end,
        expires_at = expiry, order_key = nullif(enqueue.order_key, ''), fair_key = nullif(enqueue.fair_key, ''),
        place = streamworker.take_place(enqueue.queue, enqueue.order_key), max_attempts = enqueue.max_attempts, headers = nullif(enqueue.headers, 'null'), attempt_count = 0,
        hop = least(known.hop, 9223372036854775806) + 1, deliveries = 0, worker_id = null, created_at = now(),
        started_at = null, finished_at = null, last_error = null, result = null, updated_at = clock_timestamp()
      where known.id = job and known.queue_name = enqueue.queue and known.status = 'dead';
  end if;
  -- The same message twice in a transaction is sent once.
  perform pg_notify('streamworker', case when enqueue.run_at > now() then 'later' else '' end);
  return job;
end
$$;

do $$
declare
  given text := current_setting('streamworker.grants');
  role record;
begin
  if given <> '' then
    revoke execute on function streamworker.enqueue from public;
    for role in select grantee, is_grantable from aclexplode(given::aclitem[]) where privilege_type = 'EXECUTE' loop
      execute format('grant execute on function streamworker.enqueue to %s%s',
        case role.grantee when 0 then 'public' else role.grantee::regrole::text end,
        case when role.is_grantable and role.grantee <> 0 then ' with grant option' else '' end);
    end loop;
  end if;
end
$$;
