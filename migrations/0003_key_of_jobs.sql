-- transaction: off
-- The key of a job becomes (queue, id): the same id in two queues is two jobs. This file builds what that needs while
-- workers of either release go on; 0004 exchanges the keys in a moment. Each statement may run again from the start.

drop index concurrently if exists streamworker.jobs_key;
-- next
-- The id first: one index answers for an id in a known queue, and for an id whose queue is not said.
create unique index concurrently jobs_key on streamworker.jobs (id, queue_name);
-- next
-- Attempts that were recorded by an older release have an empty queue: they belong to the one job that had the id then.
alter table streamworker.job_logs add column if not exists queue_name text not null default '';
-- next
drop index concurrently if exists streamworker.job_logs_key;
-- next
create unique index concurrently job_logs_key on streamworker.job_logs (job_id, queue_name, hop, deliveries);
