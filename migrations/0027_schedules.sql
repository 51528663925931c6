-- Schedules that are kept as data: the durable copy of what Redis ticks from. Only new tables.

create table streamworker.schedules (
  queue_name text not null,
  name text not null,
  definition bytea,                     -- as Redis has it; null: the schedule was removed
  changed_at double precision not null, -- epoch seconds, by the clock of Redis
  primary key (queue_name, name)
);
create index schedules_kept on streamworker.schedules (queue_name) where definition is not null;

-- When a relay last compared them with Redis: one of all relays does. At most one row.
create table streamworker.schedule_looks (
  one boolean primary key default true check (one),
  at timestamptz not null,
  whole_at timestamptz not null         -- when it last compared every schedule
);
