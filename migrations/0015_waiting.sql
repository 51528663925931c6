-- Jobs that wait for a signal, or sleep: they have the status waiting, and are in no queue of Redis meanwhile. Only locks that last
-- for a moment: rows are not read here, and 0016 checks them.

set local lock_timeout = '10s';
alter table streamworker.jobs
  add column waits_for text,            -- the signal that a waiting job waits for; run_at is when it is queued without one
  drop constraint jobs_status_check,
  add constraint jobs_status_check check (status in
    ('queued', 'dispatching', 'dispatched', 'running', 'retrying', 'waiting', 'completed', 'dead', 'cancelled', 'expired')) not valid;

-- Signals, also those that were sent before their jobs wait, and waits that timed out: of one name, the first counts.
create table streamworker.job_signals (
  job_id text not null,
  queue_name text not null,
  name text not null,
  data jsonb,
  timed_out boolean not null default false, -- no signal: its job stopped waiting for it
  seen boolean not null default false,      -- by a relay
  sent_at timestamptz not null default clock_timestamp(),
  primary key (job_id, queue_name, name)
);
create index job_signals_unseen on streamworker.job_signals (sent_at) where not seen;

-- Send a signal to a job, in the caller's transaction: select streamworker.signal('01980000-0000-7000-8000-000000000000', 'approved', '{"by": "ann"}'). It is kept
-- until the job waits for it. True; false if a signal with this name was sent before, the job has stopped waiting for it, or
-- has ended.
--   queue  of the job; needed if the ledger does not know the job yet, or several queues have a job with this id
create function streamworker.signal(job_id text, name text, data jsonb default null, queue text default null) returns boolean
language plpgsql volatile as $$
#variable_conflict use_column
declare
  names text[];
  known text;
begin
  if octet_length(coalesce(signal.name, '')) not between 1 and 800 or signal.job_id is null then
    raise exception 'a signal needs the id of a job, and a name of 1 to 200 characters' using errcode = 'invalid_parameter_value';
  end if;
  if octet_length(signal.data::text) > 262144 then
    raise exception 'the data of a signal may have 262144 bytes: store it elsewhere and send where it is'
      using errcode = 'invalid_parameter_value';
  end if;
  select array_agg(job.queue_name order by job.queue_name), max(job.status) into names, known from streamworker.jobs as job
    where job.id = signal.job_id and (signal.queue is null or job.queue_name = signal.queue);
  if names is null and signal.queue is null then
    raise exception 'the ledger knows no job %: check the id, or say its queue', quote_literal(signal.job_id)
      using errcode = 'invalid_parameter_value';
  end if;
  if array_length(names, 1) > 1 then
    raise exception 'several queues have a job with the id % (%): say which queue is meant', signal.job_id,
      array_to_string(names, ', ') using errcode = 'invalid_parameter_value';
  end if;
  if known in ('completed', 'cancelled', 'expired') then
    return false;
  end if;
  insert into streamworker.job_signals (job_id, queue_name, name, data)
    values (signal.job_id, coalesce(signal.queue, names[1]), signal.name, signal.data)
    on conflict (job_id, queue_name, name) do nothing;
  if not found then
    return false;
  end if;
  perform pg_notify('streamworker', '');
  return true;
end
$$;

-- Let a job wait whose run has ended, if it is still that run's: stored; or queue it at once, if what it waits for is there. The
-- row is locked first and the signals are read after it: a relay that finds a new signal locks the row, too, so that one of
-- the two sees the other. Else why not: busy, if another transaction has locked the row; ended; superseded.
create function streamworker.park_job(
  id text, queue_name text, hop bigint, deliveries integer, waits_for text, wake_at double precision, document bytea,
  attempts integer, attempt integer, worker_id text, started_at double precision, finished_at double precision,
  expires_at double precision
) returns text language plpgsql volatile as $$
#variable_conflict use_column
declare
  stored record;
  woken boolean;
  moment timestamptz := to_timestamp(park_job.wake_at);
  expiry timestamptz;
begin
  select job.status, job.hop, job.deliveries, job.expires_at into stored from streamworker.jobs as job
    where job.id = park_job.id and job.queue_name = park_job.queue_name for update skip locked;
  if not found then
    return case when exists (
      select from streamworker.jobs as job where job.id = park_job.id and job.queue_name = park_job.queue_name
    ) then 'busy' else 'superseded' end;
  end if;
  if stored.status in ('completed', 'cancelled', 'expired') then
    return 'ended';
  end if;
  if (stored.hop, stored.deliveries, stored.status) <> (park_job.hop, park_job.deliveries, 'running') then
    return 'superseded';
  end if;
  woken := coalesce(moment <= clock_timestamp(), false) or park_job.waits_for is not null and exists (
    select from streamworker.job_signals as signal where signal.job_id = park_job.id
      and signal.queue_name = park_job.queue_name and signal.name = park_job.waits_for
  );
  expiry := coalesce(stored.expires_at, to_timestamp(park_job.expires_at));
  moment := case when woken then clock_timestamp() else least(moment, expiry) end;
  -- With the next hop, so that this run and its entry count no more.
  update streamworker.jobs as job set
      status = case when woken then 'queued' else 'waiting' end, hop = least(job.hop, 9223372036854775806) + 1,
      deliveries = 0, run_at = moment, waits_for = case when not woken then park_job.waits_for end,
      document = park_job.document, attempt_count = park_job.attempts, expires_at = expiry, last_error = null,
      updated_at = clock_timestamp()
    where job.id = park_job.id and job.queue_name = park_job.queue_name;
  insert into streamworker.job_logs
      (job_id, queue_name, hop, deliveries, attempt, worker_id, started_at, finished_at, outcome, error)
    values (park_job.id, park_job.queue_name, park_job.hop, park_job.deliveries, park_job.attempt, park_job.worker_id,
      to_timestamp(park_job.started_at), to_timestamp(park_job.finished_at), 'waiting', null)
    on conflict do nothing;
  if woken or moment is not null then
    perform pg_notify('streamworker', case when woken then '' else 'later' end);
  end if;
  return 'stored';
end
$$;
