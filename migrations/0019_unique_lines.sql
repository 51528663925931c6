-- streamworker.enqueue_unique takes order_key and fair_key, as streamworker.enqueue does. No row is read or written here. The
-- function that it replaces has other parameters, so it is dropped; a call that waits for this transaction finds the new one.

set local lock_timeout = '10s';
select set_config('streamworker.grants', coalesce((
  select proacl::text from pg_proc where oid = ('streamworker.enqueue_unique(text,jsonb,text,text,text,boolean,interval,interval,'
    || 'integer,timestamptz,jsonb,integer,timestamptz)')::regprocedure
), ''), true);
drop function streamworker.enqueue_unique(
  text, jsonb, text, text, text, boolean, interval, interval, integer, timestamptz, jsonb, integer, timestamptz);

-- Enqueue a job whose key is held, inside the caller's transaction, from any driver: select
-- streamworker.enqueue_unique('account.sync', '{"account": 7}', 'accounts', 'account 7'). Returns the id of the job that has
-- the key. Everything else is as for streamworker.enqueue.
--   key           deduplication key
--   unique        done (if nothing is replaced): held until the job has ended; started: until it starts
--   replace       the job that has the key is rewritten, if it waits here and was never sent to its queue
--   debounce      the time to wait first, anew with each call that rewrites the job
--   debounce_max  the most of that, from the first call
--   order_key     a job that is rewritten keeps its place in the order of its key, and joins at the end of that of another one
create function streamworker.enqueue_unique(
  kind text, payload jsonb, queue text, key text, "unique" text default null, replace boolean default false,
  debounce interval default null, debounce_max interval default null, priority integer default null,
  run_at timestamptz default null, headers jsonb default null, max_attempts integer default null,
  expires_at timestamptz default null, order_key text default null, fair_key text default null
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
  if octet_length(enqueue_unique.order_key) > 200 or octet_length(enqueue_unique.fair_key) > 200 then
    raise exception 'order_key and fair_key must have 200 bytes at most' using errcode = 'invalid_parameter_value';
  end if;
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
        fair_key = nullif(enqueue_unique.fair_key, ''), order_key = nullif(enqueue_unique.order_key, ''),
        place = case when waiting.order_key is not distinct from nullif(enqueue_unique.order_key, '') then waiting.place
          else streamworker.take_place(enqueue_unique.queue, enqueue_unique.order_key) end,
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
    max_attempts => enqueue_unique.max_attempts, id => job, expires_at => enqueue_unique.expires_at,
    order_key => enqueue_unique.order_key, fair_key => enqueue_unique.fair_key);
end
$$;

do $$
declare
  given text := current_setting('streamworker.grants');
  role record;
begin
  if given <> '' then
    revoke execute on function streamworker.enqueue_unique from public;
    for role in select grantee, is_grantable from aclexplode(given::aclitem[]) where privilege_type = 'EXECUTE' loop
      execute format('grant execute on function streamworker.enqueue_unique to %s%s',
        case role.grantee when 0 then 'public' else role.grantee::regrole::text end,
        case when role.is_grantable and role.grantee <> 0 then ' with grant option' else '' end);
    end loop;
  end if;
end
$$;
