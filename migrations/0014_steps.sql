-- What the steps of a job's handler returned, so that a later run of the job does not run them again. Only new tables.

create table streamworker.job_steps (
  job_id text not null,
  queue_name text not null,
  position integer not null,            -- the how-manieth step of the run; -1 is the cursor
  kind text not null check (kind in ('step', 'sleep', 'wait', 'cursor')),
  name text not null,
  value json,                           -- what the step returned; json, because jsonb changes numbers and refuses NUL characters
  made double precision not null,       -- when the job was made, by its document: an id that is used anew is another job
  hop bigint not null,                  -- of the run that recorded it, as the two that follow
  deliveries integer not null,
  worker_id text,
  until timestamptz,                    -- of a sleep, and of a wait with a timeout
  started_at timestamptz,
  recorded_at timestamptz not null default clock_timestamp(),
  primary key (job_id, queue_name, position)
) with (
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
  autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 1000
);
