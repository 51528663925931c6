-- transaction: off
-- What metrics say of flows and of jobs that wait in the ledger alone, each counted in an index of its own.

drop index concurrently if exists streamworker.jobs_blocked;
-- next
create index concurrently jobs_blocked on streamworker.jobs (queue_name) where status = 'blocked';
-- next
drop index concurrently if exists streamworker.jobs_parked;
-- next
create index concurrently jobs_parked on streamworker.jobs (waits_for) where status = 'waiting';
-- next
drop index concurrently if exists streamworker.flows_status;
-- next
create index concurrently flows_status on streamworker.flows (status);
-- next
drop index concurrently if exists streamworker.flow_nodes_held;
-- next
create index concurrently flow_nodes_held on streamworker.flow_nodes (flow_id) where outcome = 'held';
-- next
alter table streamworker.flow_checks add column if not exists at timestamptz;
-- next
alter table streamworker.flow_checks alter column at set default clock_timestamp();
-- next
-- Gauges: exact up to 10,000; above, what the planner takes for it, so that the cost does not grow with the ledger.
create or replace function streamworker.gauges() returns table (gauge text, label text, value bigint) language plpgsql volatile
set enable_seqscan = off as $$
declare
  counted text;
  plan json;
begin
  for gauge, label, counted in values
    ('flows', 'running', 'streamworker.flows where status = ''running'''),
    ('flows', 'completed', 'streamworker.flows where status = ''completed'''),
    ('flows', 'failed', 'streamworker.flows where status = ''failed'''),
    ('flows', 'cancelled', 'streamworker.flows where status = ''cancelled'''),
    ('blocked', '', 'streamworker.jobs where status = ''blocked'''),
    ('waiting', 'signal', 'streamworker.jobs where status = ''waiting'' and waits_for is not null'),
    ('waiting', 'time', 'streamworker.jobs where status = ''waiting'' and waits_for is null'),
    ('stuck', 'held', '(select distinct flow_id from streamworker.flow_nodes where outcome = ''held'') as held
      join streamworker.flows as flow on flow.id = held.flow_id and flow.status = ''running'''),
    ('stuck', 'unlooked', '(select distinct node.flow_id from (
        select node, at from streamworker.flow_checks order by id limit 1000
      ) as note join streamworker.flow_nodes as node on node.node = note.node
      where note.at < clock_timestamp() - interval ''1 minute'') as late')
  loop
    execute 'select count(*) from (select from ' || counted || ' limit 10000) as found' into value;
    if value = 10000 then
      execute 'explain (format json) select from ' || counted into plan;
      value := greatest(value, (plan->0->'Plan'->>'Plan Rows')::float8::bigint);
    end if;
    return next;
  end loop;
end
$$;
