-- transaction: off
-- Waiting jobs whose time will come, for the relay: those that wait for a signal alone are not in it.

drop index concurrently if exists streamworker.jobs_waiting;
-- next
create index concurrently jobs_waiting on streamworker.jobs (run_at) where status = 'waiting' and run_at is not null;
-- next
alter table streamworker.jobs validate constraint jobs_status_check;
