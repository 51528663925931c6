-- The retry of a flow decides anew on what ran because of a failure that is retried, too: a refund that died is not queued
-- beside the payment that may succeed now.

-- Queue the dead, expired and cancelled jobs of a flow anew, with all their attempts; what never ran for their sake, and those of
-- them that come after others of them, go on after them, if they still have to. Returns how many there were.
create or replace function streamworker.retry_flow(flow text) returns integer language plpgsql volatile as $$
declare
  again bigint[];
begin
  perform from streamworker.flows as it where it.id = retry_flow.flow for update;
  select coalesce(array_agg(node.node), '{}') into again from streamworker.flow_nodes as node
    join streamworker.jobs as job on job.id = node.job_id and job.queue_name = node.queue_name
    where node.flow_id = retry_flow.flow and job.status in ('dead', 'cancelled', 'expired') and not node.unrun
      and node.outcome is not null;
  if cardinality(again) = 0 and not exists (
    select from streamworker.flows as it where it.id = retry_flow.flow and it.status = 'cancelled'
  ) then
    return 0;
  end if;
  update streamworker.flows as it set status = 'running', finished_at = null
    where it.id = retry_flow.flow and it.status <> 'running';
  perform from streamworker.jobs as job join streamworker.flow_nodes as node
      on node.job_id = job.id and node.queue_name = job.queue_name
    where node.flow_id = retry_flow.flow and (node.unrun or node.node = any(again))
    order by job.id, job.queue_name for update of job;
  -- What a cancelled flow has not run is open again, too.
  with opened as (
    update streamworker.flow_nodes as node set outcome = null, unrun = false, looked = 0
      where node.flow_id = retry_flow.flow and node.unrun returning node.job_id, node.queue_name
  )
  update streamworker.jobs as job set status = 'blocked', finished_at = null, last_error = null, updated_at = clock_timestamp()
    from opened where job.id = opened.job_id and job.queue_name = opened.queue_name and job.status = 'cancelled';
  update streamworker.flow_nodes as node set outcome = case when node.node <> all(again) and node.job_id is not null
      then node.outcome end, looked = 0
    where node.flow_id = retry_flow.flow and (node.node = any(again) or node.job_id is null or node.looked > 0);
  -- With the next hop, so that no earlier run can record anything any more.
  update streamworker.jobs as job set
      status = case when exists (
        select from streamworker.flow_edges as edge join streamworker.flow_nodes as before on before.node = edge.after
          where edge.node = node.node and before.outcome is null
      ) then 'blocked' else 'queued' end,
      attempt_count = 0, hop = least(job.hop, 9223372036854775806) + 1, deliveries = 0, run_at = null, expires_at = null,
      worker_id = null, started_at = null, finished_at = null, last_error = null, result = null, updated_at = clock_timestamp()
    from streamworker.flow_nodes as node
    where node.node = any(again) and job.id = node.job_id and job.queue_name = node.queue_name;
  perform streamworker.flow_check(node.node) from streamworker.flow_nodes as node
    where node.flow_id = retry_flow.flow and node.outcome is null;
  perform pg_notify('streamworker', '');
  return cardinality(again);
end
$$;
