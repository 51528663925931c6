-- transaction: off
-- Jobs that are ended by hand in Redis free the keys that are remembered here: found by the job.

drop index concurrently if exists streamworker.job_keys_job;
-- next
create index concurrently job_keys_job on streamworker.job_keys (job_id);
