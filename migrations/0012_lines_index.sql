-- transaction: off
-- The jobs of an order key that have not reached Redis, for the relay, which sends them one after the other.

drop index concurrently if exists streamworker.jobs_places;
-- next
create index concurrently jobs_places on streamworker.jobs (queue_name, order_key, place)
  where order_key is not null and status in ('queued', 'dispatching');
