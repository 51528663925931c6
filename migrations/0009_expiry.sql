-- Jobs that expire: at expires_at or later they never start, and end with the status expired. Only locks that last for a
-- moment: rows are not read here, and 0010 checks them.

set local lock_timeout = '10s';
alter table streamworker.jobs
  add column expires_at timestamptz,
  drop constraint jobs_status_check,
  add constraint jobs_status_check check (status in
    ('queued', 'dispatching', 'dispatched', 'running', 'retrying', 'completed', 'dead', 'cancelled', 'expired')) not valid;

-- The function gets a parameter, and is another one for that: who may execute it stays as it was.
select set_config('streamworker.grants', coalesce((
  select proacl::text from pg_proc
  where oid = 'streamworker.enqueue(text,jsonb,text,integer,timestamptz,text,interval,jsonb,integer,text)'::regprocedure
), ''), true);
drop function streamworker.enqueue(text, jsonb, text, integer, timestamptz, text, interval, jsonb, integer, text);

-- Enqueue a job inside the caller's transaction, from any driver: select streamworker.enqueue('invoice.send',
-- '{"invoice_id": 7}', 'billing'). Returns the job's id; with a key (or an id) that the queue remembers, the earlier job's;
-- but a dead job's id stands for a new one.
--   priority  up to 50 high, up to 150 normal, above that low; null takes the queue's default_priority
--   run_at    not before this moment
--   key       deduplication key, remembered for key_ttl
--   expires_at  the job never starts at this moment or later, and ends as expired
-- The limits are those of every other way in: a document of STREAMWORKER_MAX_JOB_BYTES, here the setting
-- streamworker.max_job_bytes (262144 unless set: alter database d set streamworker.max_job_bytes = 1000000), 500 brackets
-- deep, an id of 200 bytes, attempts from 0 up.
create function streamworker.enqueue(
  kind text, payload jsonb, queue text, priority integer default null, run_at timestamptz default null,
  key text default null, key_ttl interval default '24 hours', headers jsonb default null,
  max_attempts integer default null, id text default null, expires_at timestamptz default null
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
  insert into streamworker.jobs (id, queue_name, kind, payload, level, run_at, max_attempts, headers, expires_at)
    values (job, enqueue.queue, coalesce(enqueue.kind, ''), enqueue.payload,
      case when number <= 50 then 'high' when number > 150 then 'low' else 'normal' end,
      case when enqueue.run_at > '0001-01-02 00:00:00+00' then least(enqueue.run_at, '9999-12-30 00:00:00+00') end,
      enqueue.max_attempts, nullif(enqueue.headers, 'null'), expiry)
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
        expires_at = expiry, max_attempts = enqueue.max_attempts, headers = nullif(enqueue.headers, 'null'), attempt_count = 0,
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

-- Take a job for one run: locks its row until the transaction ends, waiting a second at most (then error 55P03), and writes
-- what it becomes. Returns null if the run may go on, else what speaks against it: completed, cancelled, expired, or
-- superseded by a later hop or delivery.
--   becomes    running, or completed where the caller's own transaction is all there is
--   within_ms  milliseconds after which neither a statement nor an idle session may keep the transaction open; null: no
--              limit. Stricter limits of the session stay.
-- A machine that is gone or cut off holds the row no longer than a lease or so: its connection is probed after five seconds
-- of silence, and ends when it has not answered for ten more. Behind a pooler, that is the pooler's to do.
--   payload, headers, document  stored if the job has no row yet: as jsonb, or else the document as it is
create or replace function streamworker.take_job(
  id text, hop bigint, deliveries integer, becomes text, worker_id text, within_ms integer,
  queue_name text, kind text, level text, payload text, headers text, document bytea,
  attempts integer, max_attempts integer, epoch text, created_at double precision, started_at double precision
) returns text language plpgsql volatile set lock_timeout = '1s' as $$
#variable_conflict use_column
declare
  stored record;
  body jsonb;
  head jsonb;
  timeout text;
begin
  perform set_config('tcp_keepalives_idle', '5', true), set_config('tcp_keepalives_interval', '3', true),
    set_config('tcp_keepalives_count', '3', true), set_config('tcp_user_timeout', '15000', true);
  if take_job.within_ms is not null then
    foreach timeout in array array['statement_timeout', 'idle_in_transaction_session_timeout'] loop
      perform set_config(timeout, least(
        nullif(extract(epoch from current_setting(timeout)::interval) * 1000, 0), take_job.within_ms
      )::integer::text, true);
    end loop;
  end if;
  loop
    update streamworker.jobs as job set
        status = take_job.becomes, hop = take_job.hop, deliveries = take_job.deliveries,
        attempt_count = take_job.attempts, worker_id = take_job.worker_id, epoch = take_job.epoch,
        started_at = to_timestamp(take_job.started_at), updated_at = clock_timestamp(), last_error = null,
        finished_at = case when take_job.becomes = 'completed' then clock_timestamp() end
      where job.id = take_job.id and job.queue_name = take_job.queue_name
        and job.status not in ('completed', 'cancelled', 'expired') and (take_job.hop, take_job.deliveries) >= (job.hop, job.deliveries);
    if found then
      return null;
    end if;
    select job.status into stored from streamworker.jobs as job
      where job.id = take_job.id and job.queue_name = take_job.queue_name;
    if found then
      return case when stored.status in ('completed', 'cancelled', 'expired') then stored.status else 'superseded' end;
    end if;
    begin
      body := take_job.payload::jsonb;
      head := take_job.headers::jsonb;
    exception when data_exception or program_limit_exceeded then -- text that jsonb cannot hold, such as NUL characters
      body := null;
      head := null;
    end;
    insert into streamworker.jobs (id, queue_name, kind, payload, level, status, attempt_count, max_attempts, hop, deliveries,
        worker_id, created_at, started_at, finished_at, headers, document, epoch)
      values (take_job.id, take_job.queue_name, take_job.kind, body, take_job.level, take_job.becomes, take_job.attempts,
        take_job.max_attempts, take_job.hop, take_job.deliveries, take_job.worker_id,
        coalesce(case when take_job.created_at between -62135510400 and 253402128000 then to_timestamp(take_job.created_at) end,
          clock_timestamp()), to_timestamp(take_job.started_at),
        case when take_job.becomes = 'completed' then clock_timestamp() end, head,
        case when body is null then take_job.document end, take_job.epoch)
      on conflict (queue_name, id) do nothing;
    if found then
      return null;
    end if; -- inserted by another transaction meanwhile: look again
  end loop;
end
$$;
