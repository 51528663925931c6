-- Runs that do their work in a transaction together with "this job is done" (ctx.transaction(), ctx.complete()).

-- Take a job for one run: locks its row until the transaction ends, waiting a second at most (then error 55P03), and writes
-- what it becomes. Returns null if the run may go on, else what speaks against it: completed, cancelled, or superseded by
-- a later hop or delivery.
--   becomes    running, or completed where the caller's own transaction is all there is
--   within_ms  milliseconds after which neither a statement nor an idle session may keep the transaction open; null: no
--              limit. Stricter limits of the session stay.
--   payload, headers, document  stored if the job has no row yet: as jsonb, or else the document as it is
create function streamworker.take_job(
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
      where job.id = take_job.id and job.status not in ('completed', 'cancelled')
        and (take_job.hop, take_job.deliveries) >= (job.hop, job.deliveries);
    if found then
      return null;
    end if;
    select job.status into stored from streamworker.jobs as job where job.id = take_job.id;
    if found then
      return case when stored.status in ('completed', 'cancelled') then stored.status else 'superseded' end;
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
        coalesce(to_timestamp(take_job.created_at), clock_timestamp()), to_timestamp(take_job.started_at),
        case when take_job.becomes = 'completed' then clock_timestamp() end, head,
        case when body is null then take_job.document end, take_job.epoch)
      on conflict (id) do nothing;
    if found then
      return null;
    end if; -- inserted by another transaction meanwhile: look again
  end loop;
end
$$;
