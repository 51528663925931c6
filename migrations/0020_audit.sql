-- Who did what to which jobs by hand: the command line, the dashboard and operators of Python programs. Only a new table.

create table streamworker.audit (
  id bigint generated always as identity primary key,
  at timestamptz not null default clock_timestamp(),
  who text not null,
  source text not null,                 -- cli, dashboard or python
  action text not null,
  queue_name text,
  job_id text,
  kind text,
  details text,                         -- what else was said, such as the reason of a burial
  result text not null                  -- done, gone (the job had moved on), or why it was refused
);
create index audit_at on streamworker.audit (at desc, id desc);
create index audit_job on streamworker.audit (job_id) where job_id is not null;
