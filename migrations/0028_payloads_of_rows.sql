-- A stored payload goes with the row that had it: when that is deleted, or has another payload. Not with that of a job which is in
-- Redis, and not with that of a dead letter, which is replayed from there. Statements that set no payload and delete nothing, as
-- those of workers, do not call it.

set local lock_timeout = '10s';

create function streamworker.payload_left() returns trigger language plpgsql security definer set search_path = pg_catalog as $$
begin
  delete from streamworker.payloads where id = old.payload->'streamworker_stored'->>'id';
  return null;
end
$$;
create trigger jobs_payload_changed after update of payload on streamworker.jobs for each row
  when (old.payload ? 'streamworker_stored' and old.payload is distinct from new.payload
    and (old.status = 'queued' and old.hop = 0 or old.status in ('completed', 'cancelled', 'expired')))
  execute function streamworker.payload_left();
create trigger jobs_payload_deleted after delete on streamworker.jobs for each row
  when (old.payload ? 'streamworker_stored' and old.status in ('completed', 'cancelled', 'expired'))
  execute function streamworker.payload_left();
