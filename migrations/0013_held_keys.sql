-- Deduplication keys that are held until their jobs have started or ended, instead of for a time: the status of the job
-- says whether. No row is read or written here, and the table is locked for a moment.

set local lock_timeout = '10s';
alter table streamworker.job_keys
  add column held text check (held in ('done', 'started')), -- null: for a time, until expires_at
  add column taken_at timestamptz;

-- Remember a deduplication key for a job: null if it is this job's now, else the id of the earlier job. Waits for other
-- transactions that are remembering the same key.
--   ttl      how long it is remembered; of a held one, when it is looked at next
--   held     done: until its job has ended; started: until it starts, which is known once it has run for a second
--   replace  take it, too, from a job that was sent to its queue and holds it until it starts
create function streamworker.take_key(queue_name text, key text, job_id text, ttl interval, held text, replace boolean)
returns text language plpgsql volatile as $$
#variable_conflict use_column
declare
  earlier record;
  began timestamptz := clock_timestamp();
begin
  loop
    -- Only what is seen frees a key: a row that this statement cannot see yet may be that of a job that waits.
    insert into streamworker.job_keys as known (queue_name, key, job_id, expires_at, held, taken_at)
      values (take_key.queue_name, take_key.key, take_key.job_id, clock_timestamp() + take_key.ttl, take_key.held,
        clock_timestamp())
      on conflict (queue_name, key) do update set
          job_id = excluded.job_id, expires_at = excluded.expires_at, held = excluded.held, taken_at = excluded.taken_at
        where known.held is null and known.expires_at <= clock_timestamp() or exists (
          select from streamworker.jobs as job
          where job.id = known.job_id and job.queue_name = known.queue_name and (
            job.status = 'cancelled'
            or known.held is not null and job.status in ('completed', 'dead', 'expired')
            or known.held = 'started' and (
              job.status in ('running', 'retrying') or take_key.replace and job.status in ('dispatching', 'dispatched')
            )
          )
        );
    if found then
      return null;
    end if;
    select known.job_id, known.held, known.taken_at, exists (
        select from streamworker.jobs as job where job.id = known.job_id and job.queue_name = known.queue_name
      ) as there into earlier
      from streamworker.job_keys as known where known.queue_name = take_key.queue_name and known.key = take_key.key;
    if found then
      -- Key and row commit together: one whose row is gone belongs to a job that was forgotten.
      if earlier.held is null or earlier.there or earlier.taken_at > began - interval '1 minute' then
        return earlier.job_id;
      end if;
      update streamworker.job_keys as known set job_id = take_key.job_id, held = take_key.held,
          expires_at = clock_timestamp() + take_key.ttl, taken_at = clock_timestamp()
        where known.queue_name = take_key.queue_name and known.key = take_key.key and known.job_id = earlier.job_id;
      if found then
        return null;
      end if;
    end if; -- deleted or taken in between: once more
  end loop;
end
$$;

create or replace function streamworker.take_key(queue_name text, key text, job_id text, ttl interval) returns text
language sql volatile as $$ select streamworker.take_key($1, $2, $3, $4, null, false) $$;

-- Enqueue a job whose key is held, inside the caller's transaction, from any driver: select
-- streamworker.enqueue_unique('account.sync', '{"account": 7}', 'accounts', 'account 7'). Returns the id of the job that has
-- the key. Everything else is as for streamworker.enqueue.
--   key           deduplication key
--   unique        done (if nothing is replaced): held until the job has ended; started: until it starts
--   replace       the job that has the key is rewritten, if it waits here and was never sent to its queue
--   debounce      the time to wait first, anew with each call that rewrites the job
--   debounce_max  the most of that, from the first call
create function streamworker.enqueue_unique(
  kind text, payload jsonb, queue text, key text, "unique" text default null, replace boolean default false,
  debounce interval default null, debounce_max interval default null, priority integer default null,
  run_at timestamptz default null, headers jsonb default null, max_attempts integer default null,
  expires_at timestamptz default null
) returns text language plpgsql volatile as $$
#variable_conflict use_column
declare
  job text := streamworker.new_id();
  replaces boolean := enqueue_unique.replace or enqueue_unique.debounce is not null;
  held text := coalesce(enqueue_unique."unique",
    case when enqueue_unique.replace or enqueue_unique.debounce is not null then 'started' else 'done' end);
  number integer := enqueue_unique.priority;
  found_id text;
begin
  if enqueue_unique.key is null or held not in ('done', 'started') then
    raise exception 'a key is needed, and unique must be done or started' using errcode = 'invalid_parameter_value';
  end if;
  if replaces then
    if jsonb_typeof(enqueue_unique.payload) is distinct from 'object' then
      raise exception 'the payload must be a JSON object' using errcode = 'invalid_parameter_value';
    end if;
    if octet_length(enqueue_unique.payload::text) + coalesce(octet_length(enqueue_unique.headers::text), 0)
        > coalesce(nullif(current_setting('streamworker.max_job_bytes', true), ''), '262144')::bigint then
      raise exception 'the job is too large: store the data elsewhere and enqueue a reference'
        using errcode = 'invalid_parameter_value';
    end if;
    if number is null then
      select default_priority into number from streamworker.job_queues where name = enqueue_unique.queue;
    end if;
    update streamworker.jobs as waiting set
        kind = coalesce(enqueue_unique.kind, ''), payload = enqueue_unique.payload, document = null,
        headers = nullif(enqueue_unique.headers, 'null'), max_attempts = enqueue_unique.max_attempts,
        level = case when number <= 50 then 'high' when number > 150 then 'low' else 'normal' end,
        expires_at = enqueue_unique.expires_at, updated_at = clock_timestamp(),
        run_at = case when enqueue_unique.debounce is null then enqueue_unique.run_at
          else least(clock_timestamp() + enqueue_unique.debounce, waiting.created_at + enqueue_unique.debounce_max) end
      from streamworker.job_keys as known
      where known.queue_name = enqueue_unique.queue and known.key = enqueue_unique.key and known.held is not null
        and waiting.id = known.job_id and waiting.queue_name = known.queue_name
        and waiting.status = 'queued' and waiting.hop = 0
      returning waiting.id into found_id;
    if found_id is not null then
      perform pg_notify('streamworker', '');
      return found_id;
    end if;
  end if;
  found_id := streamworker.take_key(enqueue_unique.queue, enqueue_unique.key, job, interval '1 day', held, replaces);
  if found_id is not null then
    return found_id;
  end if;
  return streamworker.enqueue(kind => enqueue_unique.kind, payload => enqueue_unique.payload,
    queue => enqueue_unique.queue, priority => enqueue_unique.priority, headers => enqueue_unique.headers,
    run_at => case when enqueue_unique.debounce is null then enqueue_unique.run_at
      else clock_timestamp() + enqueue_unique.debounce end,
    max_attempts => enqueue_unique.max_attempts, id => job, expires_at => enqueue_unique.expires_at);
end
$$;
