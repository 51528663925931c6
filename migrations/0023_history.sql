-- History of runs: by minute for two days, by hour and by day for sixty, for each queue and kind. Only a new table and a function.

create table streamworker.history (
  span integer not null,                -- seconds: 60, 3600 or 86400
  at timestamptz not null,              -- begin of the span
  queue_name text not null,
  kind text not null,
  started bigint not null,              -- handlers that were called
  done bigint not null,
  failed bigint not null,               -- runs that ended in a retry or a dead letter
  retried bigint not null,              -- those of them that are tried again
  -- How long handlers ran, and jobs waited before that: how many in each of 200 buckets, twenty a decade from 0.1 ms on. A bucket
  -- has twelve decimal digits, the first one the lowest; so that histograms are added as numbers are: sum(run).
  run numeric not null,
  wait numeric not null,
  primary key (span, at, queue_name, kind)
) with (fillfactor = 80);

-- The time in seconds below which a share of a histogram is; null if it is empty.
create function streamworker.history_quantile(histogram numeric, share double precision) returns double precision
language sql immutable as $$
  select power(10, (bucket + 0.5 - 80) / 20)::double precision from (
    select bucket, sum(count) over (order by bucket) as below, sum(count) over () as total from (
      select bucket, substr(lpad(histogram::text, 2400, '0'), 2389 - 12 * bucket, 12)::bigint as count
      from generate_series(0, 199) as bucket
    ) as buckets where count > 0
  ) as found
  where total > 0 and below >= share * total order by bucket limit 1
$$;
