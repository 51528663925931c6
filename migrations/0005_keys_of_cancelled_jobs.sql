-- A deduplication key is free once its job was cancelled: nothing of it will run.

-- Remember a deduplication key for a job: null if it is this job's now, else the id of the earlier job. Waits for other
-- transactions that are remembering the same key.
create or replace function streamworker.take_key(queue_name text, key text, job_id text, ttl interval) returns text
language plpgsql volatile as $$
#variable_conflict use_column
declare
  earlier text;
begin
  loop
    insert into streamworker.job_keys as known (queue_name, key, job_id, expires_at)
      values (take_key.queue_name, take_key.key, take_key.job_id, clock_timestamp() + take_key.ttl)
      on conflict (queue_name, key) do update set job_id = excluded.job_id, expires_at = excluded.expires_at
        where known.expires_at <= clock_timestamp() or exists (
          select from streamworker.jobs as job
          where job.id = known.job_id and job.queue_name = known.queue_name and job.status = 'cancelled'
        );
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
