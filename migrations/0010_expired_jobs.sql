-- transaction: off
-- Expired jobs are forgotten after the retention of their queue, as completed and cancelled ones are.

drop index concurrently if exists streamworker.jobs_ended;
-- next
create index concurrently jobs_ended on streamworker.jobs (queue_name, finished_at)
  where status in ('completed', 'cancelled', 'expired');
-- next
drop index concurrently if exists streamworker.jobs_finished;
-- next
alter table streamworker.jobs validate constraint jobs_status_check;
