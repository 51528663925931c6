-- transaction: off
-- The statuses that 0017 allows hold for all jobs.

alter table streamworker.jobs validate constraint jobs_status_check;
