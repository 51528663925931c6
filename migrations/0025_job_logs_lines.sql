-- What the handler logged in an attempt (STREAMWORKER_JOB_LOG): an array of [epoch seconds, level, text], or that sealed.
-- json, because jsonb changes numbers. A column without a default: the table is not rewritten.

set local lock_timeout = '10s';

alter table streamworker.job_logs add column if not exists lines json;
